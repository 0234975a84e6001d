"""How many of the teacher's hardest samples a cheap look at the candidates before it leaves in."""

from __future__ import annotations

from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.selection import take_highest


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
