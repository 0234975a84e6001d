"""Pictures that stand in two splits under two names: files of equal content."""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from lavis_dcd.common.regular import IrregularError, open_regular
from lavis_dcd.datasets.opener import MOST_BYTES, picture_sha256

log = logging.getLogger(__name__)

MOST_COMPARED = 2**31  # bytes that are read of files whose size and end are equal
_END = 4096  # bytes; the beginnings of a camera's photographs may be alike
_READERS = 8

Pairs = dict[tuple[str, str], list[tuple[str, str]]]


def equal_files(files: Mapping[str, Iterable[str]], most: int = MOST_COMPARED) -> Pairs:
    """Return, by split and later split, (file of the first, file of the second) for the files of equal content.

    Of files whose size no other file has, nothing is read; of those of one size the last 4 KB; of those that end
    alike everything (SHA-256), until ``most`` bytes are read, and the log tells of what was not compared. A file that
    is in both splits by its name is in no pair, nor is one that cannot be read. Of several equal files in the first
    split, the first one is named.

    Args:
        files: paths by split, in the order of the splits.
    """
    splits_of: dict[str, list[str]] = defaultdict(list)
    for split, paths in files.items():
        for path in dict.fromkeys(paths):
            splits_of[path].append(split)
    groups = [list(splits_of)]
    for key_of in (_size, _end):
        groups = _parted(groups, key_of, splits_of)
    groups = _parted(_bounded(groups, most), _content, splits_of)
    pairs: Pairs = {}
    for one, two in combinations(files, 2):
        found = [pair for group in groups for pair in _between(group, one, two, splits_of)]
        if found:
            pairs[one, two] = found
    return pairs


def _parted(
    groups: list[list[str]], key_of: Callable[[str], object], splits_of: Mapping[str, list[str]]
) -> list[list[str]]:
    """Return the groups parted by a key; without paths that have none, and without groups of one path or split."""
    paths = [path for group in groups for path in group]
    with ThreadPoolExecutor(_READERS) as pool:
        keys = dict(zip(paths, pool.map(key_of, paths), strict=True))
    parts: list[list[str]] = []
    for group in groups:
        by_key: dict[object, list[str]] = defaultdict(list)
        for path in group:
            if keys[path] is not None:
                by_key[keys[path]].append(path)
        parts += by_key.values()
    return [part for part in parts if len(part) > 1 and len({split for path in part for split in splits_of[path]}) > 1]


def _bounded(groups: list[list[str]], most: int) -> list[list[str]]:
    """Return as many groups as may be read, all files of a group being of one size."""
    chosen: list[list[str]] = []
    for group in groups:
        most -= (_size(group[0]) or 0) * len(group)
        if most < 0:
            log.info(
                "of %d groups of files that may be equal, %d are compared, the rest is too much to read",
                len(groups), len(chosen),
            )  # fmt: skip
            break
        chosen.append(group)
    return chosen


def _between(group: list[str], one: str, two: str, splits_of: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    first = next((path for path in group if one in splits_of[path]), None)
    if first is None:
        return []
    return [(first, path) for path in group if two in splits_of[path] and one not in splits_of[path]]


def _size(path: str) -> int | None:
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) and 0 < facts.st_size <= MOST_BYTES else None


def _end(path: str) -> bytes | None:
    try:
        with open_regular(path, MOST_BYTES) as raw:
            raw.seek(max(0, os.fstat(raw.fileno()).st_size - _END))
            return raw.read(_END)
    except (OSError, ValueError, IrregularError):
        return None


def _content(path: str) -> str | None:
    try:
        return picture_sha256(path)
    except (OSError, ValueError, IrregularError):
        return None
