"""The lines of `metrics.jsonl`: those of our form are read, whatever else the file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
_MOST = 2**53  # of a step: whole numbers up to here are exact as floats, too
_LARGEST = 1e100  # of a value that a chart shows


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of training and evaluation in their order, and how many lines are of another form.

    A line that was torn by a kill is of another form, as is one that is no UTF-8, no JSON, or has values that no job
    writes. A file that is missing, or no file, has no lines.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return [], 0
    lines, left_out = [], 0
    for raw in path.read_bytes().split(b"\n"):
        if not raw.strip():
            continue
        line = _parsed(raw)
        if line is None:
            left_out += 1
        else:
            lines.append(line)
    return lines, left_out


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and _is_ours(line) else None


def _is_ours(line: Mapping[str, Any]) -> bool:
    kind, step, epoch = line.get("kind"), line.get("step"), line.get("epoch", 0.0)
    if not (_is_count(step) and is_number(epoch)):
        return False
    if kind == "train":
        return True
    weights = line.get("weights_of_step")
    named = isinstance(line.get("split"), str) and isinstance(line.get("model"), str)
    return kind == "eval" and named and (weights is None or _is_count(weights))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a chart can show."""
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST
