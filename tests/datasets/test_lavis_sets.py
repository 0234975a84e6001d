"""LAVIS's own retrieval sets through the opener: the same items, bit for bit, and no program started."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.lavis_sets import OpenedRetrievalEvalSet, OpenedRetrievalSet, with_opener
from lavis_dcd.datasets.views import View, evaluation_view, with_views
from lavis_dcd.tasks import dcd_retrieval
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask


def made(name: str, **keys):
    return registry.get_processor_class(name).from_config(OmegaConf.create({"name": name, **keys}))


IMAGE, TEXT = made("blip_image_eval", image_size=16), made("blip_caption")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # which LAVIS does not heed
    for number in range(4):
        Image.fromarray(draw.integers(0, 256, (20, 30, 4), np.uint8)).save(tmp_path / f"{number}.png", exif=exif)
    rows = [{"image": f"{n}.png", "caption": f"picture {n}", "image_id": n} for n in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "val.json").write_text(json.dumps([{**row, "caption": [row["caption"]]} for row in rows]))
    return tmp_path


def sets(photos: Path) -> tuple[RetrievalDataset, RetrievalEvalDataset]:
    return (
        RetrievalDataset(IMAGE, TEXT, str(photos), [photos / "train.json"]),
        RetrievalEvalDataset(IMAGE, TEXT, str(photos), [photos / "val.json"]),
    )


def test_items_are_lavis_own(photos):
    for source in sets(photos):
        opened = with_opener(source)
        assert isinstance(opened, type(source)) and type(opened) in (OpenedRetrievalSet, OpenedRetrievalEvalSet)
        assert len(opened) == len(source) == 4 and opened.annotation is source.annotation
        for index in range(4):
            ours, theirs = opened[index], source[index]
            assert ours.keys() == theirs.keys()
            assert torch.equal(ours.pop("image"), theirs.pop("image")) and ours == theirs


def test_concatenations_views_and_loaders_keep_it(photos):
    train, val = sets(photos)
    both = with_opener(ConcatDataset([train, train]))
    assert type(both) is ConcatDataset and all(type(plain) is OpenedRetrievalSet for plain in both.datasets)
    viewed = with_views(both, {"teacher": View(vis_train=made("blip_image_eval", image_size=8))})
    (batch,) = DataLoader(viewed, batch_size=8, num_workers=1, collate_fn=viewed.collater)
    assert torch.equal(batch["image"]["student"], torch.stack([train[i % 4]["image"] for i in range(8)]))
    assert batch["image"]["teacher"].shape == (8, 3, 8, 8)
    seen = evaluation_view(with_opener(val), View(vis_eval=made("blip_image_eval", image_size=8)))
    assert type(seen) is OpenedRetrievalEvalSet and seen[1]["image"].shape == (3, 8, 8)


def test_sets_with_a_reading_of_their_own_stay(photos):
    class Own(RetrievalDataset):
        def __getitem__(self, index: int) -> int:
            return index

    own = Own(IMAGE, TEXT, str(photos), [photos / "train.json"])
    assert with_opener(own) is own
    other = SimpleNamespace(dataset=SimpleNamespace(annotation=[]))
    assert with_opener(other) is other


def test_neither_a_program_nor_a_fifo_is_opened_even_unverified(photos, monkeypatch):
    (photos / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    (photos / "2.png").unlink()
    (photos / "2.png").symlink_to("/dev/zero")
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:-300])
    train, val = sets(photos)
    monkeypatch.setattr(
        dcd_retrieval.BaseTask, "build_datasets", lambda self, cfg: {"coco_retrieval": {"train": train, "val": val}}
    )  # fmt: skip
    found = DcdRetrievalTask().build_datasets(SimpleNamespace(run_cfg={"verify": "off"}))["coco_retrieval"]
    for dataset in found.values():
        assert dataset[0]["image"].shape == (3, 16, 16)
        for index, reason in ((1, "EPS, none of"), (2, "it is a device"), (3, "image file is truncated")):
            with pytest.raises(UserError) as caught:
                dataset[index]
            assert caught.value.faults[0].startswith(f"{photos}/{index}.png: no readable picture ({reason}")


def test_a_picture_that_the_processor_refuses_is_named(photos):
    raw = struct.pack("<IHHI", 0, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2, 400, 1, 24, 0, 0, 0, 0, 0, 0)
    (photos / "0.png").write_bytes(b"BM" + raw + bytes(8 * 400))
    train, _ = sets(photos)
    train.set_processors(made("dcd_image_eval", image_size=1000, resize="crop"), TEXT)
    with pytest.raises(UserError, match=r"^0\.png: a picture of 2 x 400 pixels would be scaled to 200000 x 1000, "):
        with_opener(train)[0]
