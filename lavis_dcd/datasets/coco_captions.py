"""`coco_captions`: COCO's official caption files, checked row by row, then indexed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.texts import shown, visible
from lavis_dcd.datasets.annotations import (
    SPLITS,
    Faults,
    Row,
    Split,
    evaluation_rows,
    half_fault,
    kind_of,
    load_json,
    path_below,
    place,
    training_rows,
)
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

    annotations: dict[Split, str | None]
    images: dict[Split, str | None]
    root: str | None = None
    only_existing: bool = False

    def __post_init__(self) -> None:
        files, folders = self.splits(), {split for split in SPLITS if self.images.get(split)}
        if not files:
            raise ValueError("annotations: give a caption file for one of train, val, test")
        if missing := [split for split in files if split not in folders]:
            raise ValueError(f"images: no folder for {', '.join(missing)}")

    def splits(self) -> list[Split]:
        """The splits that have a caption file."""
        return [split for split in SPLITS if self.annotations.get(split)]

    def paths(self, split: Split) -> tuple[Path, Path]:
        """The caption file of a split that has one, and the folder of its pictures."""
        file, folder = self.annotations[split], self.images[split]
        if file is None or folder is None:
            raise ValueError(f"{split}: no caption file, or no folder")
        return place(file, self.root), place(folder, self.root)


@registry.register_builder("coco_captions")
class CocoCaptionsBuilder(RetrievalBuilder):
    """Builds one data set per caption file, see `CocoCaptionsInfo`."""

    name = "coco_captions"
    info_class = CocoCaptionsInfo
    DATASET_CONFIG_DICT = {  # noqa: RUF012
        "default": str(packaged_folder("configs") / "datasets/coco_captions/defaults.yaml")
    }

    @classmethod
    @override
    def file_faults(cls, info: CocoCaptionsInfo, path: str) -> list[str]:
        found = []
        for split in info.splits():
            file, folder = info.paths(split)
            if not os.path.isfile(file):
                found.append(f"{path}.annotations.{split}: {file} does not exist; COCO's caption files come from "
                             "https://cocodataset.org/#download")  # fmt: skip
            if not os.path.isdir(folder):
                found.append(f"{path}.images.{split}: {folder} is not a folder")
        return found

    @override
    def read(self, info: CocoCaptionsInfo) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        contents: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        faults: list[str] = []
        for split in info.splits():
            file, folder = info.paths(split)
            try:
                rows = read_coco(file, folder)
                rows = _existing(rows, folder) if info.only_existing else rows
            except UserError as error:
                faults += error.faults
                continue
            contents[split] = (str(folder), (training_rows if split == "train" else evaluation_rows)(rows))
        if faults:
            raise UserError(faults)
        return contents


def read_coco(file: Path, folder: Path | None = None) -> list[Row]:
    """The captions of one official file, by picture (ascending id), then by caption id.

    Args:
        folder: of the pictures, which no file_name may leave; by default the file's own.

    Raises:
        UserError: the file is missing, no JSON, or no caption file of COCO's; all faulty rows are listed.
    """
    content = _content(file)
    faults = Faults(file)
    paths = _names(content["images"], (folder or file.parent).absolute(), faults)
    _check_captions(content["annotations"], paths, faults)
    faults.raise_any()
    names = {image_id: path for image_id, path in paths.items() if path is not None}
    captions = _indexed(content).imgToAnns
    rows, empty, without = [], 0, 0
    for image_id in sorted(names, key=_by_number):
        of_image = sorted(captions.get(image_id, []), key=lambda caption: _by_number(caption["id"]))
        texts = [caption["caption"] for caption in of_image if visible(caption["caption"]).strip()]
        rows += [Row(names[image_id], text, image_id) for text in texts]
        empty += len(of_image) - len(texts)
        without += not of_image
    if empty:
        log.warning("%s: %d empty captions are left out", file, empty)
    if not rows:
        raise UserError(f"{file}: holds no caption of its pictures")
    if without:
        log.warning("%s: %d of %d pictures have no caption and are left out", file, without, len(names))
    return rows


def _by_number(key: str | int) -> tuple[bool, str | int]:
    return isinstance(key, str), key


def _indexed(content: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO  # noqa: PLC0415  slow, and needed by these files only

    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco


def _content(file: Path) -> dict[str, Any]:
    content = load_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: not in COCO's format: it holds {kind_of(content)}, expected an object with images "
                        "and annotations")  # fmt: skip
    wrong = [section for section in ("images", "annotations") if not isinstance(content.get(section), list)]
    if wrong:
        raise UserError(f"{file}: not in COCO's format: no list of {' and '.join(wrong)}")
    keys = {"images": "file_name", "annotations": "caption"}
    rows = {section: [row for row in content[section] if isinstance(row, dict)] for section in keys}
    lacking = [f"{section}.{key}" for section, key in keys.items()
               if rows[section] and not any(key in row for row in rows[section])]  # fmt: skip
    if lacking:
        raise UserError(f"{file}: is no caption file of COCO's ({', '.join(lacking)} missing); "
                        "expected one such as captions_val2017.json")  # fmt: skip
    return content


def _names(images: list[Any], folder: Path, faults: Faults) -> dict[str | int, str | None]:
    """The pictures' paths below `folder` by id; None with a fault noted."""
    names: dict[str | int, str | None] = {}
    for number, image in enumerate(images):
        where = f"images[{number}]"
        image_id = _id_of(image, ("id", "file_name"), where, faults)
        if image_id is None:
            continue
        if image_id in names:
            faults.add(where, f"id: {shown(image_id)} stands there twice; give each picture an id of its own")
        names[image_id] = path_below(image["file_name"], "file_name", where, folder, faults)
    return names


def _check_captions(annotations: list[Any], names: dict[str | int, Any], faults: Faults) -> None:
    seen = set()
    for number, caption in enumerate(annotations):
        where = f"annotations[{number}]"
        caption_id = _id_of(caption, ("id", "image_id", "caption"), where, faults)
        if caption_id is None:
            continue
        image_id, text = caption["image_id"], caption["caption"]
        if caption_id in seen:
            faults.add(where, f"id: {shown(caption_id)} stands there twice; give each caption an id of its own")
        elif not _is_id(image_id) or image_id not in names:
            faults.add(where, f"image_id: {shown(image_id)} is the id of none of the images; put the picture's entry "
                              "in, or take the caption out")  # fmt: skip
        elif not isinstance(text, str):
            faults.add(where, f"caption: {kind_of(text)}, expected text")
        elif fault := half_fault(text):
            faults.add(where, f"caption: {fault}")
        seen.add(caption_id)


def _id_of(row: Any, keys: tuple[str, ...], where: str, faults: Faults) -> str | int | None:
    """The row's id; None with a fault noted where it has none, or lacks one of the keys."""
    if not isinstance(row, dict):
        faults.add(where, f"{kind_of(row)}, expected an object with {', '.join(keys)}")
    elif absent := [key for key in keys if key not in row]:
        faults.add(where, f"{' and '.join(absent)} missing (has {', '.join(row) or 'nothing'})")
    elif not _is_id(row["id"]):
        faults.add(where, f"id: {kind_of(row['id'])}, expected an integer or text")
    else:
        return row["id"]
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _existing(rows: list[Row], folder: Path) -> list[Row]:
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: not readable as a folder: {error.strerror}") from error
    there |= {row.image for row in rows if "/" in row.image and os.path.isfile(folder / row.image)}
    existing = [row for row in rows if row.image in there]
    if not existing:
        raise UserError(f"{folder}: holds none of the {len({row.image for row in rows})} pictures of the captions")
    absent = {row.image for row in rows} - there
    if absent:
        log.warning("%s: %d pictures are not there and are left out (only_existing), %d are kept",
                    folder, len(absent), len({row.image for row in existing}))  # fmt: skip
    return existing
