from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from lavis_dcd.common.errors import UserError

pytest.importorskip("lavis")

from lavis.common.registry import registry


def _coco(pictures: dict[int, list[str]]) -> dict:
    captions = [(image_id, text) for image_id, texts in pictures.items() for text in texts]
    return {
        "info": {}, "licenses": [],
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 16, "width": 16} for i in pictures],
        "annotations": [{"id": 100 - n, "image_id": i, "caption": t} for n, (i, t) in enumerate(captions)],
    }  # fmt: skip


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """captions_train.json and captions_val.json with their pictures."""
    for split, content in (("train", {9: ["b", "a"], 4: ["c"]}), ("val", {7: ["d"], 2: ["e", "f"]})):
        (tmp_path / f"captions_{split}.json").write_text(json.dumps(_coco(content)))
        (tmp_path / split).mkdir()
        for image_id in content:
            Image.new("RGB", (16, 16)).save(tmp_path / split / f"{image_id:012d}.jpg")
    return tmp_path


def _section(root: Path, splits=("train", "val"), **more):
    builder = registry.get_builder_class("coco_captions")
    default = OmegaConf.load(builder.default_config_path()).datasets.coco_captions
    info = {
        "root": str(root),
        "annotations": {split: f"captions_{split}.json" for split in splits},
        "images": {split: split for split in splits},
    }
    sizes = {"train": {"image_size": 8}, "eval": {"image_size": 8}}
    return OmegaConf.merge(default, {"vis_processor": sizes, "build_info": info | more})


def _build(root: Path, **more):
    return registry.get_builder_class("coco_captions")(_section(root, **more)).build_datasets()


def test_pictures_by_id_and_captions_by_id(coco, capsys):
    found = _build(coco)
    assert capsys.readouterr().out == ""
    assert [row["caption"] for row in found["train"].annotation] == ["c", "a", "b"]
    assert [found["train"][i]["image_id"] for i in range(3)] == [0, 1, 1]
    assert found["val"].text == ["f", "e", "d"] and found["val"].image == ["000000000002.jpg", "000000000007.jpg"]
    assert found["val"][1]["image"].shape == (3, 8, 8)


def test_pictures_that_are_not_there(coco, caplog):
    (coco / "val/000000000002.jpg").unlink()
    assert len(_build(coco)["val"]) == 2
    with caplog.at_level(logging.WARNING):
        assert _build(coco, only_existing=True)["val"].image == ["000000000007.jpg"]
    assert "1 pictures are not there and are left out (only_existing), 1 are kept" in caplog.text
    (coco / "val/000000000007.jpg").unlink()
    with pytest.raises(UserError, match="holds none of the 2 pictures"):
        _build(coco, only_existing=True)


def test_pictures_without_a_caption_are_left_out_and_counted(coco, caplog):
    (coco / "captions_val.json").write_text(json.dumps(_coco({7: ["d"], 2: []})))
    with caplog.at_level(logging.WARNING):
        assert len(_build(coco)["val"]) == 1
    assert "1 of 2 pictures have no caption" in caplog.text


def test_empty_captions_are_left_out_and_counted(coco, caplog):
    (coco / "captions_val.json").write_text(json.dumps(_coco({7: ["d", " "], 2: ["e", ""]})))
    with caplog.at_level(logging.WARNING):
        assert _build(coco)["val"].text == ["e", "d"]
    assert "2 empty captions are left out" in caplog.text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{oops", "not readable as JSON"),
        ("[]", "not in COCO's format"),
        ('{"images": []}', "not in COCO's format"),
        ('{"images": [], "annotations": []}', "holds no caption"),
        ('{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]}',
         r"no caption file of COCO's \(annotations.caption missing\)"),
        ('{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"id": 1, "image_id": 2, "caption": "y"}]}',
         "image_id: 2 is the id of none of the images"),
        ('{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"id": 8, "image_id": 1, "caption": null}]}',
         r"annotations\[0\]: caption: null, expected text"),
        ('{"images": [{"id": 3, "file_name": 5}], "annotations": [{"id": 1, "image_id": 3, "caption": "y"}]}',
         r"images\[0\]: file_name: a number, expected a path"),
        ('{"images": [{"id": 1, "file_name": "x"}], "annotations": [7]}',
         r"annotations\[0\]: a number, expected an object"),
    ],
)  # fmt: skip
def test_files_that_are_no_caption_files(coco, content, what):
    (coco / "captions_val.json").write_text(content)
    with pytest.raises(UserError, match=what):
        _build(coco)


def test_faults_of_the_section(coco, tmp_path):
    builder = registry.get_builder_class("coco_captions")

    def faults(**more):
        return builder.config_faults(_section(coco, **more), "datasets.coco_captions")

    assert faults() == []
    absent = faults(
        annotations={"train": "no.json", "val": "captions_val.json"}, images={"train": "train", "val": "no"}
    )
    assert len(absent) == 2
    assert "annotations.train" in absent[0] and "does not exist" in absent[0] and "cocodataset.org" in absent[0]
    assert "images.val" in absent[1] and "is not a folder" in absent[1]
    assert "no folder for val" in faults(images={"train": "train", "val": None})[0]
    default = OmegaConf.load(builder.default_config_path()).datasets.coco_captions
    assert "give a caption file" in builder.config_faults(default, "x")[0]


def test_coco_val2017_mini(shared_folder):
    root = shared_folder / "data/coco_val2017_mini"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    info = {"annotations": {"val": "captions_val2017_mini.json"}, "images": {"val": "val2017"}}
    section = OmegaConf.merge(_section(root, splits=()), {"build_info": info})
    dataset = registry.get_builder_class("coco_captions")(section).build_datasets()["val"]
    raw = json.loads((root / "captions_val2017_mini.json").read_text())
    assert len(dataset) == 159 and len(dataset.text) == len(raw["annotations"])
    assert all((Path(dataset.vis_root) / name).is_file() for name in dataset.image)


def test_the_whole_official_file(shared_folder, caplog):
    root = shared_folder / "data/coco_val2017_mini"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    from lavis_dcd.datasets.coco_captions import read_coco

    rows = read_coco(root / "captions_val2017.json")
    assert len(rows) == 25014 and len({row.image for row in rows}) == 5000
