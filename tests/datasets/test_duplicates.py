"""Files of equal content in two splits: which are found, and how little is read for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lavis_dcd.datasets import duplicates
from lavis_dcd.datasets.duplicates import equal_files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    whole = bytes(range(256)) * 64
    contents = {
        "a": whole, "b": b"other" + whole[5:], "c": b"shorter", "d": whole[:-1] + b"!",
        "copy of a": whole, "copy of c": b"shorter", "empty": b"", "empty too": b"",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link to a").symlink_to("a")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def found(folder: Path, most: int = duplicates.MOST_COMPARED, **splits: list[str]) -> dict[tuple[str, str], Any]:
    pairs = equal_files({split: paths(folder, *names) for split, names in splits.items()}, most)
    return {key: [tuple(os.path.basename(path) for path in pair) for pair in of] for key, of in pairs.items()}


def test_equal_contents_under_two_names(files):
    train, val, test = ["a", "b", "c", "fifo", "empty"], ["d", "copy of a", "none"], ["copy of c", "link to a"]
    assert found(files, train=train, val=val, test=[*test, "empty too", "a"]) == {
        ("train", "val"): [("a", "copy of a")],
        # a itself is in both by its name
        ("train", "test"): [("a", "link to a"), ("c", "copy of c")],
        ("val", "test"): [("copy of a", "a"), ("copy of a", "link to a")],
    }


def test_one_split_or_one_name_is_none(files):
    assert found(files, train=["a", "copy of a"], val=["b", "c"]) == {}
    assert found(files, train=["a", "a", "b"], val=["a"]) == {}
    assert found(files) == {}


def test_only_files_of_equal_size_and_end_are_read_whole(files, monkeypatch):
    whole, ends = [], []
    real, real_end = duplicates.picture_sha256, duplicates._end
    monkeypatch.setattr(duplicates, "picture_sha256", lambda path: whole.append(Path(path).name) or real(path))
    monkeypatch.setattr(duplicates, "_end", lambda path: ends.append(Path(path).name) or real_end(path))
    assert found(files, train=["a", "c"], val=["b", "d"]) == {}
    assert sorted(ends) == ["a", "b", "d"] and sorted(whole) == ["a", "b"]  # c has a size of its own


def test_the_reading_is_bounded(files, caplog):
    (files / "x").write_bytes(b"shorter")
    with caplog.at_level(logging.INFO, "lavis_dcd"):
        assert found(files, most=20, train=["c", "a"], val=["x", "copy of a"]) == {("train", "val"): [("c", "x")]}
    assert caplog.messages == ["of 2 groups of files that may be equal, 1 are compared, the rest is too much to read"]
