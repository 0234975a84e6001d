"""Names of folders: what a user may call a job or a project, and one folder for each title."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from lavis_dcd.common.texts import shown

LONGEST_NAME = 200  # bytes as UTF-8: file systems take 255, and temporary files put a few around the name
_LONGEST_PART = 255
LONGEST_PATH = 3000  # bytes; systems take 4,096, and names of files come behind
_PLAIN_TITLE = re.compile(r"[a-z0-9]+( [a-z0-9]+)*")
_LONGEST_SLUG = 80
_TAG = 6  # hexadecimal digits


def name_fault(value: object, field: str) -> str | None:
    """Return why ``value`` cannot be the name of one folder, as a line that names ``field``; None where it can.

    Refused are what is no text, an empty name, separators, a leading dot (``..`` among them; such folders are hidden,
    and temporary files have names like that), characters that no terminal shows, and more than ``LONGEST_NAME`` bytes.
    """
    if not isinstance(value, str):
        return f"{field}: {shown(value)} is a {type(value).__name__}, expected a name; put it in quotes"
    reason = _reason(value)
    if reason is None:
        return None
    return f"{field}: {shown(value)} cannot be a folder's name: {reason}; give a name of letters, digits, - and _"


def _reason(name: str) -> str | None:
    if not name.strip():
        return "it is empty"
    if name != name.strip():
        return "it begins or ends with a space"
    if "/" in name or "\\" in name:
        return "it has a / or \\ (outputs go below run.output_dir, which may have them)"
    if name.startswith("."):
        return "it begins with a dot"
    # C: control characters, direction marks, lone surrogates, unassigned ones; Zl, Zp: ends of lines
    if any(unicodedata.category(c).startswith("C") or unicodedata.category(c) in ("Zl", "Zp") for c in name):
        return "it has a character that cannot be printed"
    size = len(name.encode())
    return f"it has {size} bytes, {LONGEST_NAME} fit" if size > LONGEST_NAME else None


def path_fault(value: object, field: str) -> str | None:
    """Return why ``value`` cannot be the path of a folder, as a line that names ``field``; None where it can."""
    if not isinstance(value, str) or not value.strip():
        return f"{field}: {shown(value)} is no path of a folder; give one, or . for the current folder"
    if not value.isprintable():
        return f"{field}: {shown(value)} has a character that cannot be printed; give another path"
    too_long = [part for part in value.split("/") if len(part.encode()) > _LONGEST_PART]
    if too_long or len(value.encode()) > LONGEST_PATH:
        return f"{field}: {shown(value)} is too long for a path ({_LONGEST_PART} bytes a folder, {LONGEST_PATH} in all)"
    return None


def folder_name(title: str) -> str:
    """Return a folder's name for a title: lower-case letters, digits and dashes; two titles never share one.

    Titles of lower-case words and single spaces alone keep their letters ("ground truth alone" gives
    "ground-truth-alone"); others get six digits of their SHA-256 behind, so that "K+" and "K-" are told apart.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    if _PLAIN_TITLE.fullmatch(title) and len(slug) <= _LONGEST_SLUG:
        return slug
    tag = hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest()[:_TAG]
    return "-".join(filter(None, [slug[:_LONGEST_SLUG].strip("-"), tag]))
