"""The teacher's top candidate as the match, against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT, CandidatePool
from lavis_dcd.distillation.pseudo_match import top_as_match


def pool_of(rows: torch.Tensor, valid: torch.Tensor, direction: str) -> CandidatePool:
    queries = torch.arange(len(rows))[:, None].expand_as(rows)
    both = (queries, rows) if direction == IMAGE_TO_TEXT else (rows, queries)
    return CandidatePool(*both, valid, direction)


def answers(pool: CandidatePool) -> torch.Tensor:
    return pool.text_rows if pool.direction == IMAGE_TO_TEXT else pool.image_rows


@st.composite
def scored_pools(draw):
    queries, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = torch.tensor([draw(st.permutations(range(width))) for _ in range(queries)])
    valid = torch.tensor([[True, *draw(st.lists(st.booleans(), min_size=width - 1, max_size=width - 1))]] * queries)
    scores = torch.tensor(draw(st.lists(st.lists(st.integers(-2, 2), min_size=width, max_size=width),
                                        min_size=queries, max_size=queries))).float()  # fmt: skip
    return pool_of(rows, valid, draw(st.sampled_from(DIRECTIONS))), scores


@given(scored_pools())
def test_equals_plain_loops(drawn):
    pool, scores = drawn
    found, found_scores = top_as_match(pool, scores)
    rows = answers(pool).tolist()
    for query, (of_query, usable, given_scores) in enumerate(
        zip(rows, pool.valid.tolist(), scores.tolist(), strict=True)
    ):
        entries = [(s, r) for r, v, s in zip(of_query, usable, given_scores, strict=True) if v]
        top = min(entries, key=lambda entry: (-entry[0], entry[1]))
        expected = [top, *sorted((e for e in entries if e != top), key=lambda entry: entry[1])]
        count = len(expected)
        assert found.valid[query].tolist() == [True] * count + [False] * (len(of_query) - count)
        assert answers(found)[query, :count].tolist() == [row for _, row in expected]
        assert found_scores[query, :count].tolist() == [score for score, _ in expected]
        assert sorted(answers(found)[query].tolist()) == sorted(of_query)
    assert found.direction == pool.direction


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_which_candidate_stands_first_changes_nothing(direction):
    random = torch.Generator().manual_seed(0)
    by_row = torch.randn(7, 9, generator=random)
    results = []
    for _ in range(3):
        rows = torch.stack([torch.randperm(9, generator=random) for _ in range(7)])
        pool = pool_of(rows, torch.ones(7, 9, dtype=torch.bool), direction)
        results.append(top_as_match(pool, by_row.gather(1, rows)))
    for pool, scores in results[1:]:
        assert torch.equal(answers(pool), answers(results[0][0])) and torch.equal(scores, results[0][1])


def test_masked_scores_are_never_the_top():
    valid = torch.tensor([[True, False, True]])
    pool, scores = top_as_match(pool_of(torch.tensor([[0, 1, 2]]), valid, IMAGE_TO_TEXT),
                                torch.tensor([[1.0, torch.inf, 2.0]]))  # fmt: skip
    assert answers(pool).tolist() == [[2, 0, 1]] and pool.valid.tolist() == [[True, True, False]]
    assert scores[0, :2].tolist() == [2.0, 1.0]


def test_scores_of_another_shape():
    pool = pool_of(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool), IMAGE_TO_TEXT)
    with pytest.raises(ValueError, match=r"one shape \[Q, 1\+C\], got \(1, 3\) and \(1, 2\)"):
        top_as_match(pool, torch.zeros(1, 3))
