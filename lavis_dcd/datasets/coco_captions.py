"""`coco_captions`: COCO's official caption files, read by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavis.common.registry import registry

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.datasets.annotations import SPLITS, Faults, Row, evaluation_rows, kind_of, place, training_rows
from lavis_dcd.datasets.builder import RetrievalBuilder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoCaptionsInfo:
    """`build_info` of `coco_captions`.

    Args:
        root: where relative paths start if they are there; else, and with null, the current folder.
        annotations: a caption file per split, such as captions_train2017.json.
        images: the folder of the pictures per split, such as train2017.
        only_existing: leave out pictures that are not in the folder, with a warning that counts them; false keeps
            them, and the check at the start (run.verify) lists them.
    """

    annotations: dict[Literal["train", "val", "test"], str | None]
    images: dict[Literal["train", "val", "test"], str | None]
    root: str | None = None
    only_existing: bool = False

    def __post_init__(self) -> None:
        files, folders = self.splits(), {split for split in SPLITS if self.images.get(split)}
        if not files:
            raise ValueError("annotations: give a caption file for one of train, val, test")
        if missing := [split for split in files if split not in folders]:
            raise ValueError(f"images: no folder for {', '.join(missing)}")

    def splits(self) -> list[str]:
        """The splits that have a caption file."""
        return [split for split in SPLITS if self.annotations.get(split)]


@registry.register_builder("coco_captions")
class CocoCaptionsBuilder(RetrievalBuilder):
    """Builds one data set per caption file, see `CocoCaptionsInfo`."""

    name = "coco_captions"
    info_class = CocoCaptionsInfo
    DATASET_CONFIG_DICT = {  # noqa: RUF012
        "default": str(packaged_folder("configs") / "datasets/coco_captions/defaults.yaml")
    }

    @classmethod
    def file_faults(cls, info: CocoCaptionsInfo, path: str) -> list[str]:
        found = []
        for split in info.splits():
            file, folder = place(info.annotations[split], info.root), place(info.images[split], info.root)
            if not file.is_file():
                found.append(f"{path}.annotations.{split}: {file} does not exist; COCO's caption files come from "
                             "https://cocodataset.org/#download")  # fmt: skip
            if not folder.is_dir():
                found.append(f"{path}.images.{split}: {folder} is not a folder")
        return found

    def read(self, info: CocoCaptionsInfo) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        found, faults = {}, []
        for split in info.splits():
            folder = place(info.images[split], info.root)
            try:
                rows = read_coco(place(info.annotations[split], info.root))
                rows = _existing(rows, folder) if info.only_existing else rows
            except UserError as error:
                faults += error.faults
                continue
            found[split] = (str(folder), (training_rows if split == "train" else evaluation_rows)(rows))
        if faults:
            raise UserError(faults)
        return found


def read_coco(file: Path) -> list[Row]:
    """The captions of one official file, by picture (ascending id), then by caption id.

    Raises:
        UserError: the file is missing, no JSON, or no caption file of COCO's.
    """
    coco = _load(file)
    _check_texts(coco, file)
    rows = []
    for image_id in sorted(coco.imgs):
        captions = sorted(coco.imgToAnns.get(image_id, []), key=lambda caption: caption["id"])
        name = coco.imgs[image_id]["file_name"]
        rows += [Row(name, caption["caption"], image_id) for caption in captions if caption["caption"].strip()]
    if empty := sum(not caption["caption"].strip() for caption in coco.anns.values()):
        log.warning("%s: %d empty captions are left out", file, empty)
    if not rows:
        raise UserError(f"{file}: holds no caption of its pictures")
    without = sum(not coco.imgToAnns.get(image_id) for image_id in coco.imgs)
    if without:
        log.warning("%s: %d of %d pictures have no caption and are left out", file, without, len(coco.imgs))
    return rows


def _load(file: Path) -> Any:
    from pycocotools.coco import COCO

    if not file.is_file():
        raise UserError(f"{file}: does not exist")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco = COCO(str(file))
        parts = {"images": "file_name", "annotations": "caption"}
        lacking = [f"{part}.{key}" for part, key in parts.items() if any(key not in i for i in coco.dataset[part])]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from error
    except (AssertionError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not in COCO's format: {error or 'no images and annotations'}") from error
    if lacking:
        raise UserError(f"{file}: is no caption file of COCO's ({', '.join(lacking)} missing); "
                        "expected one such as captions_val2017.json")  # fmt: skip
    return coco


def _check_texts(coco: Any, file: Path) -> None:
    faults = Faults(file)
    for picture in coco.imgs.values():
        if not isinstance(picture["file_name"], str):
            faults.add(f"image {picture['id']}", f"file_name: {kind_of(picture['file_name'])}, expected text")
    for caption in coco.anns.values():
        if not isinstance(caption["caption"], str):
            faults.add(f"caption {caption['id']}", f"{kind_of(caption['caption'])}, expected text")
    faults.raise_any()


def _existing(rows: list[Row], folder: Path) -> list[Row]:
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: not readable as a folder: {error}") from error
    kept = [row for row in rows if row.image in there]
    if not kept:
        raise UserError(f"{folder}: holds none of the {len({row.image for row in rows})} pictures of the captions")
    absent = {row.image for row in rows} - there
    if absent:
        log.warning("%s: %d pictures are not there and are left out (only_existing), %d are kept",
                    folder, len(absent), len({row.image for row in kept}))  # fmt: skip
    return kept
