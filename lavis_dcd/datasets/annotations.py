"""Read a user's captions from JSON or CSV, collecting every fault with its file and row."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import half_character, one_line, shown, visible

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SPLIT_WORDS = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_NAMED = 20  # faults of one file named one by one; the rest is counted


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file cannot be read, is no UTF-8 text (a byte order mark may stand before it), or no JSON.
    """
    text = text_of(path, "JSON")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path}: not readable as JSON: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def text_of(path: Path, kind: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        kind: what the file should be, for messages: "JSON".

    Raises:
        UserError: it is missing, a folder, empty, not readable, or not UTF-8.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, expected a {kind} file")
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {getattr(error, 'strerror', None) or error}") from error
    if not raw.strip():
        raise UserError(f"{path}: is empty")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]:
        raise UserError(f"{path}: not readable as {kind}: it is UTF-16 text or no text; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: not readable as {kind}: byte 0x{raw[error.start]:02x} in line {line} is not UTF-8; "
            "save the file as UTF-8"
        ) from error


def kind_of(value: Any) -> str:
    """The kind of a JSON file's value, in a user's words."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity"}.get(str(value), "-Infinity")
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false",
             type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


@dataclass(frozen=True)
class Row:
    """One caption of one picture.

    Args:
        image: path below the root, with forward slashes.
        caption: as written.
        image_id: shared by the captions of one picture; its path where the file gives none.
    """

    image: str
    caption: str
    image_id: str | int


class Faults:
    """The faults of one file: the first twenty in words, the others as a number."""

    def __init__(self, file: Path) -> None:
        self.file, self._more = file, 0
        self._lines: list[str] = []

    def add(self, where: str, what: str) -> None:
        """One fault at a row."""
        if len(self._lines) < _NAMED:
            self._lines.append(f"{self.file}, {one_line(where)}: {one_line(what)}")
        else:
            self._more += 1

    def lines(self) -> list[str]:
        """One line per fault, and one for the count of those left out."""
        return [*self._lines, f"{self.file}: {self._more} more faults"] if self._more else list(self._lines)

    def raise_any(self) -> None:
        """Raise a `UserError` when there is a fault."""
        if self._lines:
            raise UserError(self.lines())


def place(path: str, root: str | None) -> Path:
    """The absolute path for one of the configuration: below `root` if it is there, else in the current folder."""
    given = home_expanded(path)
    if root is not None and not given.is_absolute() and os.path.exists(inside := home_expanded(root) / given):
        return inside.absolute()
    return given.absolute()


def home_expanded(path: str) -> Path:
    """The path with a leading ~ filled in; one of a user that there is not stays as it is."""
    return Path(os.path.expanduser(path))


def read_json(path: Path, root: Path) -> list[Row]:
    """The captions in one LAVIS JSON file.

    Accepts a list of {"image": path, "caption": text or list of texts, "image_id": optional}; a picture may have
    one row with all its captions or one row per caption.

    Raises:
        UserError: the file is missing, no JSON, no list, or has faulty rows; all of them listed.
    """
    content = load_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: holds {kind_of(content)}, expected a list of "
                        '{"image": ..., "caption": ...} rows')  # fmt: skip
    if not content:
        raise UserError(f"{path}: the list is empty")
    faults = Faults(path)
    rows = [row for number, item in enumerate(content) for row in _json_rows(item, f"row {number}", root, faults)]
    _check_ids(rows, faults)
    faults.raise_any()
    _tell_shared_ids(rows, path)
    return rows


def _json_rows(item: Any, where: str, root: Path, faults: Faults) -> Iterator[Row]:
    if not isinstance(item, dict):
        faults.add(where, f"{kind_of(item)}, expected an object with image and caption")
        return
    if absent := [key for key in ("image", "caption") if key not in item]:
        faults.add(where, f"{' and '.join(absent)} missing (has {', '.join(map(str, item)) or 'nothing'})")
        return
    image = path_below(item["image"], "image", where, root, faults)
    image_id = item.get("image_id", image)
    if isinstance(image_id, bool) or not isinstance(image_id, str | int | None):
        faults.add(where, f"image_id: {kind_of(image_id)}, expected text or an integer")
        image_id = None
    captions = item["caption"] if isinstance(item["caption"], list) else [item["caption"]]
    if not captions:
        faults.add(where, "caption: an empty list")
    for caption in captions:
        if fault := caption_fault(caption):
            faults.add(where, f"caption: {fault}")
        elif image is not None:
            yield Row(image, caption, image if image_id is None else image_id)


def caption_fault(caption: Any) -> str | None:
    """The fault of a caption; None for one that can be read."""
    if not isinstance(caption, str):
        return f"{kind_of(caption)}, expected text or a list of texts"
    if not visible(caption).strip():
        return "empty" if not caption.strip() else f"{shown(caption)} holds nothing that can be seen"
    return half_fault(caption)


def half_fault(text: str) -> str | None:
    """The fault of a text that holds a lone surrogate; None for all others."""
    half = half_character(text)
    return None if half is None else f"holds {half!r}, half of a character; write it again from its source"


def path_below(value: Any, key: str, where: str, root: Path, faults: Faults) -> str | None:
    """A picture's path as one below the root, with forward slashes; None with a fault noted.

    Args:
        key, where: what the fault is put down to.
    """
    if not isinstance(value, str) or not value.strip():
        faults.add(where, f"{key}: empty" if isinstance(value, str) else f"{key}: {kind_of(value)}, expected a path")
        return None
    if "\0" in value or not _can_name_a_file(value):
        faults.add(where, f"{key}: {shown(value)} holds a character that no file's name can have")
        return None
    below = os.path.relpath(os.path.normpath(os.path.join(root, value.strip())), root)
    if below == os.curdir or below.split(os.sep)[0] == os.pardir:
        faults.add(where, f"{key}: {shown(value)} is not inside {root}; set root to a folder above all pictures")
        return None
    return below.replace(os.sep, "/")


def _can_name_a_file(value: str) -> bool:
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _check_ids(rows: list[Row], faults: Faults) -> None:
    # Two ids for one picture would make its own captions negatives of each other.
    known: dict[str, str | int] = {}
    for row in rows:
        if known.setdefault(row.image, row.image_id) != row.image_id:
            faults.add(row.image, f"has two image_ids, {known[row.image]!r} and {row.image_id!r}")


def _tell_shared_ids(rows: list[Row], path: Path) -> None:
    # Crops of one picture may share an id, so this is no fault.
    first: dict[str | int, str] = {}
    shared = {row.image_id: row.image for row in rows if first.setdefault(row.image_id, row.image) != row.image}
    if shared:
        known, other = next(iter(shared.items()))
        log.warning(
            "%s: %d image_ids stand for several pictures each, as %s for %s and %s; they count as one picture, whose "
            "captions are never each other's negatives", path, len(shared), shown(known), shown(first[known]),
            shown(other),
        )  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Names of a CSV file's columns; `split` None where there is none to read."""

    image: str
    caption: str
    split: str | None


def csv_header(path: Path) -> list[str]:
    """The names in the first line.

    Raises:
        UserError: the file is missing, empty, or no text.
    """
    return _csv_lines(path)[0][1]


def read_csv(path: Path, root: Path, columns: Columns) -> list[tuple[str | None, Row]]:
    """The captions of one CSV file, each with its split (None without a split column).

    Raises:
        UserError: a column is missing, or rows are faulty; all of them listed.
    """
    (_, header), *lines = _csv_lines(path)
    wanted = [name for name in (columns.image, columns.caption, columns.split) if name is not None]
    _check_header(path, header, wanted)
    if not lines:
        raise UserError(f"{path}: has a header and no rows")
    faults, rows = Faults(path), []
    for number, cells in lines:
        where = f"line {number}"
        if len(cells) != len(header):
            faults.add(where, f"{len(cells)} cells, the header has {len(header)} (quote captions that hold commas)")
            continue
        record = dict(zip(header, cells, strict=True))
        split = _split(record[columns.split], where, faults) if columns.split else None
        item = {"image": record[columns.image], "caption": record[columns.caption]}
        rows += [(split, row) for row in _json_rows(item, where, root, faults)]
    faults.raise_any()
    return rows


def _check_header(path: Path, header: list[str], wanted: list[str]) -> None:
    if absent := [name for name in wanted if name not in header]:
        way = "; separate the cells by commas" if len(header) == 1 and set(header[0]) & set(";\t|") else ""
        raise UserError(f"{path}: no column {', '.join(absent)}; it has {one_line(', '.join(header))}{way}")
    if twice := [name for name in wanted if header.count(name) > 1]:
        raise UserError(f"{path}: the header names {', '.join(twice)} more than once; rename the other columns")


def _csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(number of its last line, cells) of every record that is not blank."""
    reader = csv.reader(io.StringIO(text_of(path, "CSV"), newline=""), skipinitialspace=True, strict=True)
    lines, number = [], 0
    try:
        for cells in reader:
            number = reader.line_num
            if any(cell.strip() for cell in cells):
                lines.append((number, cells))
    except csv.Error as error:
        raise UserError(f"{path}: not readable as CSV after line {number}: {error}") from error
    if not lines:
        raise UserError(f"{path}: is empty")
    return [(lines[0][0], [cell.strip() for cell in lines[0][1]]), *lines[1:]]


def _split(value: str, where: str, faults: Faults) -> str | None:
    word = value.strip().lower()
    word = _SPLIT_WORDS.get(word, word)
    if word not in SPLITS:
        faults.add(where, f"split: {shown(value)} is not one of {', '.join(SPLITS)}")
        return None
    return word


def training_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One dictionary per caption, as `RetrievalRows` takes them."""
    return [{"image": row.image, "caption": row.caption, "image_id": row.image_id} for row in rows]


def evaluation_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One dictionary per picture with all its captions, as `RetrievalEvalRows` takes them, in order of appearance."""
    of_picture: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = of_picture.setdefault(row.image, {"image": row.image, "caption": [], "image_id": row.image_id})
        entry["caption"].append(row.caption)
    return list(of_picture.values())
