"""Rows of a feature bank for evaluation, read as they are needed; banks on disk without mapping them.

Mapped pages count as this process's memory as long as the system has room, so that reading a whole bank through them
would look, and on some clusters be counted, as if it were loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.feature_store import RowStore, shard_files
from lavis_dcd.matching.features import Features
from lavis_dcd.matching.spill import read_at
from lavis_dcd.matching.streamed import StreamedFeatures

F = TypeVar("F", bound=Features)

ROWS_IN_MEMORY = 64  # gathered at a time from a bank that is in memory


def stream(store: RowStore, rows: Sequence[int], kind: type[F], masked: bool = False) -> StreamedFeatures[F]:
    """``store.gather(rows, kind).float()``, of which nothing is read before it is indexed.

    Args:
        masked: with a mask even where every token of every row is real.
    """
    picked = torch.tensor(rows, dtype=torch.long)
    lengths = torch.from_numpy(store.lengths)[picked]
    longest = max(1, int(lengths.max()))
    embeds = store.shards[0].embeds
    like = kind(
        torch.empty(0, longest, store.shards[0].tokens.shape[1]),
        embeds=None if embeds is None else torch.empty(0, *embeds.shape[1:]),
    )
    mask = torch.arange(longest) < lengths[:, None] if masked or store.masked else None
    source = _RowsInMemory(store, kind) if store.source is None else _RowsOnDisk(store, *store.source)
    return StreamedFeatures(like, source, picked, mask)


class _RowsInMemory:
    def __init__(self, store: RowStore, kind: type[Features]) -> None:
        self._store, self._kind = store, kind

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        for start in range(0, len(rows), ROWS_IN_MEMORY):
            here = slice(start, start + ROWS_IN_MEMORY)
            found = self._store.gather(rows[here], self._kind)
            length = found.tokens.shape[1]
            tokens[here, :length] = found.tokens
            tokens[here, length:] = 0
            if embeds is not None:
                embeds[here] = found.embeds


class _RowsOnDisk:
    def __init__(self, store: RowStore, folder: Path, kind: str) -> None:
        self._store = store
        self._files = [(path, _tokens_at(path)) for path in shard_files(folder, kind)]

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        picked = rows.numpy()
        shards = self._store.shard_of[picked]
        for shard in np.unique(shards):
            self._read_shard(int(shard), np.flatnonzero(shards == shard), picked, tokens)
        if embeds is not None:
            embeds.copy_(self._store.embeds(picked))

    def _read_shard(self, shard: int, places: np.ndarray, picked: np.ndarray, tokens: Tensor) -> None:
        (path, begin), kept = self._files[shard], self._store.shards[shard].tokens
        of_token = kept.shape[1] * kept.element_size()
        longest = max(1, int(self._store.lengths[picked[places]].max()))
        words = torch.empty(longest, kept.shape[1], dtype=kept.dtype)
        try:
            with path.open("rb", buffering=0) as handle:
                for place in places.tolist():
                    row = picked[place]
                    length = int(self._store.lengths[row])
                    read_at(handle, begin + int(self._store.start_of[row]) * of_token, words[:length])
                    tokens[place, :length] = words[:length]
                    tokens[place, length:] = 0
        except OSError as error:
            raise UserError(
                f"run.cache_features: {path} cannot be read any more ({error}); start again, or set "
                "run.cache_features=off"
            ) from error


def _tokens_at(path: Path) -> int:
    """Where the tokens begin in a safetensors file: the length of its header, the header, the tensors."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return 8 + length + json.loads(handle.read(length))["tokens"]["data_offsets"][0]
