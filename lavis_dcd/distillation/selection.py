"""Teacher-guided selection: of each query's candidates, the match and the K negatives that reach the student.

Indices and teacher scores are gathered by one index tensor, so they cannot come apart; ``release_selection``
shows the published code's way, where they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.losses import full_precision
from lavis_dcd.distillation.strategies import Draws, SelectionStrategy, build_strategy, represented


@dataclass
class Selection:
    """The pairs that the student scores: the match in column 0, masked entries pointing at the match.

    Args:
        image_rows, text_rows: int64 ``[Q, 1+K]``, rows into the batch's distinct images and texts.
        teacher_scores: float ``[Q, 1+K]`` at the same pairs, or None in training on the ground truth alone.
        valid: bool ``[Q, 1+K]``, False where a query had fewer than K usable negatives.
        log_counts: float ``[Q, 1+K]``, the logarithm of how many of the pool's candidates each stands for (0 for the
            match); None where each stands for itself.
    """

    image_rows: Tensor
    text_rows: Tensor
    teacher_scores: Tensor | None
    valid: Tensor
    log_counts: Tensor | None = None


def select(
    pool: CandidatePool,
    teacher_scores: Tensor | None,
    hard_negatives: int | None,
    strategy: str | SelectionStrategy = "hardest",
    margin: float | None = None,
    draws: Draws | None = None,
    reweight: bool = False,
) -> Selection:
    """Keep the match and at most K valid negatives per query; all of them, in the pool's order, without K.

    Args:
        pool: candidates ``[Q, 1+C]``.
        teacher_scores: float ``[Q, 1+C]``, or None where the strategy needs none.
        hard_negatives: K >= 1. With C < K the surplus columns are masked. None: every valid candidate, so K = C;
            then the strategy has nothing to choose and needs no teacher.
        strategy: a name in SELECTION_STRATEGIES, with its default settings, or an object with the same method.
        margin: drops candidates whose teacher score exceeds the match's by more than this: likely unlabelled
            matches.
        draws: source of chance for the strategies that draw; torch's by default.
        reweight: tell for how many candidates of the pool each kept one stands, by the teacher's scores, so that a
            softmax over the kept ones estimates that over all.

    Returns:
        Selection ``[Q, 1+K]``.

    Raises:
        ValueError: on K < 1, an unknown strategy, scores of another shape than the pool, or a margin without
            scores.
    """
    chooser = build_strategy(strategy) if isinstance(strategy, str) else strategy
    _check(pool, teacher_scores, hard_negatives, margin)
    negatives = pool.valid[:, 1:] & pool.valid[:, :1]
    if margin is not None and teacher_scores is not None:
        negatives = negatives & (teacher_scores[:, 1:] <= teacher_scores[:, :1] + margin)
    if hard_negatives is None:
        columns, usable = _all(negatives)
    else:
        columns, usable = chooser.columns(negatives, teacher_scores, hard_negatives, draws or Draws())
    log_counts = None
    if reweight and hard_negatives is not None:
        if teacher_scores is None:
            raise ValueError("reweight compares teacher scores, but teacher_scores is None")
        counts = represented(full_precision(teacher_scores[:, 1:]), negatives, columns, usable)
        log_counts = nnf.pad(counts.masked_fill(~usable, 1.0).log(), (1, 0))
    index = torch.cat([columns.new_zeros(len(columns), 1), columns], dim=1)
    return Selection(
        image_rows=pool.image_rows.gather(1, index),
        text_rows=pool.text_rows.gather(1, index),
        teacher_scores=None if teacher_scores is None else teacher_scores.gather(1, index),
        valid=torch.cat([pool.valid[:, :1], usable], dim=1),
        log_counts=log_counts,
    )


def release_selection(pool: CandidatePool, teacher_scores: Tensor, hard_negatives: int) -> Selection:
    """Select as the published code does, kept for comparison: teacher scores and pairs are MISALIGNED.

    The pairs are the match and the K hardest candidates, as in ``select``; the teacher's scores stay the 1+K
    highest of all 1+C candidates in descending order. So wherever the teacher ranks the match r-th, the first
    r columns disagree, and a match outside its first 1+K has no score at all. The published code has no
    masks: every candidate counts.

    Args:
        pool: candidates ``[Q, 1+C]``, of which ``valid`` is ignored.
        teacher_scores: float ``[Q, 1+C]``.
        hard_negatives: K, at most C.

    Returns:
        Selection ``[Q, 1+K]``, all valid.

    Raises:
        ValueError: on K outside 1..C, or scores of another shape than the pool.
    """
    if hard_negatives is None:
        raise ValueError("the published code keeps a fixed number of hard_negatives; None is no number")
    _check(pool, teacher_scores, hard_negatives, None)
    if hard_negatives >= pool.valid.shape[1]:
        raise ValueError(f"hard_negatives = {hard_negatives} exceeds the pool's {pool.valid.shape[1] - 1} candidates")
    everything = CandidatePool(pool.image_rows, pool.text_rows, torch.ones_like(pool.valid), pool.direction)
    chosen = select(everything, teacher_scores, hard_negatives)
    in_order = teacher_scores.sort(dim=1, descending=True, stable=True).values
    chosen.teacher_scores = in_order[:, : 1 + hard_negatives]
    return chosen


def _check(
    pool: CandidatePool, teacher_scores: Tensor | None, hard_negatives: int | None, margin: float | None
) -> None:
    if hard_negatives is not None and hard_negatives < 1:
        raise ValueError(f"hard_negatives must be at least 1, got {hard_negatives}")
    if teacher_scores is None:
        if margin is not None:
            raise ValueError("a margin compares teacher scores, but teacher_scores is None")
    elif teacher_scores.shape != pool.valid.shape:
        shapes = f"{tuple(teacher_scores.shape)} and {tuple(pool.valid.shape)}"
        raise ValueError(f"teacher_scores and the pool must have one shape [Q, 1+C], got {shapes}")


def _all(negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Every pool column in order, int64 ``[Q, C]``, and which are usable; the others are 0."""
    columns = torch.arange(1, 1 + negatives.shape[1], device=negatives.device)
    return columns.expand_as(negatives).masked_fill(~negatives, 0), negatives
