"""Distillation without captions that belong to pictures: the teacher's top candidate stands where the match would."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.losses import full_precision


@torch.no_grad()
def top_as_match(pool: CandidatePool, teacher_scores: Tensor) -> tuple[CandidatePool, Tensor]:
    """Return the pool with each query's highest-scored candidate in column 0, and its scores in the same order.

    The item that the pool has in column 0 is one candidate among the others. These come in ascending order of their
    rows, whatever their order was, so nothing tells which one it is; of equal scores, the lowest row is the top.

    Args:
        pool: candidates ``[Q, 1+C]``, with every item that may be the top valid.
        teacher_scores: float ``[Q, 1+C]``.

    Returns:
        The pool and float ``[Q, 1+C]``. Entries that are not valid stand last and stay so.

    Raises:
        ValueError: scores of another shape than the pool.
    """
    if teacher_scores.shape != pool.valid.shape:
        shapes = f"{tuple(teacher_scores.shape)} and {tuple(pool.valid.shape)}"
        raise ValueError(f"teacher_scores and the pool must have one shape [Q, 1+C], got {shapes}")
    # a query's own rows are all alike, so the sum orders as the candidates' rows do
    rows = (pool.image_rows + pool.text_rows).masked_fill(~pool.valid, torch.iinfo(torch.int64).max)
    by_row = rows.argsort(dim=1, stable=True)
    usable = pool.valid.gather(1, by_row)
    ranked = full_precision(teacher_scores).gather(1, by_row).masked_fill(~usable, float("-inf"))
    top = ranked.argmax(dim=1, keepdim=True)  # of equal ones the first
    place = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    order = by_row.gather(1, place.masked_fill(place == top, -1).argsort(dim=1, stable=True))
    ordered = CandidatePool(
        pool.image_rows.gather(1, order), pool.text_rows.gather(1, order), pool.valid.gather(1, order), pool.direction
    )
    return ordered, teacher_scores.gather(1, order)
