"""Read pictures without captions and texts without pictures, collecting every fault with its file and row."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.annotations import Faults, caption_fault, kind_of, load_json, path_below, text_of
from lavis_dcd.datasets.coco_captions import read_coco
from lavis_dcd.datasets.opener import formats_read

log = logging.getLogger(__name__)


def read_pictures(source: Path, root: Path) -> list[str]:
    """Return the pictures of one source, as paths below ``root`` with forward slashes, each once.

    Args:
        source: a folder, all of whose pictures count, by name, those in its folders too; or a JSON file: LAVIS's list
            of ``{"image": ...}``, whatever else its rows say, a list of paths, or COCO's object with ``images``.
        root: the folder that all pictures lie below.

    Raises:
        UserError: the source is not there, of another form, holds no picture, or pictures outside ``root``; all faulty
            rows are listed.
    """
    faults = Faults(source)
    names = _folder_pictures(source, faults) if os.path.isdir(source) else _listed_pictures(source, faults)
    paths = [path_below(name, "image", where, root, faults) for where, name in names]
    faults.raise_any()
    if not paths:
        raise UserError(f"{source}: holds no picture")
    return list(dict.fromkeys(path for path in paths if path is not None))


def _folder_pictures(folder: Path, faults: Faults) -> Iterator[tuple[str, Any]]:
    """Yield (name, absolute path) of the files whose names end as pictures' do, in the order of their names."""
    formats = formats_read()
    endings = {ending for ending, form in Image.registered_extensions().items() if form in formats}
    others = 0

    def note(error: OSError) -> None:
        faults.add(str(error.filename), f"not readable as a folder: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            if os.path.splitext(name)[1].lower() in endings:
                yield name, os.path.join(parent, name)
            else:
                others += 1
    if others:
        log.info("%s: %d files are left out, whose names do not end as a picture's do", folder, others)


def _listed_pictures(file: Path, faults: Faults) -> Iterator[tuple[str, Any]]:
    """Yield (place, path) of each picture that a JSON file names."""
    content, key, words = load_json(file), "image", "row"
    if isinstance(content, dict):
        content, key, words = content.get("images"), "file_name", "images"
    if not isinstance(content, list):
        raise UserError(f'{file}: holds no list of pictures; expected [{{"image": ...}}, ...], a list of paths, or '
                        "COCO's object with images")  # fmt: skip
    for number, item in enumerate(content):
        where = f"{words} {number}"
        if isinstance(item, str):
            yield where, item
        elif isinstance(item, dict) and key in item:
            yield where, item[key]
        else:
            faults.add(where, f"{kind_of(item)}, expected a path or an object with {key}")


def read_texts(file: Path) -> list[str]:
    """Return the texts of one file in their order; one that stands there several times comes as often.

    Args:
        file: a JSON file: a list of texts, LAVIS's list of ``{"caption": text or texts}``, whatever else its rows say,
            or COCO's captions; else a UTF-8 file with one text a line, whose blank lines are left out.

    Raises:
        UserError: the file is missing, of another form, or holds no text; all faulty rows are listed.
    """
    if file.suffix.lower() == ".json":
        content = load_json(file)
        if isinstance(content, dict):
            return [row.caption for row in read_coco(file)]
        if not isinstance(content, list):
            raise UserError(f'{file}: holds {kind_of(content)}, expected a list of texts, of {{"caption": ...}} rows, '
                            "or COCO's object with annotations")  # fmt: skip
        named = list(_listed_texts(content))
    else:
        lines = text_of(file, "text").split("\n")
        named = [(f"line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    faults = Faults(file)
    for where, text in named:
        if fault := caption_fault(text):
            faults.add(where, f"text: {fault}")
    faults.raise_any()
    if not named:
        raise UserError(f"{file}: holds no text")
    return [text for _, text in named]


def _listed_texts(content: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (place, text) of each text, faulty ones included."""
    for number, item in enumerate(content):
        texts = item.get("caption") if isinstance(item, dict) else item
        for text in texts if isinstance(texts, list) else [texts]:
            yield f"row {number}", text
