"""Settings that come from the environment, compared without being kept: a checkpoint has only a digest of each.

The digests are slow to compute on purpose, so that nobody tries all short values.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

KEY = "environment"  # of a stored configuration, beside its sections
_MARK = "${"


def digests(written: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each value that stands as an interpolation in `written`, by its path in dots."""
    return {path: _digest(path, _at(resolved, path)) for path, _ in _texts(written, "")}


def comparable(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration `now` as it compares with `before`, of a checkpoint.

    An interpolation is the checkpoint's own setting where the values are equal, whatever the texts; the same text
    with another value is marked as that.
    """
    of_before, of_now = before.get(KEY) or {}, now.get(KEY) or {}
    result = copy.deepcopy(dict(now))
    for path in {*of_before, *of_now}:
        old, new = _at(before, path), _at(now, path)
        same = (of_before.get(path) or _digest(path, old)) == (of_now.get(path) or _digest(path, new))
        if same:
            _put(result, path, old)
        elif old == new:
            _put(result, path, f"{new} with another value")
    return result


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif isinstance(value, str) and _MARK in value:
        yield path, value
    for key, item in items:
        yield from _texts(item, f"{path}.{key}" if path else str(key))


def _digest(path: str, value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.scrypt(text, salt=f"lavis_dcd {path}".encode(), n=2**12, r=8, p=1, dklen=16).hex()


def _step(container: Any, part: str) -> Any:
    if isinstance(container, Mapping):
        return next((item for key, item in container.items() if str(key) == part), None)
    if isinstance(container, list | tuple) and part.isdigit() and int(part) < len(container):
        return container[int(part)]
    return None


def _at(container: Any, path: str) -> Any:
    for part in path.split("."):
        container = _step(container, part)
    return container


def _put(container: Any, path: str, value: Any) -> None:
    *way, last = path.split(".")
    for part in way:
        container = _step(container, part)
    if isinstance(container, dict) and _step(container, last) is not None:
        container[next(key for key in container if str(key) == last)] = value
    elif isinstance(container, list) and last.isdigit() and int(last) < len(container):
        container[int(last)] = value
