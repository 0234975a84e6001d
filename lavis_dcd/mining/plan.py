"""The pairs of a mining, cut into shards; on disk, so that every process and every restart works on the same."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lavis_dcd.banks.score_bank import BankTable
from lavis_dcd.common.files import atomic_write, update_with_tensors
from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT
from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.mining.pools import Pairing

log = logging.getLogger(__name__)

PLAN = "plan.safetensors"
PAIRS_PER_SHARD = 4096  # what an interruption costs at most
IMAGES_PER_SHARD = 64  # their features are held together


@dataclass(frozen=True)
class Plan:
    """All pairs to be scored.

    Args:
        pools: by direction int32 ``[Q, N]``, the candidates of each distinct query, -1 where there are no more.
        keys: int64 ``[P]``, the distinct pairs and all matches (see :meth:`Pairing.keys`), sorted.
        bounds: int64 ``[S+1]``: shard s is ``keys[bounds[s]:bounds[s + 1]]``; no picture is in two.
    """

    pools: dict[str, Tensor]
    keys: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, pairing: Pairing, pools: Mapping[str, Tensor]) -> Plan:
        """The plan for these pools."""
        found = [pairing.match_keys()]
        for direction, pool in pools.items():
            items = pool.long()
            queries = torch.arange(len(pool))[:, None].expand_as(items)
            images, texts = (queries, items) if direction == IMAGE_TO_TEXT else (items, queries)
            found.append(pairing.keys(images, texts)[items >= 0].unique())
        keys = torch.unique(torch.cat(found))
        return cls(dict(pools), keys, _bounds(keys, pairing.texts))

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    def shard(self, number: int) -> Tensor:
        """Keys of the shard's pairs."""
        return self.keys[self.bounds[number] : self.bounds[number + 1]]

    def pairs_in(self, number: int) -> int:
        return int(self.bounds[number + 1] - self.bounds[number])

    def fingerprint(self) -> str:
        """A hash of all of it."""
        digest = hashlib.sha256()
        update_with_tensors(digest, sorted(self._tensors().items()))
        return digest.hexdigest()

    def save(self, file: Path, made_for: Mapping[str, Any]) -> None:
        """Written whole or not at all; ``made_for`` tells what it was made from."""
        with atomic_write(file) as handle:
            handle.write(save(self._tensors(), {"made_for": _words(made_for)}))

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Raises ``SafetensorError`` or ``OSError`` where there is none."""
        with safe_open(str(file), "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return cls({d: tensors[f"pools.{d}"] for d in DIRECTIONS}, tensors["keys"], tensors["bounds"])

    def _tensors(self) -> dict[str, Tensor]:
        pools = {f"pools.{direction}": pool for direction, pool in self.pools.items()}
        return {**pools, "keys": self.keys, "bounds": self.bounds}


class WorkFolder:
    """Where a mining that is not finished keeps its plan and the scores of finished shards.

    Args:
        folder: below the bank's.
        made_for: identity and settings; plain containers. A folder that was made for others is of no use.
    """

    def __init__(self, folder: Path, made_for: Mapping[str, Any]) -> None:
        self.folder, self.made_for, self._hash = folder, made_for, ""

    def open_plan(self) -> Plan | None:
        """The plan of an interrupted mining of the same teacher, data and settings; None where there is none."""
        try:
            with safe_open(str(self.folder / PLAN), "pt") as opened:
                same = (opened.metadata() or {}).get("made_for") == _words(self.made_for)
            return self.adopt(Plan.load(self.folder / PLAN)) if same else self._start_anew()
        except (SafetensorError, OSError, KeyError):
            return None

    def _start_anew(self) -> None:
        log.info("%s: from a mining of another teacher, other data or settings; starting anew", self.folder)
        self.remove()

    def begin(self, plan: Plan) -> Plan:
        """Keeps a new plan."""
        self.remove()
        plan.save(self.folder / PLAN, self.made_for)
        return self.adopt(plan)

    def read_plan(self) -> Plan:
        """The plan that another process has kept."""
        return self.adopt(Plan.load(self.folder / PLAN))

    def adopt(self, plan: Plan) -> Plan:
        self._hash = plan.fingerprint()
        return plan

    def is_done(self, shard: int) -> bool:
        """Whether the scores of a shard of this plan are there."""
        try:
            with safe_open(str(self._file(shard)), "pt") as opened:
                return (opened.metadata() or {}).get("plan") == self._hash
        except (SafetensorError, OSError):
            return False

    def keep(self, shard: int, scores: list[Tensor]) -> None:
        """The scores of a shard, float32 ``[P]`` per teacher."""
        with atomic_write(self._file(shard)) as handle:
            handle.write(save({str(i): part for i, part in enumerate(scores)}, {"plan": self._hash}))

    def scores(self, plan: Plan, teachers: int) -> list[Tensor]:
        """Of all pairs, float32 ``[P]`` per teacher."""
        kept = [torch.empty(len(plan.keys)) for _ in range(teachers)]
        for shard in range(plan.shards):
            with safe_open(str(self._file(shard)), "pt") as opened:
                for i, scores in enumerate(kept):
                    scores[plan.bounds[shard] : plan.bounds[shard + 1]] = opened.get_tensor(str(i))
        return kept

    def remove(self) -> None:
        """Nothing of it is left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, shard: int) -> Path:
        # a folder of ten thousands of files is slow to look into
        return self.folder / f"{shard // 1000:04d}" / f"shard_{shard:07d}.safetensors"


def _bounds(keys: Tensor, texts: int) -> Tensor:
    """Cuts between pictures, so that a shard has few pictures and, unless one alone has more, few pairs."""
    ends = torch.unique_consecutive(keys // texts, return_counts=True)[1].cumsum(0).tolist()
    bounds, images = [0], 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        images += 1
        full = following is None or images == IMAGES_PER_SHARD or following - bounds[-1] > PAIRS_PER_SHARD
        if full:
            bounds.append(end)
            images = 0
    return torch.tensor(bounds)


def _words(made_for: Mapping[str, Any]) -> str:
    return json.dumps(made_for, sort_keys=True)


# ----------------------------------------------------------------------------------------------------
# From the scores of all pairs to the bank's tables.

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
