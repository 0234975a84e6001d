"""Strategies of selection: which K of a query's candidates the student pays for.

``hardest`` is the paper's. It suits a student that starts from its teacher, or a K of about 32 and more: a student
that starts from nothing and sees a few hardest candidates alone never learns where the easy ones belong.
``stratified`` covers the whole range of the teacher's scores instead, so that few pairs say what all of them would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class Draws:
    """Numbers drawn for queries, the same for a query whichever process it is selected in.

    Args:
        generator: source of chance; None for torch's.
        queries: of the whole batch; None: those that are selected are all.
        rows: which of the batch's queries are selected; None: all.
    """

    generator: torch.Generator | None = None
    queries: int | None = None
    rows: slice | None = None

    def uniform(self, count: int, width: int, device: torch.device) -> Tensor:
        """Return float ``[count, width]`` in [0, 1), on ``device``, for ``count`` selected queries.

        Raises:
            ValueError: ``rows`` of ``queries`` are not ``count``.
        """
        source = device if self.generator is None else self.generator.device
        of_all = torch.rand(self.queries or count, width, generator=self.generator, device=source)
        drawn = of_all if self.rows is None else of_all[self.rows]
        if len(drawn) != count:
            raise ValueError(f"{count} queries are selected, but {self.rows} of {len(of_all)} are {len(drawn)}")
        return drawn.to(device)


class SelectionStrategy(Protocol):
    """A choice of candidates; ``needs_teacher`` is False where the teacher's scores may be None."""

    needs_teacher: bool

    def columns(
        self, negatives: Tensor, teacher_scores: Tensor | None, count: int, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """Choose ``count`` usable candidates of each query, all of them where there are fewer.

        Args:
            negatives: bool ``[Q, C]``, the usable candidates.
            teacher_scores: float ``[Q, 1+C]``, the match in column 0; None without a teacher.
            count: K >= 1.
            draws: source of chance.

        Returns:
            pool columns, int64 ``[Q, K]`` in 1..C, and which of them are real, bool ``[Q, K]``; the others are 0.

        Raises:
            ValueError: where the teacher's scores are needed and None.
        """


@dataclass(frozen=True)
class Hardest(SelectionStrategy):
    """The negatives that the teacher scores highest, ties by lower column."""

    needs_teacher = True

    @override
    def columns(
        self, negatives: Tensor, teacher_scores: Tensor | None, count: int, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        return take_highest(_known(teacher_scores, "hardest"), negatives, count)


@dataclass(frozen=True)
class Random(SelectionStrategy):
    """Negatives drawn uniformly, without replacement."""

    needs_teacher = False

    @override
    def columns(
        self, negatives: Tensor, teacher_scores: Tensor | None, count: int, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        return take_highest(draws.uniform(len(negatives), negatives.shape[1], negatives.device), negatives, count)


@dataclass(frozen=True)
class Mixed(SelectionStrategy):
    """The hardest negatives, then others drawn uniformly without replacement.

    Args:
        hard_share: of the K candidates, rounded up.

    Raises:
        ValueError: a share outside [0, 1].
    """

    hard_share: float = 0.5
    needs_teacher = True

    def __post_init__(self) -> None:
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard_share must lie in [0, 1], got {self.hard_share}")

    @override
    def columns(
        self, negatives: Tensor, teacher_scores: Tensor | None, count: int, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        hard = math.ceil(count * self.hard_share)
        hardest = take_highest(_known(teacher_scores, "mixed"), negatives, hard)
        others = negatives & ~_chosen(negatives, *hardest)
        random = take_highest(draws.uniform(len(negatives), negatives.shape[1], negatives.device), others, count - hard)
        both = torch.cat([hardest[0], random[0]], dim=1), torch.cat([hardest[1], random[1]], dim=1)
        return _real_first(*both)


@dataclass(frozen=True)
class Stratified(SelectionStrategy):
    """Negatives evenly over the range of the query's teacher scores, the highest first.

    The range between the lowest and the highest score of its usable candidates is cut into K strata of equal width; in
    each a level is drawn, and the candidate nearest to it that no higher level has taken is chosen (ties by lower
    column). Uniform in the score, not in the rank: most candidates are easy, and their scores lie close together.
    """

    needs_teacher = True

    @override
    def columns(
        self, negatives: Tensor, teacher_scores: Tensor | None, count: int, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        scores = _known(teacher_scores, "stratified")
        if not scores.shape[1]:
            return take_highest(scores, negatives, count)
        # float32 at least: in half precision neighbouring levels would coincide
        scores = scores if scores.dtype == torch.float64 else scores.float()
        infinite = float("inf")
        highest = scores.masked_fill(~negatives, -infinite).amax(dim=1, keepdim=True)
        lowest = scores.masked_fill(~negatives, infinite).amin(dim=1, keepdim=True)
        strata = torch.arange(count, device=scores.device) + draws.uniform(len(scores), count, scores.device)
        levels = highest - strata / count * (highest - lowest)
        remaining = negatives.clone()
        chosen, real = [], []
        for level in levels.unbind(1):
            # of equal distances argmin takes the first; without a candidate any column, which is not real then
            distance = (scores - level[:, None]).abs().masked_fill(~remaining, infinite)
            nearest = distance.argmin(dim=1, keepdim=True)
            chosen.append(nearest)
            real.append(remaining.gather(1, nearest))
            remaining.scatter_(1, nearest, False)
        columns, is_real = torch.cat(chosen, dim=1), torch.cat(real, dim=1)
        return (columns + 1).masked_fill(~is_real, 0), is_real


# Classes, built with the settings that they declare as dataclass fields.
SELECTION_STRATEGIES: dict[str, Callable[..., SelectionStrategy]] = {
    "hardest": Hardest,
    "mixed": Mixed,
    "random": Random,
    "stratified": Stratified,
}


def build_strategy(name: str, **settings: Any) -> SelectionStrategy:
    """Return the strategy ``name`` with those of ``settings`` that it has.

    Raises:
        ValueError: an unknown name, or a setting out of its range.
    """
    if name not in SELECTION_STRATEGIES:
        raise ValueError(f"unknown selection strategy '{name}'; known: {', '.join(sorted(SELECTION_STRATEGIES))}")
    strategy = SELECTION_STRATEGIES[name]
    declared = getattr(strategy, "__dataclass_fields__", {})
    return strategy(**{key: value for key, value in settings.items() if key in declared})


def take_highest(priorities: Tensor, negatives: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` usable candidates of highest priority, ties by lower column.

    Args:
        priorities: float ``[Q, C]``.
        negatives: bool ``[Q, C]``, the usable ones.

    Returns:
        pool columns, int64 ``[Q, count]`` in 1..C, and which of them are real, bool ``[Q, count]``; the others are 0.
    """
    ranked = priorities.masked_fill(~negatives, float("-inf"))
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    # a second stable sort keeps a masked candidate behind a usable one whose own priority is -inf
    usable = negatives.gather(1, order)
    order = order.gather(1, usable.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices)
    order, real = order[:, :count], negatives.gather(1, order)[:, :count]
    missing = count - order.shape[1]
    order = nnf.pad(order + 1, (0, missing))
    real = nnf.pad(real, (0, missing))
    return order.masked_fill(~real, 0), real


def represented(scores: Tensor, negatives: Tensor, columns: Tensor, real: Tensor) -> Tensor:
    """Return for how many usable candidates each chosen one stands: itself, and those nearest to it in score.

    Args:
        scores: float ``[Q, C]``, the teacher's.
        negatives: bool ``[Q, C]``, the usable candidates.
        columns, real: the chosen ones, as :meth:`SelectionStrategy.columns` returns them.

    Returns:
        float ``[Q, K]``, at least 1; a row's real ones sum up to its usable candidates. A candidate halfway between two
        chosen ones counts for the higher.
    """
    if not columns.shape[1] or not scores.shape[1]:
        return torch.ones_like(columns, dtype=torch.float32)
    taken = scores.gather(1, (columns - 1).clamp_min(0)).masked_fill(~real, float("inf"))
    ascending, order = taken.sort(dim=1, stable=True)
    halfway = (ascending[:, 1:] + ascending[:, :-1]) / 2
    nearest = torch.searchsorted(halfway.contiguous(), scores.contiguous(), right=True)
    others = negatives & ~_chosen(negatives, columns, real)
    counts = torch.zeros_like(taken).scatter_add_(1, nearest, others.to(taken.dtype))
    return 1 + torch.zeros_like(taken).scatter_(1, order, counts)


def _known(teacher_scores: Tensor | None, name: str) -> Tensor:
    """Return the teacher's scores of the candidates ``[Q, C]``, without the match's."""
    if teacher_scores is None:
        raise ValueError(f"selection strategy '{name}' needs teacher_scores; use 'random' without a teacher")
    return teacher_scores[:, 1:]


def _chosen(negatives: Tensor, columns: Tensor, real: Tensor) -> Tensor:
    """Return bool ``[Q, C]``: the candidates that the columns (in 1..C) stand for."""
    among = torch.zeros(len(negatives), 1 + negatives.shape[1], dtype=torch.bool, device=negatives.device)
    return among.scatter_(1, columns, real)[:, 1:]


def _real_first(columns: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    order = real.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order), real.gather(1, order)
