"""Figures of a training step beside its loss: scores, misrankings, spread, the rank of the match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.selection import Selection

_TINY = 1e-30  # scores that are all 0 have no spread


@torch.no_grad()
def diagnostics(
    selections: list[Selection],
    student_scores: list[Tensor],
    pools: Sequence[tuple[CandidatePool, Tensor | None]] = (),
    match_by_teacher: bool = False,
) -> dict[str, Tensor]:
    """Return means over the queries that have a negative: scores of the match and of the hardest negative, misrankings.

    Args:
        selections: per direction, what the student saw.
        student_scores: float ``[Q, 1+K]`` per direction.
        pools: per direction, candidates that were not chosen by scores, and the teacher's scores ``[Q, 1+C]`` of them,
            by which the teacher is judged. Empty where there are none such.
        match_by_teacher: column 0 is the teacher's top candidate, not a match: the figures then have other names.

    Returns:
        0-dim tensors ``<who>_match_score``, ``<who>_hardest_score`` and ``<who>_misranked`` of the student and, where
        it scored, the teacher; ``student_spread``, see ``spread``; with pools ``teacher_match_rank``, see
        ``match_rank``. NaN where no query has a negative. With ``match_by_teacher`` it is ``<who>_top_score`` and
        ``<who>_others_score`` (the highest of them), and ``student_top_misranked``: the share of queries in which the
        student ranks another candidate above the teacher's top.
    """
    tables = {"student": student_scores}
    of_teacher = [s.teacher_scores for s in selections if s.teacher_scores is not None]
    if len(of_teacher) == len(selections):
        tables["teacher"] = of_teacher
    result: dict[str, Tensor] = {}
    for name, of_directions in tables.items():
        matches, hardest = [], []
        # direction by direction: their tables may differ in width
        for selection, scores in zip(selections, of_directions, strict=True):
            keep = selection.valid[:, 1:].any(dim=1)
            matches.append(scores[keep, 0])
            hardest.append(scores.masked_fill(~selection.valid, -torch.inf)[keep, 1:].amax(dim=1))
        match, rival = torch.cat(matches), torch.cat(hardest)
        misranked = (rival >= match).float().mean()
        if match_by_teacher:
            result |= {f"{name}_top_score": match.mean(), f"{name}_others_score": rival.mean()}
            result |= {"student_top_misranked": misranked} if name == "student" else {}
        else:
            result |= {f"{name}_match_score": match.mean(), f"{name}_hardest_score": rival.mean()}
            result[f"{name}_misranked"] = misranked
    result["student_spread"] = spread(student_scores, [s.valid for s in selections])
    scored = [(pool.valid, scores) for pool, scores in pools if scores is not None]
    if scored:
        result["teacher_match_rank"] = match_rank(scored)
    return result


def spread(scores: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
    """Return the mean gap between a query's highest and lowest score, over the largest score's size.

    It is 0 for a model that scores all pairs alike.

    Args:
        scores, valid: ``[Q, 1+K]`` per direction; queries without a negative are left out.
    """
    gaps, sizes = [], []
    for table, usable in zip(scores, valid, strict=True):
        keep = usable[:, 1:].any(dim=1)
        highest = table.masked_fill(~usable, -torch.inf)[keep].amax(dim=1)
        lowest = table.masked_fill(~usable, torch.inf)[keep].amin(dim=1)
        gaps.append(highest - lowest)
        sizes.append(torch.maximum(highest.abs(), lowest.abs()))
    gap, size = torch.cat(gaps), torch.cat(sizes)
    return gap.mean() / size.amax().clamp_min(_TINY) if len(gap) else gap.mean()


def match_rank(tables: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean share of a query's negatives that score above its match, ties by half: 0.5 is chance, whatever C.

    Args:
        tables: per direction valid and scores, ``[Q, 1+C]``, the match in column 0.
    """
    shares = []
    for valid, scores in tables:
        negatives = valid[:, 1:]
        keep = negatives.any(dim=1)
        match, others, usable = scores[keep, :1], scores[keep, 1:], negatives[keep]
        above = (others > match).float() + 0.5 * (others == match).float()
        shares.append((above * usable).sum(dim=1) / usable.sum(dim=1))
    return torch.cat(shares).mean()
