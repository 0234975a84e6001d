"""Cut a pool to its most promising candidates by cheap scores, so that the teacher scores fewer pairs.

What is promising depends on the selection that follows: the highest cheap scores for ``hardest``, candidates over the
whole range of them for ``stratified``. The cut is not exact: a candidate that the teacher would score high may have a
low cheap score. ``found_share`` measures how many of the teacher's hardest candidates a cut leaves in, ``range_share``
how much of the range of its scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.strategies import Draws, Hardest, Random, SelectionStrategy, take_highest


def within_budget(
    pool: CandidatePool,
    cheap_scores: Tensor | None,
    budget: int,
    strategy: SelectionStrategy | None = None,
    draws: Draws | None = None,
) -> CandidatePool:
    """Return the pool with no more valid entries than the teacher may score.

    Every query keeps its match and max(2, budget // Q) - 1 candidates, as :func:`most_promising` chooses them. So at
    least one candidate remains, even where the budget is below 2 Q. A pair that stands in both directions' pools is
    counted in each.

    Args:
        pool: candidates ``[Q, 1+C]``.
        cheap_scores: float ``[Q, 1+C]``, how promising each is; None draws at random.
        budget: valid entries of this pool at most, matches included.
        strategy, draws: as for :func:`most_promising`.

    Returns:
        A pool ``[Q, 1+C]`` with the same rows.

    Raises:
        ValueError: on a budget below 1, or cheap scores of another shape than the pool.
    """
    if budget < 1:
        raise ValueError(f"the teacher's budget must be at least 1 pair, got {budget}")
    return most_promising(pool, cheap_scores, max(2, budget // max(len(pool.valid), 1)) - 1, strategy, draws)


def most_promising(
    pool: CandidatePool,
    cheap_scores: Tensor | None,
    keep: int,
    strategy: SelectionStrategy | None = None,
    draws: Draws | None = None,
) -> CandidatePool:
    """Return the pool with the match and ``keep`` valid candidates per query; all others become invalid.

    Args:
        pool: candidates ``[Q, 1+C]``.
        cheap_scores: float ``[Q, 1+C]``; None draws at random.
        keep: at least 1.
        strategy: the selection that follows; it chooses here, too, by the cheap scores. One that does without a
            teacher, and None, leave the candidates of the highest cheap scores, ties to the lower column.
        draws: source of chance for the strategies that draw; torch's by default.

    Returns:
        A pool ``[Q, 1+C]`` with the same rows; the pool itself where ``keep`` covers all its candidates.

    Raises:
        ValueError: on keep < 1, or cheap scores of another shape than the pool.
    """
    if keep < 1:
        raise ValueError(f"prescreen must keep at least 1 candidate, got {keep}")
    if cheap_scores is not None and cheap_scores.shape != pool.valid.shape:
        shapes = f"{tuple(cheap_scores.shape)} and {tuple(pool.valid.shape)}"
        raise ValueError(f"cheap_scores and the pool must have one shape [Q, 1+C], got {shapes}")
    if keep >= pool.valid.shape[1] - 1:
        return pool
    by_chance = cheap_scores is None
    chooser = strategy if strategy is not None and strategy.needs_teacher else Hardest()
    scores = None if cheap_scores is None else cheap_scores.detach()
    columns, real = (Random() if by_chance else chooser).columns(pool.valid[:, 1:], scores, keep, draws or Draws())
    # the columns that stand for nothing are 0, the match's, which is put back after them
    valid = torch.zeros_like(pool.valid).scatter_(1, columns, real)
    valid[:, 0] = pool.valid[:, 0]
    return CandidatePool(pool.image_rows, pool.text_rows, valid, pool.direction)


def found_share(pool: CandidatePool, cut: CandidatePool, teacher_scores: Tensor, hardest: int) -> Tensor:
    """Return the share of the teacher's hardest candidates that a cut leaves in, 0-dim in [0, 1].

    Args:
        pool: all candidates ``[Q, 1+C]``.
        cut: the same pool after the cut.
        teacher_scores: float ``[Q, 1+C]``, of all candidates.
        hardest: K, how many of a query's valid candidates count as its hardest.

    Returns:
        The mean over all those candidates; nan when no query has a candidate.
    """
    columns, real = take_highest(teacher_scores[:, 1:], pool.valid[:, 1:], hardest)
    return (cut.valid.gather(1, columns) & real).sum() / real.sum()


def range_share(pool: CandidatePool, cut: CandidatePool, teacher_scores: Tensor) -> Tensor:
    """Return how much of the range of the teacher's scores a cut leaves in, 0-dim in [0, 1].

    Args:
        pool: all candidates ``[Q, 1+C]``.
        cut: the same pool after the cut.
        teacher_scores: float ``[Q, 1+C]``, of all candidates.

    Returns:
        The mean over the queries whose candidates do not all have one score; nan when there are none.
    """
    whole = _range(teacher_scores[:, 1:], pool.valid[:, 1:])
    left = _range(teacher_scores[:, 1:], cut.valid[:, 1:])
    wide = whole > 0
    return (left[wide] / whole[wide]).mean()


def _range(scores: Tensor, valid: Tensor) -> Tensor:
    """Return float ``[Q]``: the distance between the highest and the lowest valid score, 0 without any."""
    if not scores.shape[1]:
        return scores.new_zeros(len(scores))
    infinite = float("inf")
    highest, lowest = scores.masked_fill(~valid, -infinite).amax(1), scores.masked_fill(~valid, infinite).amin(1)
    return torch.where(valid.any(dim=1), highest - lowest, torch.zeros_like(highest))
