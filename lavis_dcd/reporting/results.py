"""The results of a run as they are read back: checked, so that a damaged file is a line and no traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line, shown
from lavis_dcd.reporting.memorised import Memorised
from lavis_dcd.reporting.metrics_lines import is_number
from lavis_dcd.reporting.table import COLUMNS

RESULTS = "results.json"
_LONGEST = 256 << 20  # bytes; the pictures of a gallery take a megabyte
_FIGURES = frozenset(column.key for column in COLUMNS) - {"how"}
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("title", "split"), (str, "text")),
    **dict.fromkeys(("rows", "gallery"), (list, "a list")),
    **dict.fromkeys(("machine", "memorised"), (dict, "a section")),
}


@dataclass(frozen=True)
class Results:
    """The content of ``results.json``: of one split.

    Args:
        rows: one for each matcher, with its ``name`` and figures; see ``table.ResultRow``.
        gallery: queries with what each matcher returns.
        machine: facts on which the figures depend.
        memorised: what the teacher knows of its training pictures; see ``Memorised.stored``.
    """

    title: str = ""
    split: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    gallery: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    memorised: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file.

        Raises:
            UserError: it is missing, no file, cut short, or not of the form that an evaluation writes.
        """
        try:
            with path.open("rb") as handle:
                raw = handle.read(_LONGEST + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); an evaluation writes it") from error
        return cls.parse(raw, path)

    @classmethod
    def parse(cls, raw: bytes, path: Path) -> Results:
        """Read the bytes of a file.

        Args:
            path: for messages.

        Raises:
            UserError: they are cut short, or not of the form that an evaluation writes.
        """
        try:
            if len(raw) > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST >> 20} MiB")
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is cut short or no JSON ({error}); evaluate again to write it anew") from error
        for fault in _faults(content):
            raise UserError(f"{path}: {fault}; evaluate again to write it anew")
        known = {key: content[key] for key in cls.__dataclass_fields__ if content.get(key) is not None}
        return cls(**known)


def _faults(content: Any) -> Iterator[str]:
    if not isinstance(content, Mapping):
        yield "holds no results of an evaluation"
        return
    for key, (kind, words) in _KINDS.items():
        if not isinstance(content.get(key), kind | None):
            yield f"{key} is not {words}"
            return
    for number, row in enumerate(content.get("rows") or []):
        yield from _row_faults(row, number)
    for number, item in enumerate(content.get("gallery") or []):
        if not _is_gallery_item(item):
            yield f"item {number + 1} of the gallery is not of the form that an evaluation writes"
    if content.get("memorised"):
        try:
            Memorised.parse(content["memorised"])
        except ValueError as error:
            yield f"memorised: {error}"
    peaks = (content.get("machine") or {}).get("peak_memory", {})
    if not (isinstance(peaks, Mapping) and all(map(_is_peak, peaks.values()))):
        yield "peak_memory of machine is not of the form that an evaluation writes"


def _row_faults(row: Any, number: int) -> Iterator[str]:
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
        yield f"row {number + 1} has no name"
        return
    for key, value in row.items():
        where = f"{one_line(key)} of {shown(row['name'])}"
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{where} is {value}, which is no figure"
        elif key.removeprefix("1k_").removesuffix("_std") in _FIGURES and not (value is None or is_number(value)):
            yield f"{where} is no number"
        elif key == "how" and not isinstance(value, str | None):
            yield f"{where} is no text"


def _is_gallery_item(item: Any) -> bool:
    if not (isinstance(item, Mapping) and isinstance(item.get("direction"), str) and _is_shown(item.get("query"))):
        return False
    ranks, results = item.get("ranks"), item.get("results")
    if not (isinstance(ranks, Mapping) and isinstance(results, Mapping) and results.keys() <= ranks.keys()):
        return False
    answers = [answer for answers in results.values() if isinstance(answers, list) for answer in answers]
    lists = all(isinstance(answers, list) for answers in results.values())
    one_kind = len({"picture" in answer for answer in answers if isinstance(answer, Mapping)}) < 2
    return lists and one_kind and all(_is_shown(answer) and "right" in answer for answer in answers)


def _is_shown(item: Any) -> bool:
    if not isinstance(item, Mapping):
        return False
    if "picture" in item:
        return isinstance(item["picture"], str) and item["picture"].isascii()
    return isinstance(item.get("text"), str)


def _is_peak(peak: Any) -> bool:
    return isinstance(peak, Mapping) and is_number(peak.get("host_mb")) and is_number(peak.get("gpu_mb", 0))
