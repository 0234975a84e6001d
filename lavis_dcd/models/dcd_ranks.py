"""A batch over several processes: each works on its own queries, against the candidates of all; the loss is of all.

Weights of queries, and whatever else a loss takes over its rows, are of the global batch: every process gathers the
tables of scores and computes the same loss, whose value and gradient are then those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as nnf

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.selection import Selection
from lavis_dcd.matching.gather import Ranks, gather_objects, gather_rows
from lavis_dcd.models.batch import BatchFeatures


def own_rows(batch: BatchFeatures, pools: list[CandidatePool]) -> list[CandidatePool]:
    """The pools ``[Q, 1+C]`` cut to the queries that this process brought."""
    if batch.ranks.alone:
        return pools
    own = batch.own
    return [CandidatePool(p.image_rows[own], p.text_rows[own], p.valid[own], p.direction) for p in pools]


def whole_batch(
    batch: BatchFeatures, selections: list[Selection], student_scores: list[Tensor]
) -> tuple[list[Selection], list[Tensor]]:
    """What every process selected and scored for its queries, in every process; all must call.

    Args:
        selections, student_scores: per direction, tables ``[q, 1+K]`` of this process's queries. Columns that only
            other processes have are masked.

    Returns:
        The same of all queries, ``[Q, 1+K]``; gradients flow back to the process that scored.
    """
    if batch.ranks.alone:
        return selections, student_scores
    widths = gather_objects([selection.valid.shape[1] for selection in selections], batch.ranks)
    found, scores = [], []
    for selection, own, of_ranks in zip(selections, student_scores, zip(*widths, strict=True), strict=True):
        gather = _Gather(batch.ranks, batch.queries, max(of_ranks))
        teacher = selection.teacher_scores
        found.append(
            Selection(
                gather(selection.image_rows),
                gather(selection.text_rows),
                None if teacher is None else gather(teacher.detach()),
                gather(selection.valid),
            )
        )
        scores.append(gather(own))
    return found, scores


class _Gather:
    def __init__(self, ranks: Ranks, queries: Sequence[int], width: int) -> None:
        self._ranks, self._queries, self._width = ranks, queries, width

    def __call__(self, table: Tensor) -> Tensor:
        return gather_rows(nnf.pad(table, (0, self._width - table.shape[1])), self._ranks, self._queries)
