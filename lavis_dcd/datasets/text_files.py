"""Text and JSON files that others wrote, with a user's words for what is wrong with them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lavis_dcd.common.errors import UserError


def load_json(path: Path) -> Any:
    """What a JSON file holds.

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
    """What a value of a JSON file is, in a user's words."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity"}.get(str(value), "-Infinity")
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false",
             type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
