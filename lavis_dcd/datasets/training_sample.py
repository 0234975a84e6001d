"""Some pictures of a training set in the shape of an evaluation set: what a model knows of what it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lavis_dcd.common.seeding import seed_for
from lavis_dcd.datasets.tree import plain_sets

Processor = Callable[[Any], Any]


class TrainingSample(Dataset[Any]):
    """Pictures of a training set, drawn by a seed, in LAVIS's retrieval evaluation shape.

    The first captions of a picture are its own; the pictures stand in the training set's order.

    Args:
        training: a LAVIS retrieval training set, or wrappers and concatenations of such.
        pictures: how many of its distinct ones.
        captions: of a picture, at most.
        seed: of the draw.
        vis_processor, text_processor: how they are read; the training sets' own by default.

    Raises:
        ValueError: the training set has fewer pictures, or not LAVIS's shape.
    """

    def __init__(
        self,
        training: Any,
        pictures: int,
        captions: int,
        seed: int,
        vis_processor: Processor | None = None,
        text_processor: Processor | None = None,
    ) -> None:
        self._plain = plain_sets(training, "train")
        self.vis_processor, self.text_processor = vis_processor, text_processor
        drawn = _drawn(_rows_by_picture(self._plain), pictures, seed)
        self.places = [rows[0] for rows in drawn]
        self.annotation: list[dict[str, Any]] = []
        self.text: list[str] = []
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        for number, rows in enumerate(drawn):
            of_picture = rows[:captions]
            written = [self._plain[name].annotation[row]["caption"] for name, row in of_picture]
            first = self._plain[rows[0][0]].annotation[rows[0][1]]
            self.annotation.append({"image": first["image"], "caption": written})
            self.img2txt[number] = list(range(len(self.text), len(self.text) + len(written)))
            self.txt2img.update(dict.fromkeys(self.img2txt[number], number))
            self.text += [self._reader(name)(caption) for (name, _), caption in zip(of_picture, written, strict=True)]

    def _reader(self, name: str) -> Processor:
        return self.text_processor or self._plain[name].text_processor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, row = self.places[index]
        plain = self._plain[name]
        if self.vis_processor is not None:
            plain = copy.copy(plain)
            plain.vis_processor = self.vis_processor
        return {"image": plain[row]["image"], "index": index}


def _rows_by_picture(sets: dict[str, Any]) -> list[list[tuple[str, int]]]:
    """Return the places of each distinct picture's rows, (set, row), in the order in which they come."""
    by_picture: dict[int, list[tuple[str, int]]] = {}
    for name, plain in sets.items():
        if not (hasattr(plain, "annotation") and hasattr(plain, "img_ids")):
            raise ValueError(f"{name} ({type(plain).__name__}) has not LAVIS's shape (annotation and img_ids)")
        for row, entry in enumerate(plain.annotation):
            by_picture.setdefault(plain.img_ids[entry["image_id"]], []).append((name, row))
    return list(by_picture.values())


def _drawn(of_pictures: list[list[tuple[str, int]]], count: int, seed: int) -> list[list[tuple[str, int]]]:
    if len(of_pictures) < count:
        raise ValueError(f"it has {len(of_pictures):,} pictures, fewer than {count:,}")
    drawn = np.random.default_rng(seed_for(seed, "training sample")).permutation(len(of_pictures))[:count]
    return [of_pictures[number] for number in sorted(drawn.tolist())]
