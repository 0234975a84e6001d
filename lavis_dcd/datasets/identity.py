"""The identity of data sets: SHA-256s of their rows and of their pictures, for the manifests of what is made from them.

Pictures are compared by name, size, time of the last change and, as reading all of a large set takes minutes, by the
content of a sample: ``SAMPLE`` of each set, spread evenly (all of a smaller set), ``DRAWN_SAMPLE`` where pictures are
drawn instead of read. With ``content="all"`` every picture's content counts, and its time no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from lavis_dcd.common.regular import IrregularError
from lavis_dcd.datasets.opener import picture_sha256
from lavis_dcd.datasets.pictures import MakesPictures, load_picture
from lavis_dcd.datasets.tree import original, plain_sets

Content = Literal["sample", "all"]

SAMPLE = 1000  # of a set's distinct picture files: 160 MB of COCO's, read in a second
DRAWN_SAMPLE = 64
_READERS = 8
_SCHEME = "pictures 4"  # 4: upright (a TIFF, too), on white, 16 bits scaled; contents of a sample


def rows_digests(datasets: Mapping[str, Any]) -> dict[str, str]:
    """Return, for each plain set in ``datasets`` (by split), the SHA-256 of its rows in their order.

    No picture is read.

    Args:
        datasets: sets, wrappers or concatenations; a split that is None has none.
    """
    return {name: _rows_digest(plain) for name, plain in _plain(datasets)}


def pictures_digests(datasets: Mapping[str, Any], content: Content = "sample") -> dict[str, str]:
    """Return, for each plain set in ``datasets`` (by split), the SHA-256 of its distinct pictures in their order.

    Args:
        datasets: as for :func:`rows_digests`. Pictures that are no files here, and are not drawn by the set, are
            compared by their names alone.
        content: ``sample`` or ``all``; see the module.
    """
    return {name: _pictures_digest(plain, content) for name, plain in _plain(datasets)}


def _plain(datasets: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for split, dataset in datasets.items():
        if dataset is not None:
            yield from ((name, original(plain)) for name, plain in plain_sets(dataset, split).items())


def _rows_digest(dataset: Any) -> str:
    digest = hashlib.sha256(repr(len(dataset)).encode())
    rows = getattr(dataset, "annotation", None)
    for row in rows if isinstance(rows, list) else ():
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _pictures_digest(dataset: Any, content: Content) -> str:
    digest = hashlib.sha256(_SCHEME.encode())
    rows = getattr(dataset, "annotation", None)
    first_rows: dict[str, int] = {}  # of each distinct picture
    for index, row in enumerate(rows if isinstance(rows, list) else ()):
        if isinstance(row, Mapping) and "image" in row:
            first_rows.setdefault(str(row["image"]), index)
    drawn = isinstance(dataset, MakesPictures)
    chosen = _sample(len(first_rows), DRAWN_SAMPLE if drawn else SAMPLE, content)
    root = str(getattr(dataset, "vis_root", None) or "")

    def state(item: tuple[int, tuple[str, int]]) -> str:
        number, (name, index) = item
        if drawn:
            picture = hashlib.sha256(load_picture(dataset, index).tobytes()).hexdigest() if number in chosen else None
            return repr((name, picture))
        return repr((name, *_file_state(os.path.join(root, name), number in chosen, content)))

    with ThreadPoolExecutor(1 if drawn else _READERS) as pool:
        for line in pool.map(state, enumerate(first_rows.items())):
            digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _sample(count: int, size: int, content: Content) -> frozenset[int]:
    if content == "all" or count <= size:
        return frozenset(range(count))
    return frozenset(round(i * (count - 1) / (size - 1)) for i in range(size))


def _file_state(path: str, read: bool, content: Content) -> tuple[Any, ...]:
    """Return a file's size, its time unless all contents count, and its SHA-256 where it is read."""
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            return ("no file",)
        time = None if content == "all" else facts.st_mtime_ns
        return facts.st_size, time, picture_sha256(path) if read else None
    except (OSError, ValueError, IrregularError):
        return ("unreadable",)
