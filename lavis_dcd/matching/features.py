"""What an encoder makes of a picture or a text: plain dataclasses of tensors.

A matcher pays for its encoders once per picture and once per text; everything that happens per pair reads these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
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

    Raises:
        ValueError: when the row or token counts of the tensors differ.
    """

    tokens: Tensor
    mask: Tensor | None = None
    embeds: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ValueError(f"tokens must be [B, N, D], got {tuple(self.tokens.shape)}")
        if self.mask is not None and self.mask.shape != self.tokens.shape[:2]:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit tokens {tuple(self.tokens.shape)}")
        if self.embeds is not None and len(self.embeds) != len(self.tokens):
            raise ValueError(f"{len(self.embeds)} embeds for {len(self.tokens)} rows of tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self: F, index: Tensor | slice | list[int]) -> F:
        """Rows by slice, list or LongTensor; a row index may repeat."""
        return type(self)(*(None if t is None else t[index] for t in self._tensors()))

    def to(self: F, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> F:
        """Moved and, for the floating point tensors, cast."""

        def move(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return type(self)(*(move(t) for t in self._tensors()))

    def half(self: F) -> F:
        return self.to(dtype=torch.float16)

    def float(self: F) -> F:
        return self.to(dtype=torch.float32)

    def trimmed(self: F) -> F:
        """Without the trailing columns that no row's mask uses (the padding of longer batches)."""
        if self.mask is None:
            return self
        length = last_used(self.mask)
        return type(self)(self.tokens[:, :length], self.mask[:, :length], self.embeds)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors() if t is not None)

    @property
    def row_shape(self) -> tuple[int, int]:
        """Tokens of every row, with its padding, and their width: ``(N, D)``."""
        return self.tokens.shape[1], self.tokens.shape[2]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @classmethod
    def cat(cls: type[F], parts: Sequence[F]) -> F:
        """Rows of all parts below each other; shorter parts are padded with masked zeros."""
        if not parts:
            raise ValueError("nothing to concatenate")
        length = max(p.tokens.shape[1] for p in parts)
        masked = any(p.mask is not None or p.tokens.shape[1] != length for p in parts)
        tokens = torch.cat([padded(p.tokens, length) for p in parts])
        mask = torch.cat([padded(p.full_mask(), length) for p in parts]) if masked else None
        if all(p.embeds is None for p in parts):
            return cls(tokens, mask)
        if any(p.embeds is None for p in parts):
            raise ValueError("some parts have embeds and some have none")
        return cls(tokens, mask, torch.cat([p.embeds for p in parts]))

    def save(self, path: str | Path) -> None:
        """Written as safetensors."""
        save_file({k: t.contiguous() for k, t in self._named().items()}, str(path))

    @classmethod
    def load(cls: type[F], path: str | Path) -> F:
        return cls(**load_file(str(path)))

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.tokens, self.mask, self.embeds

    def _named(self) -> dict[str, Tensor]:
        named = {"tokens": self.tokens, "mask": self.mask, "embeds": self.embeds}
        return {k: t for k, t in named.items() if t is not None}

    def full_mask(self) -> Tensor:
        """``mask``, all True where there is none: bool ``[B, N]``."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.device)


@dataclass
class ImageFeatures(Features):
    """Features of pictures."""


@dataclass
class TextFeatures(Features):
    """Features of texts."""


def last_used(mask: Tensor) -> int:
    """One past the last column that any row of ``mask [B, N]`` uses, at least 1."""
    used = mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def padded(t: Tensor, length: int) -> Tensor:
    """``t [B, n, ...]`` with zeros behind, ``[B, length, ...]``."""
    if t.shape[1] == length:
        return t
    padding = t.new_zeros((t.shape[0], length - t.shape[1], *t.shape[2:]))
    return torch.cat([t, padding], dim=1)


# ----------------------------------------------------------------------------------------------------
# Tensors and features of all of torchrun's processes, in each of them, with gradients where there are any.

F = TypeVar("F", bound=Features)


def gather_rows(rows: Tensor, ranks: ProcessGroup, counts: Sequence[int] | None = None) -> Tensor:
    """All processes' ``rows [n, ...]`` below each other, by rank; ``n`` may differ, the other sides may not.

    The gradient of a process's rows is the *sum* over the processes of their gradients. Where every process computes
    the same loss from the gathered rows, that is the number of processes times the gradient of one such loss, and
    the mean over processes that DistributedDataParallel takes makes it the gradient of that loss.

    Args:
        counts: every process's ``n``, where that is known.
    """
    if ranks.alone:
        return rows
    counts = gather_objects(len(rows), ranks) if counts is None else counts
    return _GatherRows.apply(rows, ranks.rank, tuple(counts))


def gather_features(features: F, ranks: ProcessGroup) -> F:
    """All processes' rows of features below each other, by rank; shorter ones are padded with masked zeros."""
    if ranks.alone:
        return features
    told = gather_objects((len(features), features.tokens.shape[1], features.mask is not None), ranks)
    counts, lengths, masks = zip(*told, strict=True)
    longest = max(lengths)
    tokens = gather_rows(padded(features.tokens, longest), ranks, counts)
    mask = None
    if any(masks) or len(set(lengths)) > 1:
        mask = gather_rows(padded(features.full_mask(), longest), ranks, counts)
    embeds = None if features.embeds is None else gather_rows(features.embeds, ranks, counts)
    return type(features)(tokens, mask, embeds)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, counts: tuple[int, ...]) -> Tensor:
        ends = list(accumulate(counts))
        ctx.own = slice(ends[rank] - counts[rank], ends[rank])
        found = rows.new_empty((ends[-1], *rows.shape[1:]))
        found[ctx.own] = rows
        # gloo sends no bool
        sent = found.view(torch.uint8) if found.dtype == torch.bool else found
        parts = zip(counts, ends, strict=True)
        # straight into their places: a gallery's table takes its own size and no more
        works = [
            dist.broadcast(sent[end - count : end], src, async_op=True)
            for src, (count, end) in enumerate(parts)
            if count
        ]
        for work in works:
            work.wait()
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None, None
