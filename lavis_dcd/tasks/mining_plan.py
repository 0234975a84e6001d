"""The pairs of a mining, cut into shards; on disk, so that every process and every restart works on the same."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.hashing import update_with_tensors
from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT
from lavis_dcd.tasks.mining_pools import Pairing

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
