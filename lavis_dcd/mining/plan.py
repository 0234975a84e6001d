"""The pairs of a mining, cut into shards and kept on disk for every process and restart; the tables of their scores."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import BoolTensor, Tensor

from lavis_dcd.banks.score_bank import BankTable
from lavis_dcd.common.files import atomic_write, update_with_tensors
from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT
from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.mining.pools import Pairing

log = logging.getLogger(__name__)

PLAN = "plan.safetensors"
PAIRS_PER_SHARD = 4096  # what an interruption costs at most
IMAGES_PER_SHARD = 64  # their features are held together
ROWS_AT_ONCE = 4096  # of the training set, whose tables are made together


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
        """Return the plan for these pools."""
        keys_of_pools = [pairing.match_keys()]
        for direction, pool in pools.items():
            items = pool.long()
            queries = torch.arange(len(pool))[:, None].expand_as(items)
            images, texts = (queries, items) if direction == IMAGE_TO_TEXT else (items, queries)
            keys_of_pools.append(pairing.keys(images, texts)[items >= 0].unique())
        keys = torch.unique(torch.cat(keys_of_pools))
        return cls(dict(pools), keys, _bounds(keys, pairing.texts))

    @property
    def shards(self) -> int:
        """The number of shards."""
        return len(self.bounds) - 1

    def shard(self, number: int) -> Tensor:
        """Return the keys of the shard's pairs."""
        return self.keys[self.bounds[number] : self.bounds[number + 1]]

    def pairs_in(self, number: int) -> int:
        """Return the number of the shard's pairs."""
        return int(self.bounds[number + 1] - self.bounds[number])

    def fingerprint(self) -> str:
        """Return a hash of all of it."""
        digest = hashlib.sha256()
        update_with_tensors(digest, sorted(self._tensors().items()))
        return digest.hexdigest()

    def save(self, file: Path, made_for: Mapping[str, Any]) -> None:
        """Write it whole or not at all; ``made_for`` describes the mining it was made for."""
        with atomic_write(file) as handle:
            handle.write(save(self._tensors(), {"made_for": _words(made_for)}))

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read a plan; raises ``SafetensorError`` or ``OSError`` where there is none."""
        with safe_open(str(file), "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return cls({d: tensors[f"pools.{d}"] for d in DIRECTIONS}, tensors["keys"], tensors["bounds"])

    def _tensors(self) -> dict[str, Tensor]:
        pools = {f"pools.{direction}": pool for direction, pool in self.pools.items()}
        return {**pools, "keys": self.keys, "bounds": self.bounds}


class WorkFolder:
    """The folder in which an unfinished mining keeps its plan and the scores of finished shards.

    Args:
        folder: below the bank's.
        made_for: identity and settings; plain containers. A folder that was made for others is of no use.
    """

    def __init__(self, folder: Path, made_for: Mapping[str, Any]) -> None:
        self.folder, self.made_for, self._hash = folder, made_for, ""

    def open_plan(self) -> Plan | None:
        """Return the plan of an interrupted mining of the same teacher, data and settings; None where there is none."""
        try:
            with safe_open(str(self.folder / PLAN), "pt") as opened:
                same = (opened.metadata() or {}).get("made_for") == _words(self.made_for)
            if same:
                return self.adopt(Plan.load(self.folder / PLAN))
        except (SafetensorError, OSError, KeyError):
            return None
        log.info("%s: from a mining of another teacher, other data or settings; starting anew", self.folder)
        self.remove()
        return None

    def begin(self, plan: Plan) -> Plan:
        """Keep a new plan, and nothing that was there before."""
        self.remove()
        plan.save(self.folder / PLAN, self.made_for)
        return self.adopt(plan)

    def read_plan(self) -> Plan:
        """Return the plan that another process has kept."""
        return self.adopt(Plan.load(self.folder / PLAN))

    def adopt(self, plan: Plan) -> Plan:
        """Take the shards of this plan alone for done."""
        self._hash = plan.fingerprint()
        return plan

    def is_done(self, shard: int) -> bool:
        """Return whether the scores of a shard of this plan are there."""
        try:
            with safe_open(str(self._file(shard)), "pt") as opened:
                return (opened.metadata() or {}).get("plan") == self._hash
        except (SafetensorError, OSError):
            return False

    def keep(self, shard: int, scores: list[Tensor]) -> None:
        """Keep the scores of a shard, float32 ``[P]`` per teacher."""
        with atomic_write(self._file(shard)) as handle:
            handle.write(save({str(i): of_teacher for i, of_teacher in enumerate(scores)}, {"plan": self._hash}))

    def scores(self, plan: Plan, teachers: int) -> list[Tensor]:
        """Return the scores of all pairs, float32 ``[P]`` per teacher."""
        of_teachers = [torch.empty(len(plan.keys)) for _ in range(teachers)]
        for shard in range(plan.shards):
            with safe_open(str(self._file(shard)), "pt") as opened:
                for i, scores in enumerate(of_teachers):
                    scores[plan.bounds[shard] : plan.bounds[shard + 1]] = opened.get_tensor(str(i))
        return of_teachers

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, shard: int) -> Path:
        # a folder of ten thousands of files is slow to look into
        return self.folder / f"{shard // 1000:04d}" / f"shard_{shard:07d}.safetensors"


def _bounds(keys: Tensor, texts: int) -> Tensor:
    """Cut between pictures, so that a shard has few pictures and, unless one alone has more, few pairs."""
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


def bank_tables(
    pairing: Pairing, plan: Plan, scores: Sequence[Tensor], weights: Sequence[float], keep: int
) -> dict[str, BankTable]:
    """Return per direction and row of the training set the match's score and the highest of its candidates.

    Several teachers' scores are standardised over the match and the pool of each row and averaged, as in training
    (``distillation.ensemble.combine``).

    Args:
        scores: of ``plan.keys``, float32 ``[P]`` per teacher.
        weights: of the teachers.
        keep: at most so many candidates per row.
    """
    tables = {}
    for direction, pool in plan.pools.items():
        to_text = direction == IMAGE_TO_TEXT
        sides = (pairing.image_of_row, pairing.text_of_row)
        queries, matches = sides if to_text else sides[::-1]
        row_of_item = pairing.row_of_text if to_text else pairing.row_of_image
        blocks = []
        for query, match in zip(queries.split(ROWS_AT_ONCE), matches.split(ROWS_AT_ONCE), strict=True):
            items = torch.cat([match[:, None], pool[query].long()], dim=1)
            pairs = (query[:, None].expand_as(items), items.clamp_min(0))
            keys = pairing.keys(*(pairs if to_text else pairs[::-1]))
            # entries that are none may have no pair; combine ignores what they hold
            places = torch.searchsorted(plan.keys, keys).clamp_max(len(plan.keys) - 1)
            valid = cast(BoolTensor, items >= 0)
            combined = combine([of_teacher[places] for of_teacher in scores], valid, weights)
            blocks.append(_highest(combined, items, valid, row_of_item, keep))
        tables[direction] = BankTable(*(torch.cat(columns) for columns in zip(*blocks, strict=True)))
    return tables


def _highest(scores: Tensor, items: Tensor, valid: Tensor, row_of_item: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the highest candidates of each row as rows of the training set ``[Q, K]``, and the scores ``[Q, 1+K]``.

    Args:
        scores: ``[Q, 1+N]``, the match first.
        items, valid: of the same shape.
        row_of_item: the first row of each item.
    """
    ranked = scores[:, 1:].masked_fill(~valid[:, 1:], -torch.inf).sort(dim=1, descending=True, stable=True)
    order, highest = ranked.indices[:, :keep], ranked.values[:, :keep]
    absent = highest == -torch.inf
    candidates = row_of_item[items[:, 1:].gather(1, order).clamp_min(0)].masked_fill(absent, -1).int()
    return candidates, torch.cat([scores[:, :1], highest.masked_fill(absent, 0.0)], dim=1)
