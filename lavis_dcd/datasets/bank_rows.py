"""What stands in each row of a retrieval set, without decoding a picture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lavis_dcd.common.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Keys of the pictures, one per row of the set, and its captions (one per row in training sets)."""

    pictures: list[str]
    captions: list[str]


def is_evaluation_set(dataset: Any) -> bool:
    """Whether the set has LAVIS's retrieval evaluation shape: captions apart from the pictures."""
    return hasattr(dataset, "text") and hasattr(dataset, "img2txt")


def read_rows(dataset: Any, name: str) -> Rows:
    """The rows of a LAVIS retrieval set, for training or evaluation.

    A picture's key is its path; where the set reads no files, the picture's name in the set ``name``.

    Raises:
        UserError: the set has neither shape.
    """
    annotation = getattr(dataset, "annotation", None)
    evaluation = is_evaluation_set(dataset)
    if not annotation or (not evaluation and not hasattr(dataset, "img_ids")):
        raise UserError(
            f"run.cache_features: the data set {name!r} ({type(dataset).__name__}) is not of LAVIS's "
            "retrieval shape (annotation, and img_ids or text); set run.cache_features=off"
        )
    root = getattr(dataset, "vis_root", None)
    scope = str(root) if root and os.path.isdir(root) else f"{name}:"
    pictures = [os.path.join(scope, str(row["image"])) for row in annotation]
    if evaluation:
        return Rows(pictures, list(dataset.text))
    return Rows(pictures, [dataset.text_processor(row["caption"]) for row in annotation])
