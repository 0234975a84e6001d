"""LAVIS's own builders read local files unchanged, with this package's processors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_dcd.datasets.pictures import verify_pictures
from lavis_dcd.datasets.random_captions import RandomCaptions


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures under images/ with train.json, val.json and test.json in LAVIS's layout."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    train = [{"image": f"{i}.png", "caption": f"Picture  {i}, said {k}!", "image_id": f"p_{i}"}
             for i in range(4) for k in range(2)]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(train))
    for split, i in (("val", 4), ("test", 5)):
        rows = [{"image": f"{i}.png", "caption": [f"{split} one", f"{split} two"]}]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return tmp_path


def build(name: str, folder: Path) -> dict:
    builder = registry.get_builder_class(name)
    default = OmegaConf.load(builder.default_config_path()).datasets[name]
    files = {split: str(folder / f"{split}.json") for split in ("train", "val", "test")}
    ours = {
        "vis_processor": {
            "train": {"name": "dcd_image_train", "image_size": 16},
            "eval": {"name": "dcd_image_eval", "image_size": 16},
        },
        "text_processor": {"train": {"name": "dcd_caption"}, "eval": {"name": "dcd_caption", "lower": True}},
        "build_info": {
            # LAVIS copies a local file named as url, and leaves it where it already is
            "annotations": {split: {"url": file, "storage": file} for split, file in files.items()},
            "images": {"storage": str(folder / "images")},
        },
    }
    return builder(OmegaConf.merge(default, ours)).build_datasets()


@pytest.mark.parametrize("name", ["flickr30k", "coco_retrieval"])
def test_samples_batches_and_tables(name, photos, offline):
    found = build(name, photos)
    assert set(found) == {"train", "val", "test"}
    train = found["train"]
    assert len(train) == 8
    sample = train[3]
    assert sample["text_input"] == "Picture 1, said 1!"
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32
    batch = train.collater([train[i] for i in range(4)])
    assert batch["image"].shape == (4, 3, 16, 16)
    ids = torch.as_tensor(batch["image_id"])
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert found["val"].text == ["val one", "val two"]
    assert found["test"].img2txt == {0: [0, 1]} and found["test"].txt2img == {0: 0, 1: 0}


@pytest.mark.parametrize("name", ["flickr30k", "coco_retrieval"])
def test_verification_and_random_captions_take_them(name, photos, offline):
    found = build(name, photos)
    for dataset in found.values():
        verify_pictures(dataset, "full")
    sample = RandomCaptions(found["train"], 6, seed=0)[0]
    expected = {f"Picture {i}, said {k}!" for i in (1, 2, 3) for k in range(2)}
    assert set(sample["candidate_text"]) == expected
