"""Encoded pictures and texts as plain dataclasses of tensors, and gathering them from all processes.

A matcher pays for its encoders once per picture and once per text; everything that happens per pair reads these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lavis_dcd.common.processes import ProcessGroup, gather_objects

F = TypeVar("F", bound="Features")


@dataclass
class Features:
    """Encoded items, one row each.

    Args:
        tokens: ``[B, N, D]`` floating point, the tower's output tokens.
        mask: ``[B, N]`` bool, True where a token is real; ``None`` when every token is.
        embeds: ``[B, E]`` floating point, the joint-space vector where the encoder itself gives one, else ``None``.
        rows: ``[B]`` int64, the items' rows in the bank that they come out of; ``None`` for what was encoded just now.

    Raises:
        ValueError: when the row or token counts of the tensors differ.
    """

    tokens: Tensor
    mask: Tensor | None = None
    embeds: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ValueError(f"tokens must be [B, N, D], got {tuple(self.tokens.shape)}")
        if self.mask is not None and self.mask.shape != self.tokens.shape[:2]:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit tokens {tuple(self.tokens.shape)}")
        if self.embeds is not None and len(self.embeds) != len(self.tokens):
            raise ValueError(f"{len(self.embeds)} embeds for {len(self.tokens)} rows of tokens")
        if self.rows is not None and len(self.rows) != len(self.tokens):
            raise ValueError(f"{len(self.rows)} numbers of rows for {len(self.tokens)} rows of tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self: F, index: Tensor | slice | list[int]) -> F:
        """Return rows by slice, list or int64 tensor; a row index may repeat."""
        return self._changed(lambda tensor: tensor[index])

    def to(self: F, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> F:
        """Return the features on ``device``, the floating point tensors cast to ``dtype``; ``None``: as they are."""
        return self._changed(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def float(self: F) -> F:
        """Return the floating point tensors in float32."""
        return self.to(dtype=torch.float32)

    def trimmed(self: F) -> F:
        """Return tokens and mask without the trailing columns that no row's mask uses (a longer batch's padding)."""
        if self.mask is None:
            return self
        length = last_used(self.mask)
        return type(self)(self.tokens[:, :length], self.mask[:, :length], self.embeds, self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in (self.tokens, self.mask, self.embeds, self.rows) if t is not None)

    @property
    def row_shape(self) -> tuple[int, int]:
        """Tokens of every row, with its padding, and their width: ``(N, D)``."""
        return self.tokens.shape[1], self.tokens.shape[2]

    @property
    def device(self) -> torch.device:
        """Return the device of the tensors."""
        return self.tokens.device

    @classmethod
    def cat(cls: type[F], batches: Sequence[F]) -> F:
        """Return the rows of all batches below each other; shorter rows are padded with masked zeros.

        They have numbers in a bank where those of all batches have them.

        Raises:
            ValueError: no batch, or some with ``embeds`` and some without.
        """
        if not batches:
            raise ValueError("nothing to concatenate")
        length = max(batch.tokens.shape[1] for batch in batches)
        masked = any(batch.mask is not None or batch.tokens.shape[1] != length for batch in batches)
        tokens = torch.cat([padded(batch.tokens, length) for batch in batches])
        mask = torch.cat([padded(batch.full_mask(), length) for batch in batches]) if masked else None
        embeds = [batch.embeds for batch in batches if batch.embeds is not None]
        if embeds and len(embeds) < len(batches):
            raise ValueError("some parts have embeds and some have none")
        rows = [batch.rows for batch in batches if batch.rows is not None]
        numbered = torch.cat(rows) if len(rows) == len(batches) else None
        return cls(tokens, mask, torch.cat(embeds) if embeds else None, numbered)

    def full_mask(self) -> Tensor:
        """Return ``mask``, bool ``[B, N]``, all True where there is none."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.device)

    def required_embeds(self) -> Tensor:
        """Return ``embeds``, ``[B, E]``.

        Raises:
            ValueError: there are none.
        """
        if self.embeds is None:
            raise ValueError("embeds: these features have no vectors of the joint space")
        return self.embeds

    def _changed(self: F, change: Callable[[Tensor], Tensor]) -> F:
        mask = None if self.mask is None else change(self.mask)
        embeds = None if self.embeds is None else change(self.embeds)
        rows = None if self.rows is None else change(self.rows)
        return type(self)(change(self.tokens), mask, embeds, rows)


@dataclass
class ImageFeatures(Features):
    """Features of pictures."""


@dataclass
class TextFeatures(Features):
    """Features of texts."""


def last_used(mask: Tensor) -> int:
    """Return one past the last column that any row of bool ``mask [B, N]`` uses, at least 1."""
    used = mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def padded(t: Tensor, length: int) -> Tensor:
    """Return ``t [B, n, ...]`` with zeros behind, ``[B, length, ...]``."""
    if t.shape[1] == length:
        return t
    padding = t.new_zeros((t.shape[0], length - t.shape[1], *t.shape[2:]))
    return torch.cat([t, padding], dim=1)


def gather_rows(rows: Tensor, ranks: ProcessGroup, counts: Sequence[int] | None = None) -> Tensor:
    """Return all processes' ``rows [n, ...]`` below each other, by rank, in each of them, with gradients.

    The gradient of a process's rows is the *sum* over the processes of their gradients. Where every process computes
    the same loss from the gathered rows, that is the number of processes times the gradient of one such loss, and
    the mean over processes that DistributedDataParallel takes makes it the gradient of that loss.

    Args:
        rows: of any type; ``n`` may differ between processes, the other sides may not.
        ranks: the processes.
        counts: every process's ``n``, where that is known.
    """
    if ranks.alone:
        return rows
    counts = gather_objects(len(rows), ranks) if counts is None else counts
    gathered: Tensor = _GatherRows.apply(rows, ranks.rank, tuple(counts))  # type: ignore[no-untyped-call]  # torch's
    return gathered


def gather_features(features: F, ranks: ProcessGroup) -> F:
    """Return all processes' features, as :func:`gather_rows` has rows; shorter ones are padded with masked zeros."""
    if ranks.alone:
        return features
    sizes = gather_objects((len(features), features.tokens.shape[1], features.mask is not None), ranks)
    counts, lengths, masks = zip(*sizes, strict=True)
    longest = max(lengths)
    tokens = gather_rows(padded(features.tokens, longest), ranks, counts)
    mask = None
    if any(masks) or len(set(lengths)) > 1:
        mask = gather_rows(padded(features.full_mask(), longest), ranks, counts)
    embeds = None if features.embeds is None else gather_rows(features.embeds, ranks, counts)
    rows = None if features.rows is None else gather_rows(features.rows, ranks, counts)
    return type(features)(tokens, mask, embeds, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, counts: tuple[int, ...]) -> Tensor:
        ends = list(accumulate(counts))
        ctx.local = slice(ends[rank] - counts[rank], ends[rank])
        gathered = rows.new_empty((ends[-1], *rows.shape[1:]))
        gathered[ctx.local] = rows
        # gloo sends no bool
        sent = gathered.view(torch.uint8) if gathered.dtype == torch.bool else gathered
        # straight into their places: a gallery's table takes its own size and no more
        works = [
            dist.broadcast(sent[end - count : end], source, async_op=True)
            for source, (count, end) in enumerate(zip(counts, ends, strict=True))
            if count
        ]
        for work in works:
            work.wait()
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.local], None, None
