"""The builder of pictures and texts that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_dcd.banks.feature_bank import read_rows
from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.pictures import verify_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20 + i, 16), (80 * i, 0, 0)).save(folder / f"p{i}.png")
    (tmp_path / "queries.txt").write_text("a dog\ntwo cats\n\nrain\na dog\n")
    rows = [{"image": f"p{i}.png", "caption": [f"c{i}0", f"c{i}1"]} for i in (2, 0)]
    (folder / "train.json").write_text(json.dumps(rows))
    return tmp_path


def section(**build_info):
    builder = registry.get_builder_class("unpaired")
    default = OmegaConf.load(builder.default_config_path()).datasets.unpaired
    sizes = {"train": {"image_size": 8}, "eval": {"image_size": 8}}
    return OmegaConf.merge(default, {"vis_processor": sizes, "build_info": build_info})


def build(**build_info):
    return registry.get_builder_class("unpaired")(section(**build_info)).build_datasets()


def faults(**build_info) -> list[str]:
    return registry.get_builder_class("unpaired").config_faults(section(**build_info), "datasets.unpaired")


def test_a_folder_and_a_query_log(photos):
    info = {"pictures": str(photos / "photos"), "texts": str(photos / "queries.txt")}
    assert not faults(**info)
    found = build(**info)
    assert list(found) == ["train"]
    train = found["train"]
    assert (train.picture_count, train.text_count, len(train)) == (3, 4, 4)
    assert train.vis_root == str(photos / "photos")
    assert [row["image"] for row in train.annotation] == ["p0.png", "p1.png", "p2.png", "p0.png"]
    assert [row["caption"] for row in train.annotation] == ["a dog", "two cats", "rain", "a dog"]
    assert train[1]["image"].shape == (3, 8, 8)
    verify_pictures(train)


def test_a_paired_file_without_its_pairs_joined_with_further_texts(photos, monkeypatch):
    monkeypatch.chdir(photos)
    train = build(root="photos", pictures=["train.json", "photos"], texts=["train.json", "queries.txt"])["train"]
    # the pictures of the file in its order, so that features kept for it are in the order of these
    assert [row["image"] for row in train.annotation[:3]] == ["p2.png", "p0.png", "p1.png"]
    assert [row["caption"] for row in train.annotation] == ["c20", "c21", "c00", "c01", "a dog", "two cats", "rain",
                                                           "a dog"]  # fmt: skip
    assert len(read_rows(train, "train").captions) == 8


def test_more_pictures_than_texts(photos):
    (photos / "one.txt").write_text("a dog")
    train = build(pictures=str(photos / "photos"), texts=str(photos / "one.txt"))["train"]
    assert [row["caption"] for row in train.annotation] == ["a dog"] * 3 and train.text_count == 1


def test_faults_of_the_section(photos):
    lines = faults()
    assert len(lines) == 1 and "give pictures and texts: " in lines[0]
    assert "give texts: " in faults(pictures=str(photos))[0]
    gone = faults(root=str(photos / "no"), pictures="a", texts=["b.txt", str(photos / "photos")])
    assert [line.split(": ")[0].removeprefix("datasets.unpaired.build_info.") for line in gone] == [
        "root", "pictures", "texts", "texts",
    ]  # fmt: skip
    assert "did you mean texts" in faults(pictures="a", text="b")[0]


def test_faults_of_all_files_at_once(photos):
    (photos / "bad.json").write_text("{")
    (photos / "bad.txt").write_text("\n")
    with pytest.raises(UserError) as caught:
        build(root=str(photos), pictures=["bad.json", "photos"], texts=["bad.txt", "queries.txt"])
    assert [line.split(":")[0].rsplit("/", 1)[1] for line in caught.value.faults] == ["bad.json", "bad.txt"]


def test_pictures_outside_the_root_are_told(photos):
    Image.new("RGB", (4, 4)).save(photos / "above.png")
    with pytest.raises(UserError, match=r"is not inside .*set root to a folder above all pictures"):
        build(root=str(photos / "photos"), pictures=str(photos), texts=str(photos / "queries.txt"))
