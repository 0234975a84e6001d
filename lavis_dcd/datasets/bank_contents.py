"""What a feature bank of a job's data sets holds, and the name under which it is kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from lavis_dcd.datasets.bank_rows import Rows, read_rows
from lavis_dcd.datasets.feature_store import FORMAT
from lavis_dcd.datasets.views import alike

_SHOWN = 4  # pictures per set that show a changed processor


@dataclass
class BankContents:
    """What a feature bank of some sets holds.

    Args:
        places: set and index of each picture to encode.
        picture_rows: as in ``FeatureBank``.
        captions: distinct ones, in an order that has nothing to do with what they say: any of them are a fair sample.
        rows: of the sets.
    """

    places: list[tuple[str, int]]
    picture_rows: dict[str, list[int]]
    captions: list[str]
    rows: dict[str, Rows]

    @classmethod
    def of(cls, datasets: Mapping[str, Dataset]) -> BankContents:
        """The distinct pictures and captions of ``datasets``.

        Raises:
            UserError: a set has neither of LAVIS's retrieval shapes.
        """
        rows = {name: read_rows(dataset, name) for name, dataset in datasets.items()}
        readers = _readers(datasets)
        row_of: dict[tuple[str, str], int] = {}
        places: list[tuple[str, int]] = []
        picture_rows: dict[str, list[int]] = {}
        for name, of_set in rows.items():
            for index, picture in enumerate(of_set.pictures):
                if row_of.setdefault((readers[name], picture), len(places)) == len(places):
                    places.append((name, index))
            picture_rows[name] = [row_of[readers[name], picture] for picture in of_set.pictures]
        captions = {caption for of_set in rows.values() for caption in of_set.captions}
        return cls(places, picture_rows, sorted(captions, key=_shuffled), rows)

    def key(self, datasets: Mapping[str, Dataset], fingerprint: str, dtype: torch.dtype, amp: str) -> str:
        """A hash of the encoders, the pictures (with their files' sizes and times), processors and captions."""
        digest = hashlib.sha256(repr((FORMAT, fingerprint, str(dtype), amp, self.captions)).encode())
        digest.update(repr(list(self.picture_rows.values())).encode())
        for name, of_set in self.rows.items():
            count = len(of_set.pictures)
            for index in range(0, count, max(1, count // _SHOWN)):  # shows a changed processor, whatever it is
                digest.update(datasets[name][index]["image"].float().contiguous().numpy().tobytes())
            for picture in dict.fromkeys(of_set.pictures):
                stat = os.stat(picture) if os.path.isfile(picture) else None
                digest.update(repr((picture, stat and (stat.st_size, stat.st_mtime_ns))).encode())
        return digest.hexdigest()[:32]

    def __str__(self) -> str:
        return f"{len(self.places):,} pictures and {len(self.captions):,} captions"


def _readers(datasets: Mapping[str, Dataset]) -> dict[str, str]:
    """By set, the first set whose pictures surely go through the same processor."""
    found: dict[str, str] = {}
    for name, dataset in datasets.items():
        mine = getattr(dataset, "vis_processor", None)
        twins = (n for n in found.values() if mine is not None and alike(mine, datasets[n].vis_processor))
        found[name] = next((n for n in twins), name)
    return found


def _shuffled(caption: str) -> tuple[bytes, str]:
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest(), caption
