"""LAVIS's two retrieval data sets over rows in memory, which every reader of this package fills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
from lavis.processors.base_processor import BaseProcessor
from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line
from lavis_dcd.datasets.pictures import load_picture


def processed(dataset: Any, row: Mapping[str, Any], picture: Image.Image) -> Any:
    """What the set's processor makes of a row's picture.

    Raises:
        UserError: the processor refuses the picture, which is then named.
    """
    try:
        return dataset.vis_processor(picture)
    except UserError as error:
        raise UserError([f"{one_line(str(row['image']))}: {line}" for line in error.faults]) from error


class RetrievalRows(RetrievalDataset):
    """Training: one row per caption.

    Items: {"image": what the processor makes of the picture, "text_input": str, "image_id": int (equal for the
    captions of one picture), "instance_id": str}.

    Args:
        rows: {"image": path below `vis_root`, "caption": str, "image_id": str or int, ...}.
    """

    def __init__(
        self, vis_processor: BaseProcessor, text_processor: BaseProcessor, vis_root: str, rows: list[dict[str, Any]]
    ) -> None:
        BaseDataset.__init__(self, vis_processor, text_processor, vis_root, [])
        self.annotation = rows
        self._add_instance_ids()
        self.img_ids: dict[str | int, int] = {}
        for row in rows:
            self.img_ids.setdefault(row["image_id"], len(self.img_ids))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {
            "image": processed(self, row, load_picture(self, index)),
            "text_input": self.text_processor(row["caption"]),
            "image_id": self.img_ids[row["image_id"]],
            "instance_id": row["instance_id"],
        }


class RetrievalEvalRows(RetrievalEvalDataset):
    """Evaluation: one row per picture.

    Items: {"image", "index"}. `text`: list[str], `image`: list[str], `txt2img`: {text row: image row},
    `img2txt`: {image row: [text rows]}.

    Args:
        rows: {"image": path below `vis_root`, "caption": [str, ...], "image_id": str or int, ...}.
    """

    def __init__(
        self, vis_processor: BaseProcessor, text_processor: BaseProcessor, vis_root: str, rows: list[dict[str, Any]]
    ) -> None:
        BaseDataset.__init__(self, vis_processor, text_processor, vis_root, [])
        self.annotation = rows
        self._add_instance_ids()
        self.image: list[str] = [row["image"] for row in rows]
        self.text: list[str] = []
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            first = len(self.text)
            self.text += [text_processor(caption) for caption in row["caption"]]
            self.img2txt[index] = list(range(first, len(self.text)))
            self.txt2img.update(dict.fromkeys(self.img2txt[index], index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {"image": processed(self, row, load_picture(self, index)), "index": index}
