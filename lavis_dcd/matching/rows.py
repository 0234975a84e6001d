"""Rows of features written straight into their places as the encoders bring them, in any order."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

from lavis_dcd.matching.features import Features

F = TypeVar("F", bound=Features)


class RowsInMemory(Generic[F]):
    """A set's features in one piece, without a second copy: the same as ``Features.cat`` of the parts, re-ordered.

    Rows take the length of the first part. A longer part that comes later has what is there copied; whoever brings
    the longest part first avoids that.

    Args:
        count: rows of the set; each must come once.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kind: type[F] | None = None
        self._masks = MaskRows(count)
        self._tokens = torch.empty(0)
        self._embeds: Tensor | None = None
        self._here = torch.zeros(count, dtype=torch.bool)

    def put(self, rows: Tensor, part: F) -> None:
        """The features of ``rows``, int64 ``[b]`` on the CPU.

        Raises:
            ValueError: some parts have embeds and some have none.
        """
        self._masks.put(rows, part)
        if self._kind is None:
            self._begin(part)
        if (part.embeds is None) != (self._embeds is None):
            raise ValueError("some parts have embeds and some have none")
        length = part.tokens.shape[1]
        if length > self._tokens.shape[1]:
            self._grow(length)
        for tensor, own in ((self._tokens[:, :length], part.tokens), (self._embeds, part.embeds)):
            if tensor is not None:
                tensor[rows.to(tensor.device)] = own
        if length < self._tokens.shape[1]:
            self._tokens[:, length:][rows.to(self._tokens.device)] = 0
        self._here[rows] = True

    def all(self) -> F:
        """The features of all rows.

        Raises:
            ValueError: a row has not come.
        """
        if self._kind is None or not self._here.all():
            raise ValueError(f"{int((~self._here).sum())} of {self._count} rows have not come")
        mask = self._masks.all()
        return self._kind(self._tokens, None if mask is None else mask.to(self._tokens.device), self._embeds)

    def _begin(self, part: F) -> None:
        self._kind = type(part)
        self._tokens = part.tokens.new_empty((self._count, *part.tokens.shape[1:]))
        if part.embeds is not None:
            self._embeds = part.embeds.new_empty((self._count, *part.embeds.shape[1:]))

    def _grow(self, length: int) -> None:
        old, there = self._tokens, self._here.to(self._tokens.device)
        self._tokens = old.new_empty((self._count, length, old.shape[2]))
        for row in there.nonzero()[:, 0].tolist():
            self._tokens[row, : old.shape[1]] = old[row]
            self._tokens[row, old.shape[1] :] = 0


class MaskRows:
    """The masks of parts of any length, each in its rows; in memory, for they are small."""

    def __init__(self, count: int) -> None:
        self._mask = torch.zeros(count, 0, dtype=torch.bool)
        self._masked = False

    def put(self, rows: Tensor, part: Features) -> None:
        length, longest = part.tokens.shape[1], self._mask.shape[1]
        # parts of other lengths are padded, and padding has to be masked
        self._masked |= part.mask is not None or longest not in (0, length)
        if length > longest:
            self._mask = torch.nn.functional.pad(self._mask, (0, length - longest))
        self._mask[rows, :length] = part.full_mask().cpu()

    def all(self) -> Tensor | None:
        """bool ``[count, N]``, ``None`` where every token of every row is real."""
        return self._mask if self._masked else None

    @property
    def longest(self) -> int:
        return self._mask.shape[1]
