"""A cheap look at the candidates before the teacher's: how many of its hardest samples does it leave in?"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.distillation.budget import within_budget
from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.selection import take_highest


def most_promising(
    pool: CandidatePool, cheap_scores: Tensor | None, keep: int, generator: torch.Generator | None = None
) -> CandidatePool:
    """The pool with the match and the ``keep`` valid candidates of the highest cheap scores per query.

    Args:
        pool: candidates [Q, 1+C].
        cheap_scores: Float [Q, 1+C]; None draws at random.
        keep: at least 1.
        generator: source of chance without cheap scores.

    Raises:
        ValueError: on keep < 1, or cheap scores of another shape than the pool.
    """
    if keep < 1:
        raise ValueError(f"prescreen must keep at least 1 candidate, got {keep}")
    return within_budget(pool, cheap_scores, (1 + keep) * len(pool.valid), generator)


def found_share(pool: CandidatePool, kept: CandidatePool, teacher_scores: Tensor, hardest: int) -> Tensor:
    """Share of the teacher's true hardest candidates that a prescreen leaves in, 0-dim in [0, 1].

    Args:
        pool: all candidates [Q, 1+C].
        kept: the same after the prescreen.
        teacher_scores: Float [Q, 1+C], of all of them.
        hardest: K, how many of a query's valid candidates count as its hardest.

    Returns:
        The mean over all those candidates; nan when no query has a candidate.
    """
    columns, real = take_highest(teacher_scores[:, 1:], pool.valid[:, 1:], hardest)
    return (kept.valid.gather(1, columns) & real).sum() / real.sum()
