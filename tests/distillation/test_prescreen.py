"""What a prescreen keeps, and the share of the teacher's hardest candidates among it, against plain loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.prescreen import found_share, most_promising, range_share, within_budget
from lavis_dcd.distillation.strategies import Draws, Mixed, Random, Stratified


def pool_of(valid):
    queries, width = valid.shape
    rows = torch.arange(queries)[:, None].expand(queries, width)
    return CandidatePool(rows, torch.arange(width).expand(queries, width), valid, "image_to_text")


def draws(seed):
    return Draws(torch.Generator().manual_seed(seed))


def best(scores, valid, count):
    """Columns of the ``count`` highest valid candidates, the earlier one first among equals."""
    columns = [c for c in range(1, len(scores)) if valid[c]]
    return sorted(columns, key=lambda c: -float(scores[c]))[:count]


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 4), width=st.integers(2, 8), keep=st.integers(1, 9), hardest=st.integers(1, 5),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_against_plain_loops(queries, width, keep, hardest, seed):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(queries, width, generator=generator) < 0.8
    valid[:, 0] = True
    cheap, teacher = (torch.rand(queries, width, generator=generator) for _ in range(2))
    pool = pool_of(valid)
    kept = most_promising(pool, cheap, keep)
    wanted = found = 0
    for q in range(queries):
        mine = best(cheap[q], valid[q], keep)
        assert kept.valid[q].nonzero()[:, 0].tolist() == [0, *sorted(mine)]
        true = best(teacher[q], valid[q], hardest)
        wanted, found = wanted + len(true), found + len(set(true) & set(mine))
    share = found_share(pool, kept, teacher, hardest)
    if wanted:
        assert float(share) == pytest.approx(found / wanted)
    else:
        assert share.isnan()


def test_the_teachers_own_scores_find_all():
    scores = torch.rand(5, 20)
    pool = pool_of(torch.ones(5, 20, dtype=torch.bool))
    assert float(found_share(pool, most_promising(pool, scores, 7), scores, 7)) == 1.0
    worst = most_promising(pool, -scores, 7)
    assert float(found_share(pool, worst, scores, 7)) == 0.0


def test_nothing_kept_is_refused():
    with pytest.raises(ValueError, match="at least 1 candidate"):
        most_promising(pool_of(torch.ones(1, 3, dtype=torch.bool)), None, 0)


# Pools cut to the teacher's budget, against loops.


def make_pool(valid: torch.Tensor) -> CandidatePool:
    queries, width = valid.shape
    images = torch.arange(queries)[:, None].expand(queries, width)
    return CandidatePool(images, 100 * images + torch.arange(width), valid, "image_to_text")


@st.composite
def cases(draw):
    queries, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    valid = torch.rand(queries, width, generator=generator) < 0.7
    valid[:, 0] = True
    cheap = torch.randint(-3, 4, (queries, width), generator=generator).float()  # few levels: many ties
    return valid, cheap, draw(st.integers(1, 60))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_the_most_promising_candidates_stay(case):
    valid, cheap, budget = case
    pool = make_pool(valid)
    before = valid.clone()
    cut = within_budget(pool, cheap, budget)
    per_query = max(2, budget // len(valid))
    for q, (row, ok) in enumerate(zip(cheap.tolist(), valid.tolist(), strict=True)):
        usable = sorted((c for c in range(1, len(row)) if ok[c]), key=lambda c: (-row[c], c))
        kept = {0, *usable[: per_query - 1]}
        assert cut.valid[q].tolist() == [c in kept for c in range(len(row))]
    assert torch.equal(cut.text_rows, pool.text_rows) and torch.equal(cut.image_rows, pool.image_rows)
    assert cut.direction == pool.direction and torch.equal(pool.valid, before)
    assert int(cut.valid.sum()) <= max(budget, 2 * len(valid))


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(0, 1000))
def test_without_cheap_scores_chance_decides_repeatably(case, seed):
    valid, _, budget = case
    pool = make_pool(valid)
    first, again = (within_budget(pool, None, budget, draws=draws(seed)).valid for _ in range(2))
    assert torch.equal(first, again) and not (first & ~valid).any() and first[:, 0].all()
    most = valid[:, 1:].sum(1).clamp_max(max(2, budget // len(valid)) - 1)
    assert torch.equal(first[:, 1:].sum(1), most)


def test_every_candidate_has_its_chance():
    pool = make_pool(torch.ones(200, 6, dtype=torch.bool))
    cut = within_budget(pool, None, 400, draws=draws(0))
    counts = cut.valid[:, 1:].sum(0)
    assert counts.sum() == 200 and (counts > 20).all()


def test_minus_infinity_is_promise_enough_and_masked_entries_are_not():
    valid = torch.tensor([[True, False, True, True]])
    cheap = torch.tensor([[0.0, 9.0, float("-inf"), float("nan")]])
    cheap[0, 3] = float("-inf")
    assert within_budget(make_pool(valid), cheap, 2).valid.tolist() == [[True, False, True, False]]


def test_faults_are_named():
    pool = make_pool(torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least 1 pair, got 0"):
        within_budget(pool, None, 0)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        within_budget(pool, torch.zeros(2, 3), 8)


def test_a_selection_over_the_range_of_scores_leaves_candidates_over_the_range_of_the_cheap_ones():
    scores = torch.linspace(0, 1, 101).expand(6, 101)
    pool = make_pool(torch.ones(6, 101, dtype=torch.bool))
    hardest = most_promising(pool, scores, 10)
    spread = most_promising(pool, scores, 10, Stratified(), draws(0))
    for q in range(6):
        assert hardest.valid[q].nonzero()[1:, 0].tolist() == list(range(91, 101))
        left = scores[q, spread.valid[q].nonzero()[1:, 0]].tolist()
        assert [int(10 * x - 1e-6) for x in left] == sorted(int(10 * x - 1e-6) for x in left) and len(left) == 10
        assert max(b - a for a, b in pairwise(left)) <= 0.21  # a stratum is 0.1 wide
    assert float(range_share(pool, hardest, scores)) == pytest.approx(0.09 / 0.99)
    assert float(range_share(pool, spread, scores)) > 0.8


def test_a_mixed_selection_leaves_the_hardest_and_others():
    scores = torch.linspace(0, 1, 101).expand(6, 101)
    pool = make_pool(torch.ones(6, 101, dtype=torch.bool))
    cut = most_promising(pool, scores, 10, Mixed(0.5), draws(0))
    assert cut.valid[:, 96:].all() and (cut.valid[:, 1:96].sum(1) == 5).all()


def test_a_selection_without_a_teacher_leaves_the_highest():
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(0))
    pool = make_pool(torch.ones(4, 30, dtype=torch.bool))
    assert torch.equal(most_promising(pool, scores, 5, Random(), draws(0)).valid, most_promising(pool, scores, 5).valid)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 9))
def test_the_share_of_the_range_against_loops(case, keep):
    valid, scores, _ = case
    pool = make_pool(valid)
    cut = most_promising(pool, scores + 0.1 * torch.arange(scores.shape[1]).flip(0), keep)
    shares = []
    for q in range(len(valid)):
        of_all = [float(scores[q, c]) for c in range(1, valid.shape[1]) if valid[q, c]]
        of_cut = [float(scores[q, c]) for c in range(1, valid.shape[1]) if cut.valid[q, c]]
        if of_all and max(of_all) > min(of_all):
            shares.append((max(of_cut) - min(of_cut)) / (max(of_all) - min(of_all)))
    share = range_share(pool, cut, scores)
    assert share.isnan() if not shares else float(share) == pytest.approx(sum(shares) / len(shares))
