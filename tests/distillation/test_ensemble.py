"""Combined teachers against loops in NumPy, and what must not change the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavis_dcd.distillation import ensemble
from lavis_dcd.distillation.ensemble import Combination, combine, standardise


@st.composite
def ensembles(draw):
    """Tables [Q, N] of one to four teachers, a mask and weights; whole numbers, so that ties are frequent."""
    teachers, queries, width = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    tables = [torch.randint(-4, 5, (queries, width), generator=generator).float() for _ in range(teachers)]
    valid = torch.rand(queries, width, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.1]))
    weights = [draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) for _ in range(teachers)]
    if not sum(weights):
        weights[0] = 2.0
    return tables, valid, weights


def slow_row(row: np.ndarray, ok: np.ndarray) -> np.ndarray:
    out = np.zeros(len(row))
    kept = row[ok]
    if len(kept) and kept.max() > kept.min():
        out[ok] = (kept - kept.mean()) / kept.std()
    return out


def slow_combination(tables: list[Tensor], valid: Tensor, weights: list[float]) -> np.ndarray:
    tables, mask = [table.double().numpy() for table in tables], valid.numpy()
    shares = np.array(weights) / sum(weights)
    out = np.zeros(mask.shape)
    for q, ok in enumerate(mask):
        if not ok.any():
            continue
        if np.count_nonzero(shares) == 1:
            out[q, ok] = tables[int(shares.argmax())][q, ok]
            continue
        average = sum(share * slow_row(table[q], ok) for share, table in zip(shares, tables, strict=True))
        mean = sum(share * table[q, ok].mean() for share, table in zip(shares, tables, strict=True))
        deviation = sum(share * table[q, ok].std() for share, table in zip(shares, tables, strict=True))
        out[q, ok] = average[ok] * deviation + mean
    return out


@settings(deadline=None, max_examples=150)
@given(ensembles())
def test_combination_agrees_with_loops(case):
    tables, valid, weights = case
    dirty = [table.masked_fill(~valid, float("nan")) for table in tables]
    got = combine(dirty, valid, weights)
    assert got.dtype == torch.float32 and (got[~valid] == 0).all()
    np.testing.assert_allclose(got.numpy(), slow_combination(tables, valid, weights), atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(ensembles())
def test_standardised_rows_agree_with_loops(case):
    (table, *_), valid, _ = case
    rows = zip(table.double().numpy(), valid.numpy(), strict=True)
    expected = np.stack([slow_row(row, ok) for row, ok in rows])
    np.testing.assert_allclose(standardise(table, valid).numpy(), expected, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(ensembles(), st.sampled_from([0.5, 3.0, 100.0]), st.sampled_from([-50.0, 0.0, 7.0]), st.integers(0, 3))
def test_an_affine_change_of_a_teacher_keeps_the_order(case, scale, shift, which):
    tables, _, weights = case
    valid = torch.ones_like(tables[0], dtype=torch.bool)
    changed = list(tables)
    changed[which % len(tables)] = scale * tables[which % len(tables)] + shift
    first, second = combine(tables, valid, weights), combine(changed, valid, weights)
    gaps = [scores[:, :, None] - scores[:, None, :] for scores in (first, second)]
    # a tie may come apart by a rounding error
    clear = gaps[0].abs() > 1e-3
    assert torch.equal(gaps[0][clear].sign(), gaps[1][clear].sign())


@settings(deadline=None, max_examples=50)
@given(ensembles(), st.randoms(use_true_random=False))
def test_the_order_of_candidates_queries_and_teachers_does_not_matter(case, random):
    tables, valid, weights = case
    rows, columns, order = (list(range(n)) for n in (*valid.shape, len(tables)))
    for items in (rows, columns, order):
        random.shuffle(items)
    moved = [tables[k][rows][:, columns] for k in order]
    got = combine(moved, valid[rows][:, columns], [weights[k] for k in order])
    torch.testing.assert_close(got, combine(tables, valid, weights)[rows][:, columns], atol=1e-5, rtol=1e-5)


def test_one_teacher_is_returned_as_it_is():
    table = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    expected = table.masked_fill(~valid, 0.0)
    assert torch.equal(combine([table], valid, [7.0]), expected)
    silent = torch.full_like(table, float("nan"))
    assert torch.equal(combine([silent, table], valid, [0.0, 2.0]), expected)


def test_two_equal_teachers_are_one_and_two_opposed_ones_know_nothing():
    table = torch.tensor([[3.0, 1.0, -2.0]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(combine([table, table], valid, [1.0, 2.0]), table)
    torch.testing.assert_close(combine([table, -table], valid, [1.0, 1.0]), torch.zeros(1, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_no_scale_is_too_small_or_too_large(scale, offset):
    rows = scale * (torch.tensor([[0.0, 1.0, 3.0, 4.0], [0.1, 0.1, 0.1, 0.1]]) + offset)
    valid = torch.ones(2, 4, dtype=torch.bool)
    unit = torch.tensor([-2.0, -1.0, 1.0, 2.0]) / 2.5**0.5
    torch.testing.assert_close(standardise(rows, valid), torch.stack([unit, torch.zeros(4)]), atol=1e-5, rtol=1e-5)


def test_equal_scores_far_from_zero_are_equal_still():
    rows = torch.full((1, 7), 12345.678)
    valid = torch.tensor([[True] * 6 + [False]])
    assert (standardise(rows, valid) == 0).all()


def test_faults_are_named():
    table, valid = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for tables, weights in (
        ([], []),
        ([table], [1.0, 1.0]),
        ([table, table], [0.0, 0.0]),
        ([table, table], [2.0, -1.0]),
        ([table, table], [1.0, float("nan")]),
        ([table, table], [1.0, float("inf")]),
    ):
        with pytest.raises(ValueError, match="an ensemble needs one weight per table"):
            combine(tables, valid, weights)
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 3\)"):
        combine([table, torch.zeros(2, 4)], valid, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(2, 3\)"):
        standardise(table[:1], valid)


@given(ensembles())
@settings(deadline=None)
def test_tables_that_come_one_after_another_give_the_same_to_the_bit(case):
    tables, valid, weights = case
    expected = combine(tables, torch.ones_like(valid), weights)
    found = Combination(weights)
    for table in tables:
        found.add(table.clone())
    assert torch.equal(found.result(), expected)


def test_many_rows_are_combined_in_blocks(monkeypatch):
    monkeypatch.setattr(ensemble, "SCORES_PER_BLOCK", 21)
    tables = [torch.randn(10, 7), 5 * torch.randn(10, 7)]
    found = Combination([1.0, 2.0])
    found.add(tables[0])
    with pytest.raises(ValueError, match="1 tables for 2 weights"):
        found.result()
    found.add(tables[1])
    assert torch.equal(found.result(), combine(tables, torch.ones(10, 7, dtype=torch.bool), [1.0, 2.0]))
