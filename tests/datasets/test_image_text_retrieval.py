from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_dcd.common.errors import UserError

pytest.importorskip("lavis")

from lavis.common.registry import registry


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (20 + i, 16), (20 * i, 0, 0)).save(folder / f"p{i}.png")
    return folder


def _section(**build_info):
    builder = registry.get_builder_class("image_text_retrieval")
    default = OmegaConf.load(builder.default_config_path()).datasets.image_text_retrieval
    sizes = {"train": {"image_size": 8}, "eval": {"image_size": 8}}
    return OmegaConf.merge(default, {"vis_processor": sizes, "build_info": build_info})


def _build(**build_info):
    return registry.get_builder_class("image_text_retrieval")(_section(**build_info)).build_datasets()


def _faults(**build_info) -> list[str]:
    builder = registry.get_builder_class("image_text_retrieval")
    return builder.config_faults(_section(**build_info), "datasets.image_text_retrieval")


def _write(file: Path, content) -> str:
    file.write_text(json.dumps(content), encoding="utf-8")
    return str(file)


def _rows(numbers, captions=2):
    return [{"image": f"p{i}.png", "caption": f"c{i}{k}"} for i in numbers for k in range(captions)]


def test_json_per_split(photos):
    _write(photos / "train.json", _rows(range(4)))
    _write(photos / "val_a.json", [{"image": "p4.png", "caption": ["a", "b", "c"]}])
    _write(photos / "val_b.json", _rows([5]))
    found = _build(root=str(photos), annotations={"train": "train.json", "val": ["val_a.json", "val_b.json"]})
    assert list(found) == ["train", "val"]
    train, val = found["train"], found["val"]
    assert len(train) == 8 and train[0]["image"].shape == (3, 8, 8)
    assert [train[i]["image_id"] for i in range(4)] == [0, 0, 1, 1]
    assert val.text == ["a", "b", "c", "c50", "c51"] and val.image == ["p4.png", "p5.png"]
    assert val.img2txt == {0: [0, 1, 2], 1: [3, 4]} and val.txt2img[4] == 1
    assert not _faults(root=str(photos), annotations={"train": "train.json"})


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_processes_do_not_read_the_annotations_again(photos, start):
    files = [photos / "train.json", photos / "val.json"]
    _write(files[0], _rows(range(4)))
    _write(files[1], _rows([5, 6]))
    found = _build(root=str(photos), annotations={"train": "train.json", "val": "val.json"})
    for file in files:
        file.unlink()
    for dataset in found.values():
        expected = [dataset[index] for index in range(len(dataset))]
        # spawned processes get the set pickled, forked ones as it is
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start)
        for item, wanted in zip(loader, expected, strict=True):
            assert item.keys() == wanted.keys()
            assert torch.equal(torch.as_tensor(item["image"]), wanted["image"])
            assert {k: v for k, v in item.items() if k != "image"} == {k: v for k, v in wanted.items() if k != "image"}
        sent = pickle.loads(pickle.dumps(dataset))
        assert len(sent) == len(dataset) and torch.equal(sent[1]["image"], expected[1]["image"])


def test_csv_with_a_split_column(photos):
    (photos / "c.csv").write_text("image,caption,split\np0.png,x,train\np1.png,y,val\np1.png,z,val\n")
    found = _build(root=str(photos), csv="c.csv")
    assert list(found) == ["train", "val"] and found["val"].img2txt == {0: [0, 1]}


def _split_csv(photos: Path) -> None:
    lines = [f"p{i}.png,caption {i} {k}" for i in range(10) for k in range(3)]
    (photos / "c.csv").write_text("\n".join(["image,caption", *lines]) + "\n")


def test_csv_without_a_split_column_is_split_by_picture_and_seed(photos):
    _split_csv(photos)
    options = {"root": str(photos), "csv": "c.csv", "val_fraction": 0.2, "test_fraction": 0.3}
    found = _build(**options)
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 15, "val": 2, "test": 3}
    pictures = {split: {row["image"] for row in dataset.annotation} for split, dataset in found.items()}
    assert sum(map(len, pictures.values())) == len(set.union(*pictures.values())) == 10
    assert _build(**options)["test"].image == found["test"].image
    others = [_build(**options, seed=seed)["test"].image for seed in range(1, 4)]
    assert any(other != found["test"].image for other in others)
    assert "test" not in _build(**options | {"test_fraction": 0})


def test_relative_paths_start_at_the_current_folder_without_a_root(photos, monkeypatch):
    monkeypatch.chdir(photos)
    _split_csv(photos)
    assert _build(csv="c.csv")["train"][0]["image"].shape == (3, 8, 8)


def test_a_named_split_column_must_be_there(photos):
    _split_csv(photos)
    with pytest.raises(UserError, match="no column fold"):
        _build(root=str(photos), csv="c.csv", split_column="fold")


def test_null_split_column_ignores_the_column_of_that_name(photos):
    (photos / "c.csv").write_text("image,caption,split\np0.png,x,?\np1.png,y,?\np2.png,z,?\n")
    assert set(_build(root=str(photos), csv="c.csv", split_column=None)) == {"train", "val", "test"}


def test_too_few_pictures_for_the_splits(photos):
    (photos / "c.csv").write_text("image,caption\np0.png,x\np1.png,y\n")
    with pytest.raises(UserError, match="2 pictures are too few"):
        _build(root=str(photos), csv="c.csv")


def test_faults_of_all_files_at_once(photos):
    _write(photos / "train.json", [{"image": "p0.png"}])
    _write(photos / "val.json", {})
    with pytest.raises(UserError) as caught:
        _build(root=str(photos), annotations={"train": "train.json", "val": "val.json"})
    assert len(caught.value.faults) == 2


def test_faults_of_the_section(photos, tmp_path):
    assert "give either annotations" in _faults(root=str(photos))[0]
    both = _faults(root=str(photos), csv="c.csv", annotations={"train": "t.json"})
    assert len(both) == 1 and "not both" in both[0]
    absent = _faults(root=str(tmp_path / "no"), annotations={"train": "t.json", "val": ["v.json"]})
    assert [line.split(": ")[0].removeprefix("datasets.image_text_retrieval.build_info.") for line in absent] == [
        "root", "annotations.train", "annotations.val",
    ]  # fmt: skip
    assert "build_info.csv: c.csv" in _faults(csv="c.csv")[0]
    assert any("annotations" in line for line in _faults(annotations={"dev": "x.json"}))
    assert "their sum must be below 1" in _faults(csv="c.csv", val_fraction=0.6, test_fraction=0.4)[0]
    assert "negative" in _faults(csv="c.csv", seed=-1)[0]
    assert "did you mean caption_column" in _faults(csv="c.csv", caption_colum="x")[0]


def test_a_broken_picture_is_named_when_it_is_met(photos):
    (photos / "p0.png").write_bytes(b"no picture")
    _write(photos / "train.json", _rows([0]))
    dataset = _build(root=str(photos), annotations={"train": "train.json"})["train"]
    with pytest.raises(UserError, match=r"p0\.png: no readable picture"):
        dataset[0]


def test_flickr8k(shared_folder):
    root = shared_folder / "data/flickr8k"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    found = _build(root=str(root), annotations={"train": "train.json", "val": "val.json"})
    assert len(found["train"]) == 30000 and len(found["train"].img_ids) == 6000
    assert len(found["val"]) == 1000 and len(found["val"].text) == 5000
    assert torch.isfinite(found["val"][0]["image"]).all()
