"""What a training step tells of itself beside its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.distillation.selection import Selection


@torch.no_grad()
def diagnostics(selections: list[Selection], student_scores: list[Tensor]) -> dict[str, Tensor]:
    """Means over the queries that have a negative: scores of the match and of the hardest negative, misrankings.

    Args:
        selections: per direction, what the student saw.
        student_scores: Float [Q, 1+K] per direction.

    Returns:
        0-dim tensors `<who>_match_score`, `<who>_hardest_score` and `<who>_misranked` of the student and, where it
        scored, the teacher.
    """
    tables = {"student": student_scores}
    if all(s.teacher_scores is not None for s in selections):
        tables["teacher"] = [s.teacher_scores for s in selections]
    result = {}
    for name, of_directions in tables.items():
        matches, hardest = [], []
        # direction by direction: their tables may differ in width
        for selection, scores in zip(selections, of_directions, strict=True):
            keep = selection.valid[:, 1:].any(dim=1)
            matches.append(scores[keep, 0])
            hardest.append(scores.masked_fill(~selection.valid, -torch.inf)[keep, 1:].amax(dim=1))
        match, rival = torch.cat(matches), torch.cat(hardest)
        result[f"{name}_match_score"] = match.mean()
        result[f"{name}_hardest_score"] = rival.mean()
        result[f"{name}_misranked"] = (rival >= match).float().mean()
    return result
