"""The pairs of a mining, cut into shards, and the tables that their scores make."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import BoolTensor, Tensor

from lavis_dcd.banks.score_bank import BankTable
from lavis_dcd.banks.tensor_files import faults_as_damage, mapped
from lavis_dcd.common.files import atomic_write, update_with_tensors
from lavis_dcd.common.seeding import seed_for
from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT
from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.distillation.strategies import Draws, Hardest, SelectionStrategy
from lavis_dcd.mining.pools import Pairing

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

    def save(self, file: Path) -> None:
        """Write it whole or not at all; raises an ``OSError`` where the disk is full."""
        with atomic_write(file) as handle:
            handle.write(save(self._tensors()))

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read a plan; raises a ``DamagedError`` where there is none."""
        tensors = {name: tensor.clone() for name, tensor in mapped(file).items()}
        with faults_as_damage(file.name):
            plan = cls({d: tensors.pop(f"pools.{d}") for d in DIRECTIONS}, tensors.pop("keys"), tensors.pop("bounds"))
            if tensors:
                raise ValueError(f"unknown tensors {', '.join(sorted(tensors))}")
        return plan

    def check(self, pairing: Pairing) -> None:
        """Compare it with the rows that it is for; raises a ``ValueError`` where it names what is not there."""
        for direction in DIRECTIONS:
            pool, items = self.pools[direction], pairing.candidates(direction)
            if pool.dtype != torch.int32 or pool.dim() != 2 or len(pool) != pairing.queries(direction):
                raise ValueError(f"pools of {direction} for other rows")
            if bool(((pool < -1) | (pool >= items)).any()):
                raise ValueError(f"pools of {direction} name items that are not there")
        for name, tensor in (("keys", self.keys), ("bounds", self.bounds)):
            if tensor.dtype != torch.int64 or tensor.dim() != 1 or not len(tensor):
                raise ValueError(f"no {name}")
        sorted_keys = bool((self.keys.diff() > 0).all()) and bool((self.bounds.diff() > 0).all())
        in_range = int(self.keys[0]) >= 0 and int(self.keys[-1]) < pairing.images * pairing.texts
        if not (sorted_keys and in_range) or (int(self.bounds[0]), int(self.bounds[-1])) != (0, len(self.keys)):
            raise ValueError("keys or bounds out of their order or range")

    def _tensors(self) -> dict[str, Tensor]:
        pools = {f"pools.{direction}": pool for direction, pool in self.pools.items()}
        return {**pools, "keys": self.keys, "bounds": self.bounds}


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


def bank_tables(
    pairing: Pairing,
    plan: Plan,
    scores: Sequence[Tensor],
    weights: Sequence[float],
    keep: int,
    by: SelectionStrategy | None = None,
    seed: int = 0,
) -> dict[str, BankTable]:
    """Return per direction and row of the training set the match's score and those of its candidates, the best first.

    Several teachers' scores are standardised over the match and the pool of each row and averaged, as in training
    (``distillation.ensemble.combine``).

    Args:
        scores: of ``plan.keys``, float32 ``[P]`` per teacher.
        weights: of the teachers.
        keep: at most so many candidates per row.
        by: which of them; the highest by default.
        seed: of a choice by chance.
    """
    tables, by = {}, by or Hardest()
    for direction, pool in plan.pools.items():
        to_text = direction == IMAGE_TO_TEXT
        sides = (pairing.image_of_row, pairing.text_of_row)
        queries, matches = sides if to_text else sides[::-1]
        row_of_item = pairing.row_of_text if to_text else pairing.row_of_image
        draws, blocks = Draws(torch.Generator().manual_seed(seed_for(seed, "bank", direction))), []
        for query, match in zip(queries.split(ROWS_AT_ONCE), matches.split(ROWS_AT_ONCE), strict=True):
            items = torch.cat([match[:, None], pool[query].long()], dim=1)
            pairs = (query[:, None].expand_as(items), items.clamp_min(0))
            keys = pairing.keys(*(pairs if to_text else pairs[::-1]))
            # entries that are none may have no pair; combine ignores what they hold
            places = torch.searchsorted(plan.keys, keys).clamp_max(len(plan.keys) - 1)
            valid = cast(BoolTensor, items >= 0)
            combined = combine([of_teacher[places] for of_teacher in scores], valid, weights)
            chosen = by.columns(valid[:, 1:], combined, min(keep, pool.shape[1]), draws)
            blocks.append(_best_first(combined, items, *chosen, row_of_item))
        tables[direction] = BankTable(*(torch.cat(columns) for columns in zip(*blocks, strict=True)))
    return tables


def _best_first(
    scores: Tensor, items: Tensor, columns: Tensor, real: Tensor, row_of_item: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the chosen candidates of each row as rows of the training set ``[Q, K]``, and the scores ``[Q, 1+K]``.

    Args:
        scores, items: ``[Q, 1+N]``, the match first.
        columns, real: the choice, as ``SelectionStrategy.columns`` returns it.
        row_of_item: the first row of each item.
    """
    ranked = scores.gather(1, columns).masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True)
    order, there = columns.gather(1, ranked.indices), real.gather(1, ranked.indices)
    candidates = row_of_item[items.gather(1, order).clamp_min(0)].masked_fill(~there, -1).int()
    return candidates, torch.cat([scores[:, :1], ranked.values.masked_fill(~there, 0.0)], dim=1)
