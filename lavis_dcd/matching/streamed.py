"""Features that are read when they are needed: rows on disk, or in a bank, that stand in memory block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lavis_dcd.matching.features import Features

F = TypeVar("F", bound=Features)

BLOCK_BYTES = 512 * 2**20


class RowSource(Protocol):
    """Where the rows come from."""

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        """Fills ``tokens [B, N, D]``, with zeros behind a row's own tokens, and ``embeds [B, ...]``.

        Args:
            rows: int64 ``[B]``, numbers in the source.
        """


@dataclass(frozen=True)
class StreamedFeatures(Generic[F]):
    """Rows of features that an index brings into host memory, where they read as ``Features`` do.

    Args:
        like: such features without a row, ``tokens [0, N, D]`` on the CPU: N counts the padding of every row.
        rows: int64 ``[B]``, the numbers in ``source`` of these rows.
        mask: bool ``[B, N]`` (it stays in memory), or ``None``.
        block_bytes: what a reader of all rows should take at a time.
    """

    like: F
    source: RowSource
    rows: Tensor
    mask: Tensor | None = None
    block_bytes: int = BLOCK_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> F:
        """Rows by slice, list or LongTensor, read into host memory; a row index may repeat."""
        index = torch.as_tensor(index, dtype=torch.long) if isinstance(index, (list, tuple)) else index
        rows, like = self.rows[index], self.like
        tokens, embeds = (
            None if t is None else t.new_empty(len(rows), *t.shape[1:]) for t in (like.tokens, like.embeds)
        )
        self.source.read(rows, tokens, embeds)
        return type(like)(tokens, None if self.mask is None else self.mask[index], embeds)

    def only(self, rows: Sequence[int]) -> StreamedFeatures[F]:
        """A part of the rows; nothing is read."""
        index = torch.tensor(rows, dtype=torch.long)
        return replace(self, rows=self.rows[index], mask=None if self.mask is None else self.mask[index])

    def in_blocks_of(self, block_bytes: int) -> StreamedFeatures[F]:
        """The same rows for readers that take so many bytes at a time."""
        return replace(self, block_bytes=block_bytes)

    @property
    def row_shape(self) -> tuple[int, int]:
        """Tokens of every row, with its padding, and their width: ``(N, D)``."""
        return self.like.row_shape

    @property
    def row_bytes(self) -> int:
        """What one row takes in memory, without its mask."""
        tensors = [t for t in (self.like.tokens, self.like.embeds) if t is not None]
        return sum(t.shape[1:].numel() * t.element_size() for t in tensors)

    @property
    def nbytes(self) -> int:
        """What all rows would take in memory."""
        return len(self) * self.row_bytes + (0 if self.mask is None else self.mask.nbytes)

    @property
    def device(self) -> torch.device:
        """Where rows arrive: the host."""
        return torch.device("cpu")
