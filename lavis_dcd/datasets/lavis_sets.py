"""LAVIS's own retrieval sets (`coco_retrieval`, `flickr30k`), their pictures opened by this package's opener.

LAVIS's code opens them with `Image.open`, which tries every format that Pillow has. Pixels stay LAVIS's: neither
turned as EXIF says nor laid on white.
"""

from __future__ import annotations

import os
from typing import Any

from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
from PIL import Image
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.opener import open_picture, reason_of
from lavis_dcd.datasets.pictures import unreadable
from lavis_dcd.datasets.rows import processed
from lavis_dcd.datasets.tree import plain_sets, replace_plain_sets


class OpenedRetrievalSet(RetrievalDataset):
    """LAVIS's training set; items as there."""

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {
            "image": processed(self, row, _picture(self, row)),
            "text_input": self.text_processor(row["caption"]),
            "image_id": self.img_ids[row["image_id"]],
            "instance_id": row["instance_id"],
        }


class OpenedRetrievalEvalSet(RetrievalEvalDataset):
    """LAVIS's evaluation set; items as there."""

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {"image": processed(self, row, _picture(self, row)), "index": index}


_OPENED: dict[type[Any], type[Any]] = {
    RetrievalDataset: OpenedRetrievalSet,
    RetrievalEvalDataset: OpenedRetrievalEvalSet,
}


def with_opener(dataset: Any) -> Any:
    """Return the set with LAVIS's own retrieval sets in it replaced by ones of the same content that open as we do.

    Subclasses and other sets, which have a reading of their own, stay as they are.
    """
    if not any(type(plain) in _OPENED for plain in plain_sets(dataset, "").values()):
        return dataset
    return replace_plain_sets(dataset, "", lambda _, plain: _opened(plain))


def _opened(plain: Any) -> Any:
    cls = _OPENED.get(type(plain))
    if cls is None:
        return plain
    twin = object.__new__(cls)
    vars(twin).update(vars(plain))
    return twin


def _picture(dataset: Any, row: dict[str, Any]) -> Image.Image:
    path = os.path.join(dataset.vis_root, row["image"])
    try:
        with open_picture(path) as opened:
            return opened.convert("RGB")
    except Exception as error:  # PIL's readers of damaged files raise a dozen kinds of errors, which name no file
        raise UserError(unreadable(path, reason_of(error))) from error
