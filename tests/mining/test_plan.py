"""The plan of a mining, and the bank's tables against plain loops over the rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lavis_dcd.common.seeding import seed_for
from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT, TEXT_TO_IMAGE
from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.distillation.strategies import Draws, Stratified
from lavis_dcd.mining import plan as mining_plan
from lavis_dcd.mining.plan import Plan, bank_tables
from lavis_dcd.mining.pools import Pairing, with_random

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


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": torch.tensor([0.5])},
        {"keys": torch.arange(12).flip(0)},
        {"keys": torch.arange(12) + 2**62},
        {"keys": torch.arange(12) - 1},
        {"keys": torch.zeros(0, dtype=torch.int64)},
        {"bounds": torch.tensor([0, 3, 2, 12])},
        {"bounds": torch.tensor([0, 13])},
        {"bounds": torch.tensor([[0, 12]])},
        {"pools": {**POOLS, TEXT_TO_IMAGE: POOLS[TEXT_TO_IMAGE][:-1]}},
        {"pools": {**POOLS, TEXT_TO_IMAGE: POOLS[TEXT_TO_IMAGE] + 3}},
        {"pools": {**POOLS, TEXT_TO_IMAGE: POOLS[TEXT_TO_IMAGE] - 1}},
        {"pools": {**POOLS, TEXT_TO_IMAGE: POOLS[TEXT_TO_IMAGE].long()}},
    ],
)
def test_a_plan_of_what_is_not_there_is_refused(wrong):
    plan = Plan.of(PAIRING, POOLS)
    plan.check(PAIRING)
    assert len(plan.keys) == 12
    with pytest.raises(ValueError, match=r"pools|keys|bounds"):
        replace(plan, **wrong).check(PAIRING)


# -- tables -------------------------------------------------------------------------------------------------------

IDS = [i for i in range(11) for _ in range(2)]
CAPTIONS = [f"caption {(7 * n) % 19}" for n in range(22)]  # some stand at two pictures


def made(pool: int = 4) -> tuple[Pairing, Plan, list[torch.Tensor]]:
    pairing = Pairing.of(IDS, CAPTIONS)
    nothing = {d: torch.empty(pairing.queries(d), 0, dtype=torch.int32) for d in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)}
    plan = Plan.of(pairing, {d: with_random(pairing, d, chosen, pool, 0) for d, chosen in nothing.items()})
    random = torch.Generator().manual_seed(0)
    # the second teacher counts on another scale
    return pairing, plan, [torch.randn(len(plan.keys), generator=random) * 10**n + n for n in range(2)]


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("keep", [3, 50])
def test_the_highest_of_each_pool_with_the_match_in_front(teachers, keep):
    pairing, plan, scores = made()
    scores, weights = scores[:teachers], [1.0, 2.0][:teachers]
    tables = bank_tables(pairing, plan, scores, weights, keep)
    place = {int(key): n for n, key in enumerate(plan.keys)}
    pictures, texts = list(dict.fromkeys(IDS)), list(dict.fromkeys(CAPTIONS))
    for direction, table in tables.items():
        assert table.candidates.shape == (22, min(keep, 4)) and table.scores.shape == (22, 1 + min(keep, 4))
        for row in range(22):
            image, text = pictures.index(IDS[row]), texts.index(CAPTIONS[row])
            pool = plan.pools[direction][image if direction == IMAGE_TO_TEXT else text].tolist()
            pairs = [(image, item) if direction == IMAGE_TO_TEXT else (item, text) for item in pool]
            rows = [place[i * pairing.texts + t] for i, t in [(image, text), *pairs]]
            valid = torch.ones(1, 5, dtype=torch.bool)
            expected = combine([of_teacher[rows][None] for of_teacher in scores], valid, weights)[0]
            order = expected[1:].argsort(descending=True)[:keep]
            torch.testing.assert_close(table.scores[row], torch.cat([expected[:1], expected[1:][order]]))
            names = [CAPTIONS[r] if direction == IMAGE_TO_TEXT else IDS[r] for r in table.candidates[row].tolist()]
            known = texts if direction == IMAGE_TO_TEXT else pictures
            assert names == [known[pool[i]] for i in order.tolist()]
            first = CAPTIONS if direction == IMAGE_TO_TEXT else IDS
            assert all(r == first.index(first[r]) for r in table.candidates[row].tolist())


def test_fewer_candidates_than_columns():
    pairing, _, _ = made()
    pools = {
        IMAGE_TO_TEXT: torch.full((pairing.images, 2), -1, dtype=torch.int32),
        TEXT_TO_IMAGE: torch.full((pairing.texts, 1), -1, dtype=torch.int32),
    }
    pools[IMAGE_TO_TEXT][0, 0] = int(pairing.text_of_row[-1])
    plan = Plan.of(pairing, pools)
    tables = bank_tables(pairing, plan, [torch.full((len(plan.keys),), -3.0)], [1.0], 5)
    to_text = tables[IMAGE_TO_TEXT]
    last = int(pairing.row_of_text[pairing.text_of_row[-1]])
    assert to_text.candidates[0].tolist() == [last, -1]
    assert to_text.scores[0].tolist() == [-3, -3, 0] and to_text.scores[5].tolist() == [-3, 0, 0]
    assert tables[TEXT_TO_IMAGE].candidates.eq(-1).all()


def test_a_bank_may_keep_a_sample_over_the_range_of_the_scores():
    """40 pictures; the kept ones of each row are those that selection itself takes, best first."""
    pairing = Pairing.of(list(range(40)), [f"c{i}" for i in range(40)])
    others = torch.tensor([[i for i in range(40) if i != q] for q in range(40)]).int()
    pools = dict.fromkeys(DIRECTIONS, others)
    plan = Plan.of(pairing, pools)
    scores = torch.randn(len(plan.keys), generator=torch.Generator().manual_seed(2)).exp()
    tables = bank_tables(pairing, plan, [scores], [1.0], 6, Stratified(), seed=5)
    again = bank_tables(pairing, plan, [scores], [1.0], 6, Stratified(), seed=5)
    highest = bank_tables(pairing, plan, [scores], [1.0], 6)
    for direction, table in tables.items():
        known = {int(key): score for key, score in zip(plan.keys, scores, strict=True)}
        draws = Draws(torch.Generator().manual_seed(seed_for(5, "bank", direction)))
        levels = draws.uniform(40, 6, torch.device("cpu"))
        for row in range(40):
            pair = (lambda q, c: q * 40 + c) if direction == IMAGE_TO_TEXT else (lambda q, c: c * 40 + q)
            values = {c: float(known[pair(row, c)]) for c in range(40) if c != row}
            top, bottom, taken = max(values.values()), min(values.values()), []
            for k in range(6):
                level = top - (k + float(levels[row, k])) / 6 * (top - bottom)
                taken.append(min((c for c in values if c not in taken), key=lambda c: abs(values[c] - level)))
            assert sorted(taken, key=lambda c: -values[c]) == table.candidates[row].tolist()
            torch.testing.assert_close(
                table.scores[row, 1:].tolist(), [values[c] for c in table.candidates[row].tolist()]
            )
        assert torch.equal(table.candidates, again[direction].candidates)
        assert table.scores[:, -1].mean() < highest[direction].scores[:, -1].mean()
