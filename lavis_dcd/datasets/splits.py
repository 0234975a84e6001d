"""Splits: drawn by picture, checked against each other, and put side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line
from lavis_dcd.datasets.duplicates import equal_files
from lavis_dcd.datasets.pictures import MakesPictures
from lavis_dcd.datasets.tree import annotation_rows, plain_sets

log = logging.getLogger(__name__)


def split_by_picture(pictures: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> dict[str, str]:
    """{picture: "train" | "val" | "test"}, the same for the same pictures and seed in any order.

    Args:
        pictures: names; repeated ones count once.
        val_fraction, test_fraction: of the distinct pictures; above 0 they get at least one.

    Raises:
        UserError: too few pictures for the splits asked for.
    """
    names = sorted(set(pictures))
    sizes = {"val": _size(val_fraction, len(names)), "test": _size(test_fraction, len(names))}
    train = len(names) - sum(sizes.values())
    if train < 1:
        raise UserError(
            f"{len(names)} pictures are too few for val_fraction={val_fraction} and test_fraction={test_fraction}: "
            "none is left for training"
        )
    mixed = np.random.default_rng([seed, 21]).permutation(len(names))
    splits = ["val"] * sizes["val"] + ["test"] * sizes["test"] + ["train"] * train
    return {names[row]: split for row, split in zip(mixed, splits, strict=True)}


def _size(fraction: float, count: int) -> int:
    return max(1, round(fraction * count)) if fraction > 0 else 0


def check_annotations(datasets: Mapping[str, Any], contents: bool = True) -> list[str]:
    """One warning, also logged, per pair of splits that share pictures, and per pair that shares them by content.

    Args:
        datasets: {split: LAVIS data set}, wrappers and concatenations included.
        contents: also compare the files' contents, which finds a picture under two names; see `equal_files` for how
            much is read.
    """
    pictures = {split: _pictures(dataset) for split, dataset in datasets.items()}
    warnings = []
    for one, two in combinations(pictures, 2):
        shared = sorted(pictures[one] & pictures[two])
        if shared:
            some = ", ".join(map(one_line, shared[:3])) + (", ..." if len(shared) > 3 else "")
            warnings.append(f"{len(shared)} pictures are in both {one} and {two}: {some}; {_way_out(one, two)}")
    files = {split: sorted(_files(dataset)) for split, dataset in datasets.items()} if contents else {}
    for (one, two), pairs in equal_files(files).items():
        some = ", ".join(f"{one_line(second)} (there {one_line(first)})" for first, second in pairs[:3])
        some += ", ..." if len(pairs) > 3 else ""
        warnings.append(f"{len(pairs)} pictures of {two} are in {one} under other names: {some}; {_way_out(one, two)}")
    for line in warnings:
        log.warning(line)
    return warnings


def _way_out(one: str, two: str) -> str:
    return "take them out of one" + (f", or {two} measures what was trained on" if one == "train" else "")


def _files(dataset: Any) -> set[str]:
    return {
        _file(plain, row)
        for plain, row in annotation_rows(dataset)
        if getattr(plain, "vis_root", None) is not None and not isinstance(plain, MakesPictures)
    }


def _pictures(dataset: Any) -> set[str]:
    return {_file(plain, row) for plain, row in annotation_rows(dataset)}


def _file(plain: Any, row: Mapping[str, Any]) -> str:
    return os.path.normpath(os.path.join(getattr(plain, "vis_root", None) or "", str(row["image"])))


def distinct_image_ids(datasets: Sequence[Any]) -> None:
    """Renumber the `img_ids` of LAVIS training sets in place, so that they can be concatenated.

    Every LAVIS set numbers its pictures from 0. Side by side, pictures of two sets would share an `image_id` and be
    taken for one picture. A file that stands in several sets keeps one number. Doing it twice changes nothing.

    Args:
        datasets: sets with `annotation`, `vis_root` and `img_ids`, or wrappers of such; others are left alone.
    """
    numbers: dict[str, int] = {}
    for plain in (plain for dataset in datasets for plain in plain_sets(dataset, "").values()):
        if not hasattr(plain, "img_ids"):
            continue
        number_of: dict[Any, int] = {}
        for row in plain.annotation:
            number = numbers.setdefault(_file(plain, row), len(numbers))
            # one image_id may stand for several files (crops of one picture): the first one's number serves all
            number_of.setdefault(row["image_id"], number)
        plain.img_ids.update(number_of)
