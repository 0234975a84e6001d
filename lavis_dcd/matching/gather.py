"""Tensors and features of all of torchrun's processes, in each of them, with gradients where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lavis_dcd.matching.features import Features, padded

F = TypeVar("F", bound=Features)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a piece of work: by default it is alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As torchrun's process group has it; alone without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, count: int) -> range:
        """This process's part of ``count`` items: in order, without gaps, of one size but for one item."""
        whole, more = divmod(count, self.size)
        start = self.rank * whole + min(self.rank, more)
        return range(start, start + whole + (self.rank < more))


ALONE = Ranks()


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Every process's ``value`` (plain containers), by rank."""
    if ranks.alone:
        return [value]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, value)
    return found


def gather_rows(rows: Tensor, ranks: Ranks, counts: Sequence[int] | None = None) -> Tensor:
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


def gather_features(features: F, ranks: Ranks) -> F:
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
