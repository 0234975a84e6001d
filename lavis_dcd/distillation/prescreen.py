"""Cut a pool to its most promising candidates by cheap scores, so that the teacher scores fewer pairs.

The cut is not exact: a candidate that the teacher would score high may have a low cheap score. ``found_share`` measures
how many of the teacher's hardest candidates a cut leaves in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.strategies import take_highest


def within_budget(
    pool: CandidatePool,
    cheap_scores: Tensor | None,
    budget: int,
    generator: torch.Generator | None = None,
) -> CandidatePool:
    """Return the pool with no more valid entries than the teacher may score.

    Every query keeps its match and max(2, budget // Q) - 1 candidates, as :func:`most_promising` chooses them. So at
    least one candidate remains, even where the budget is below 2 Q. A pair that stands in both directions' pools is
    counted in each.

    Args:
        pool: candidates ``[Q, 1+C]``.
        cheap_scores: float ``[Q, 1+C]``, how promising each is; None draws at random.
        budget: valid entries of this pool at most, matches included.
        generator: source of chance without cheap scores; None for torch's.

    Returns:
        A pool ``[Q, 1+C]`` with the same rows.

    Raises:
        ValueError: on a budget below 1, or cheap scores of another shape than the pool.
    """
    if budget < 1:
        raise ValueError(f"the teacher's budget must be at least 1 pair, got {budget}")
    return most_promising(pool, cheap_scores, max(2, budget // max(len(pool.valid), 1)) - 1, generator)


def most_promising(
    pool: CandidatePool, cheap_scores: Tensor | None, keep: int, generator: torch.Generator | None = None
) -> CandidatePool:
    """Return the pool with the match and the ``keep`` valid candidates of the highest cheap scores per query.

    Ties go to the lower column; all other candidates become invalid.

    Args:
        pool: candidates ``[Q, 1+C]``.
        cheap_scores: float ``[Q, 1+C]``; None draws at random.
        keep: at least 1.
        generator: source of chance without cheap scores; None for torch's.

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
    negatives = pool.valid[:, 1:]
    columns, real = take_highest(_promise(negatives, cheap_scores, generator), negatives, keep)
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


def _promise(negatives: Tensor, cheap_scores: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The cheap scores of the candidates, or chance, float ``[Q, C]``."""
    if cheap_scores is not None:
        return cheap_scores[:, 1:].detach()
    device = negatives.device if generator is None else generator.device
    return torch.rand(negatives.shape, generator=generator, device=device).to(negatives.device)
