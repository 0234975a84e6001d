"""Identities of data sets: every change of rows and pictures shows, and nothing else does."""

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

from lavis_dcd.datasets import identity
from lavis_dcd.datasets.identity import pictures_digests, rows_digests
from lavis_dcd.datasets.tree import StandInSet, WrappedSet


class Pictures:
    def __init__(self, root, count=6):
        self.vis_root = str(root)
        self.annotation = [
            {"image": f"{i // 2}.png", "caption": f"caption {i}", "image_id": i // 2} for i in range(count)
        ]

    def __len__(self):
        return len(self.annotation)


class Drawn(Pictures):
    shade = 0

    def picture(self, index):
        return Image.new("RGB", (4, 4), (self.shade, index, 0))


@pytest.fixture
def pictures(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png", compress_level=0)
    return Pictures(tmp_path)


def test_rows_their_order_and_every_field_count(pictures):
    before = rows_digests({"train": pictures})
    for change in ({"caption": "x"}, {"image": "9.png"}, {"image_id": 99}, {"split": "new"}):
        row = dict(pictures.annotation[3])
        pictures.annotation[3] = {**row, **change}
        assert rows_digests({"train": pictures}) != before
        pictures.annotation[3] = row
    assert rows_digests({"train": pictures}) == before
    pictures.annotation.reverse()
    assert rows_digests({"train": pictures}) != before


def replaced(path, keep_time):
    facts = path.stat()
    Image.new("RGB", (8, 8), (0, 200, 0)).save(path, compress_level=0)
    assert path.stat().st_size == facts.st_size
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert path.stat().st_mtime_ns == facts.st_mtime_ns


@pytest.mark.parametrize("content", ["sample", "all"])
def test_a_picture_replaced_with_the_same_size_and_time_shows(pictures, tmp_path, content):
    before = pictures_digests({"train": pictures}, content)
    replaced(tmp_path / "1.png", keep_time=True)
    assert pictures_digests({"train": pictures}, content) != before


def test_outside_the_sample_size_and_time_are_compared_and_all_compares_everything(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SAMPLE", 2)  # the first and the last
    before, all_before = pictures_digests({"train": pictures}), pictures_digests({"train": pictures}, "all")
    replaced(tmp_path / "1.png", keep_time=True)
    assert pictures_digests({"train": pictures}) == before
    assert pictures_digests({"train": pictures}, "all") != all_before
    os.utime(tmp_path / "1.png", ns=(1, 1))
    assert pictures_digests({"train": pictures}) != before


def test_times_do_not_count_where_all_contents_do(pictures, tmp_path):
    before, sample_before = pictures_digests({"train": pictures}, "all"), pictures_digests({"train": pictures})
    os.utime(tmp_path / "1.png", ns=(1, 1))
    assert pictures_digests({"train": pictures}, "all") == before
    assert pictures_digests({"train": pictures}) != sample_before


def test_missing_files_folders_and_pipes_are_told_apart_without_a_wait(pictures, tmp_path):
    seen = [pictures_digests({"train": pictures})]
    (tmp_path / "1.png").unlink()
    seen.append(pictures_digests({"train": pictures}))
    os.mkfifo(tmp_path / "1.png")
    seen.append(pictures_digests({"train": pictures}))
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_drawn_pictures_count_by_what_is_drawn(tmp_path):
    drawn = Drawn(tmp_path)
    before = pictures_digests({"train": drawn})
    drawn.shade = 1
    assert pictures_digests({"train": drawn}) != before


def test_wrappers_and_stand_ins_are_the_sets_inside_them(pictures, tmp_path):
    plain = rows_digests({"train": pictures}), pictures_digests({"train": pictures})
    for wrapped in (WrappedSet(pictures), StandInSet(pictures), WrappedSet(StandInSet(pictures))):
        assert (rows_digests({"train": wrapped}), pictures_digests({"train": wrapped})) == plain
    joined = ConcatDataset([pictures, Drawn(tmp_path)])
    assert list(rows_digests({"train": joined, "val": None})) == ["train.0", "train.1"]


def test_no_common_generator_moves(pictures, tmp_path):
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    rows_digests({"a": pictures, "b": Drawn(tmp_path)})
    pictures_digests({"a": pictures, "b": Drawn(tmp_path)})
    assert states == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
