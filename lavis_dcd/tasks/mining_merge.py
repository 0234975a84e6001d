"""From the scores of all pairs to the bank's tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavis_dcd.datasets.score_bank import BankTable
from lavis_dcd.distillation.candidates import IMAGE_TO_TEXT
from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.tasks.mining_plan import Plan
from lavis_dcd.tasks.mining_pools import Pairing

ROWS_AT_ONCE = 4096


def merge(
    pairing: Pairing, plan: Plan, scores: Sequence[Tensor], weights: Sequence[float], keep: int
) -> dict[str, BankTable]:
    """Per direction and row of the training set the match's score and the ``keep`` highest of its candidates.

    Several teachers' scores are standardised over the match and the pool of each row and averaged, as in training
    (``distillation.ensemble.combine``).

    Args:
        scores: of ``plan.keys``, float32 ``[P]`` per teacher.
        weights: of the teachers.
        keep: at most so many candidates per row.
    """
    return {direction: _table(pairing, plan, direction, scores, weights, keep) for direction in plan.pools}


def _table(
    pairing: Pairing, plan: Plan, direction: str, scores: Sequence[Tensor], weights: Sequence[float], keep: int
) -> BankTable:
    to_text = direction == IMAGE_TO_TEXT
    queries = pairing.image_of_row if to_text else pairing.text_of_row
    matches = pairing.text_of_row if to_text else pairing.image_of_row
    row_of_item = pairing.row_of_text if to_text else pairing.row_of_image
    candidates, kept_scores = [], []
    for own, match in zip(queries.split(ROWS_AT_ONCE), matches.split(ROWS_AT_ONCE), strict=True):
        items = torch.cat([match[:, None], plan.pools[direction][own].long()], dim=1)
        valid = items >= 0
        sides = (own[:, None].expand_as(items), items.clamp_min(0))
        keys = pairing.keys(*(sides if to_text else sides[::-1]))
        # entries that are none may have no pair; combine ignores what they hold
        places = torch.searchsorted(plan.keys, keys).clamp_max(len(plan.keys) - 1)
        combined = combine([of_teacher[places] for of_teacher in scores], valid, weights)
        ranked = combined[:, 1:].masked_fill(~valid[:, 1:], -torch.inf).sort(dim=1, descending=True, stable=True)
        order, there = ranked.indices[:, :keep], ranked.values[:, :keep] > -torch.inf
        rows = row_of_item[items[:, 1:].gather(1, order).clamp_min(0)]
        candidates.append(rows.masked_fill(~there, -1).int())
        best = ranked.values[:, :keep].masked_fill(~there, 0.0)
        kept_scores.append(torch.cat([combined[:, :1], best], dim=1))
    return BankTable(torch.cat(candidates), torch.cat(kept_scores))
