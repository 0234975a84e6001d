"""Strategies of selection against plain loops, over drawn scores, masks and numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.losses import KullbackLeibler, ListwiseCrossEntropy
from lavis_dcd.distillation.selection import select
from lavis_dcd.distillation.strategies import Draws, Stratified, build_strategy, represented


def draws(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


@st.composite
def cases(draw):
    queries, width = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    levels = st.one_of(st.sampled_from([-1.0, 0.0, 2.0]), st.floats(-20, 20, width=32))
    scores = torch.tensor([[draw(levels) for _ in range(1 + width)] for _ in range(queries)])
    usable = torch.tensor([[draw(st.booleans()) for _ in range(width)] for _ in range(queries)])
    return scores, usable, draw(st.integers(1, 14)), draw(st.integers(0, 2**31))


def slow_stratified(scores, usable, jitter):
    """One query, in plain Python: the candidate nearest to each level, levels from high to low."""
    remaining = [c for c, ok in enumerate(usable) if ok]
    if not remaining:
        return []
    high, low = max(scores[c] for c in remaining), min(scores[c] for c in remaining)
    chosen = []
    for k, shift in enumerate(jitter):
        if not remaining:
            break
        level = high - (k + shift) / len(jitter) * (high - low)
        nearest = min(remaining, key=lambda c: (abs(scores[c] - level), c))
        chosen.append(nearest)
        remaining.remove(nearest)
    return chosen


@settings(deadline=None, max_examples=200)
@given(cases())
def test_stratified_agrees_with_loops(case):
    scores, usable, count, seed = case
    scores = scores.double()
    columns, real = Stratified().columns(usable, scores, count, draws(seed))
    jitter = torch.rand(len(scores), count, generator=torch.Generator().manual_seed(seed)).tolist()
    for q in range(len(scores)):
        expected = slow_stratified(scores[q, 1:].tolist(), usable[q].tolist(), jitter[q])
        assert columns[q].tolist() == [1 + c for c in expected] + [0] * (count - len(expected))
        assert real[q].tolist() == [True] * len(expected) + [False] * (count - len(expected))


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from(["hardest", "mixed", "random", "stratified"]))
def test_every_strategy_takes_usable_candidates_once_and_as_many_as_there_are(case, name):
    scores, usable, count, seed = case
    columns, real = build_strategy(name).columns(usable, scores, count, draws(seed))
    assert columns.shape == real.shape == (len(scores), count)
    for row, is_real, ok in zip(columns.tolist(), real.tolist(), usable.tolist(), strict=True):
        taken = [c for c, r in zip(row, is_real, strict=True) if r]
        assert len(set(taken)) == len(taken) == min(count, sum(ok)) and all(ok[c - 1] for c in taken)
        assert all(c == 0 for c, r in zip(row, is_real, strict=True) if not r)
        assert sorted(is_real, reverse=True) == is_real


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_mixed_has_the_hardest_first_and_draws_among_the_rest(case, share):
    scores, usable, count, seed = case
    columns, real = build_strategy("mixed", hard_share=share).columns(usable, scores, count, draws(seed))
    hard = math.ceil(count * share)
    hardest, hardest_real = build_strategy("hardest").columns(usable, scores, hard, draws())
    first = min(hard, int(usable.sum(1).min()))
    assert torch.equal(columns[:, :first], hardest[:, :first]) and torch.equal(real[:, :first], hardest_real[:, :first])


def test_mixed_draws_every_candidate_that_is_not_among_the_hardest():
    scores = torch.arange(11.0).expand(400, 11)
    columns, _ = build_strategy("mixed").columns(torch.ones(400, 10, dtype=torch.bool), scores, 4, draws())
    assert columns[:, :2].tolist() == [[10, 9]] * 400
    counts = torch.bincount(columns[:, 2:].flatten(), minlength=11)
    assert counts[:1].sum() == counts[9:].sum() == 0
    assert (counts[1:9] - 100).abs().max() < 45  # 800 draws over 8; a deviation of 5 standard errors


def test_stratified_covers_the_range_of_the_scores_where_random_covers_the_ranks():
    """Most candidates are easy: 90 lie near -10, 10 between 0 and 10."""
    scores = torch.cat([torch.zeros(1), torch.linspace(-10.1, -9.9, 90), torch.linspace(0, 10, 10)]).expand(200, 101)
    usable = torch.ones(200, 100, dtype=torch.bool)
    hard = {
        name: (build_strategy(name).columns(usable, scores, 8, draws())[0] > 90).float().sum(1).mean()
        for name in ("random", "stratified")
    }
    assert hard["random"] < 1.5 and 3.5 < hard["stratified"] < 6


def test_levels_move_within_their_strata_from_draw_to_draw():
    scores = torch.linspace(0, 1, 1001)[None]
    usable = torch.ones(1, 1000, dtype=torch.bool)
    chosen = [scores[0, Stratified().columns(usable, scores, 4, draws(seed))[0][0]] for seed in range(50)]
    for values in chosen:
        assert [int((1 - v - 1e-6) * 4) for v in values.clamp(0.002, 0.999).tolist()] == [0, 1, 2, 3]
    assert len({tuple(values.tolist()) for values in chosen}) > 45


@pytest.mark.parametrize("name", ["mixed", "random", "stratified"])
def test_a_query_draws_the_same_in_whichever_process_it_is(name):
    generator = torch.Generator().manual_seed(1)
    scores, usable = torch.randn(7, 21, generator=generator), torch.rand(7, 20, generator=generator) > 0.2
    whole = build_strategy(name).columns(usable, scores, 5, draws(9))
    parts = [
        build_strategy(name).columns(usable[rows], scores[rows], 5, Draws(torch.Generator().manual_seed(9), 7, rows))
        for rows in (slice(0, 4), slice(4, 7))
    ]
    for result, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(result, torch.cat(of_parts))


def test_errors_name_what_is_wrong():
    for name in ("hardest", "mixed", "stratified"):
        with pytest.raises(ValueError, match=f"'{name}' needs teacher_scores"):
            build_strategy(name).columns(torch.ones(1, 2, dtype=torch.bool), None, 1, draws())
    with pytest.raises(ValueError, match="hard_share must lie in"):
        build_strategy("mixed", hard_share=1.5)
    with pytest.raises(ValueError, match="2 queries are selected"):
        Draws(None, 7, slice(0, 4)).uniform(2, 3, torch.device("cpu"))


def slow_counts(scores, usable, chosen):
    """One query, in plain Python: every candidate that was not chosen counts for the nearest that was."""
    counts = [1] * len(chosen)
    for c, ok in enumerate(usable):
        if ok and c not in chosen:
            nearest = min(range(len(chosen)), key=lambda i: (abs(scores[chosen[i]] - scores[c]), -scores[chosen[i]]))
            counts[nearest] += 1
    return counts


@settings(deadline=None, max_examples=200)
@given(cases(), st.sampled_from(["hardest", "random", "stratified"]))
def test_counts_agree_with_loops(case, name):
    scores, usable, count, seed = case
    scores = (scores * 4).round().double()  # sums and halves of these are exact, so that ties are ties
    columns, real = build_strategy(name).columns(usable, scores, count, draws(seed))
    counts = represented(scores[:, 1:], usable, columns, real)
    for q in range(len(scores)):
        chosen = [c - 1 for c, r in zip(columns[q].tolist(), real[q].tolist(), strict=True) if r]
        values = [scores[q, 1 + c].item() for c in chosen]
        expected = slow_counts(scores[q, 1:].tolist(), usable[q].tolist(), chosen)
        # of chosen ones with equal scores any may stand for the others
        for value in set(values):
            same = [i for i, v in enumerate(values) if v == value]
            assert sum(counts[q][i].item() for i in same) == sum(expected[i] for i in same)
        assert counts[q][: len(chosen)].sum() == usable[q].sum() or not chosen


def test_a_reweighted_row_estimates_the_whole_pools():
    """Stratified 8 of 400: both terms come near to those over all, and do not without the counts."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(300, 401, generator=generator, dtype=torch.float64) * 1.5
    student = teacher + 0.7 * torch.randn(300, 401, generator=generator, dtype=torch.float64)
    teacher[:, 0] += 6
    student[:, 0] += 6
    pool = make_pool(torch.ones(300, 401, dtype=torch.bool))
    chosen = select(pool, teacher, 8, "stratified", draws=draws(1), reweight=True)
    columns = chosen.text_rows - 1000 * torch.arange(300)[:, None]
    assert (chosen.log_counts[:, 0] == 0).all()
    assert torch.equal(chosen.log_counts[:, 1:].exp().round().sum(1), torch.full((300,), 400.0, dtype=torch.float64))

    def error(term, *args):
        whole = term(*args, torch.ones_like(student, dtype=torch.bool)).mean()
        few = [arg.gather(1, columns) for arg in args]
        return [
            (term(*few, chosen.valid, **counts).mean() - whole).abs() / whole
            for counts in ({"log_counts": chosen.log_counts}, {})
        ]

    for counted, uncounted in (error(KullbackLeibler(), teacher, student), error(ListwiseCrossEntropy(), student)):
        assert counted < 0.3 and counted < uncounted / 3, (counted, uncounted)


def make_pool(valid):
    queries, width = valid.shape
    images = torch.arange(queries)[:, None].expand(queries, width)
    return CandidatePool(images, 1000 * images + torch.arange(width), valid, "image_to_text")
