"""The plan of a mining and what an interruption leaves of it."""

from __future__ import annotations

import pytest
import torch

from lavis_dcd.distillation.candidates import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from lavis_dcd.mining import plan as mining_plan
from lavis_dcd.mining.plan import Plan, WorkFolder
from lavis_dcd.mining.pools import Pairing

PAIRING = Pairing.of([0, 0, 1, 2, 3], ["a", "b", "c", "d", "e"])
POOLS = {
    IMAGE_TO_TEXT: torch.tensor([[2, 3], [0, -1], [4, 0], [1, 0]], dtype=torch.int32),
    TEXT_TO_IMAGE: torch.tensor([[1], [3], [0], [-1], [2]], dtype=torch.int32),
}


def test_every_pair_once_and_every_match():
    plan = Plan.of(PAIRING, POOLS)
    found = [(int(key) // 5, int(key) % 5) for key in plan.keys]
    own = {(0, 0), (0, 1), (1, 2), (2, 3), (3, 4)}
    to_text = {(0, 2), (0, 3), (1, 0), (2, 4), (2, 0), (3, 1), (3, 0)}
    to_image = {(1, 0), (3, 1), (0, 2), (2, 4)}
    assert found == sorted(own | to_text | to_image)


@pytest.mark.parametrize(("pairs", "pictures"), [(5, 64), (1, 64), (1000, 2), (1000, 64)])
def test_shards_cut_between_pictures(monkeypatch, pairs, pictures):
    monkeypatch.setattr(mining_plan, "PAIRS_PER_SHARD", pairs)
    monkeypatch.setattr(mining_plan, "IMAGES_PER_SHARD", pictures)
    plan = Plan.of(PAIRING, POOLS)
    shards = [plan.shard(number) for number in range(plan.shards)]
    assert torch.cat(shards).equal(plan.keys)
    owners = [set((shard // 5).tolist()) for shard in shards]
    assert sum(len(of_shard) for of_shard in owners) == 4
    assert all(len(of_shard) <= pictures for of_shard in owners)
    assert all(len(shard) <= pairs or len(of_shard) == 1 for shard, of_shard in zip(shards, owners, strict=True))
    if pairs == pictures == 1000:
        assert plan.shards == 1


def test_work_goes_on_only_from_the_same(tmp_path, caplog):
    caplog.set_level("INFO")
    made_for = {"identity": {"data": "x"}, "settings": {"keep": 3}}
    work = WorkFolder(tmp_path / "work", made_for)
    assert work.open_plan() is None
    plan = work.begin(Plan.of(PAIRING, POOLS))
    scores = [torch.arange(plan.pairs_in(0)).float(), torch.rand(plan.pairs_in(0))]
    work.keep(0, scores)
    again = WorkFolder(tmp_path / "work", made_for)
    kept = again.open_plan()
    assert kept.keys.equal(plan.keys) and kept.fingerprint() == plan.fingerprint()
    assert again.is_done(0) and not again.is_done(1)
    assert all(a.equal(b) for a, b in zip(again.scores(kept, 2), scores, strict=True))
    other = WorkFolder(tmp_path / "work", {**made_for, "settings": {"keep": 4}})
    assert other.open_plan() is None
    assert "starting anew" in caplog.text
    assert not (tmp_path / "work").exists()


def test_a_shard_of_another_plan_does_not_count(tmp_path):
    work = WorkFolder(tmp_path / "work", {})
    plan = work.begin(Plan.of(PAIRING, POOLS))
    work.keep(0, [torch.zeros(plan.pairs_in(0))])
    work.adopt(Plan.of(PAIRING, {**POOLS, TEXT_TO_IMAGE: POOLS[TEXT_TO_IMAGE].flip(0)}))
    assert not work.is_done(0)


def test_half_a_plan_is_none(tmp_path):
    work = WorkFolder(tmp_path / "work", {})
    work.begin(Plan.of(PAIRING, POOLS))
    file = tmp_path / "work" / mining_plan.PLAN
    file.write_bytes(file.read_bytes()[:100])
    assert work.open_plan() is None
