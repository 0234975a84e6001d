import pytest
import torch

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.diagnostics import diagnostics, match_rank, spread
from lavis_dcd.distillation.selection import Selection


def selection(scores: list[list[float]] | None, valid: list[list[int]]) -> Selection:
    valid = torch.tensor(valid, dtype=torch.bool)
    rows = torch.zeros(valid.shape, dtype=torch.long)
    return Selection(rows, rows, None if scores is None else torch.tensor(scores), valid)


def test_means_over_queries_that_have_a_negative():
    wide = selection([[3.0, 1.0, 9.0], [2.0, 4.0, 0.0], [7.0, 0.0, 0.0]], [[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    narrow = selection([[5.0, 5.0]], [[1, 1]])
    student = [torch.tensor([[0.0, -1.0, 8.0], [1.0, 0.5, 0.7], [9.0, 9.0, 9.0]]), torch.tensor([[2.0, 3.0]])]
    found = {name: value.item() for name, value in diagnostics([wide, narrow], student).items()}
    assert found == pytest.approx({
        "student_match_score": 1.0, "student_hardest_score": (-1 + 0.7 + 3) / 3, "student_misranked": 1 / 3,
        "teacher_match_score": 10 / 3, "teacher_hardest_score": 10 / 3, "teacher_misranked": 2 / 3,
        "student_spread": (1 + 0.5 + 1) / 3 / 3,
    })  # fmt: skip


def test_a_teacher_that_did_not_score_is_left_out():
    found = diagnostics([selection(None, [[1, 1]])], [torch.tensor([[2.0, 1.0]])])
    assert sorted(found) == ["student_hardest_score", "student_match_score", "student_misranked", "student_spread"]


def boolean(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def test_a_dead_student_has_no_spread_whatever_it_says():
    valid = [boolean([[1, 1, 1], [1, 1, 0]]), boolean([[1, 1], [1, 0]])]
    for level in (0.0, 3.0, -7.5):
        dead = [torch.full(v.shape, level) + torch.where(v, 0.0, 9.0) for v in valid]
        assert spread(dead, valid) == 0.0
    # per query constant, from query to query not: still nothing to rank by
    assert spread([torch.tensor([[1.0, 1.0, 1.0], [5.0, 5.0, 0.0]])], valid[:1]) == 0.0
    assert spread([torch.tensor([[0.0, 2.0, -2.0], [1.0, 1.0, 0.0]])], valid[:1]) == pytest.approx((4 + 0) / 2 / 2)
    assert spread([torch.ones(2, 2)], [boolean([[1, 0], [1, 0]])]).isnan()


def test_the_rank_of_the_match_is_the_share_above_it():
    wide = (boolean([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]),
            torch.tensor([[2.0, 3.0, 1.0, 2.0], [0.0, 1.0, 1.0, -9.0], [0.0, 9.0, 9.0, 9.0]]))  # fmt: skip
    narrow = (boolean([[1, 1]]), torch.tensor([[1.0, 0.0]]))
    assert match_rank([wide, narrow]) == pytest.approx((1.5 / 3 + 1 + 0) / 3)
    generator = torch.Generator().manual_seed(0)
    for candidates in (2, 10, 100):  # chance is one half, however many there are
        scores = torch.randn(4000, 1 + candidates, generator=generator)
        assert match_rank([(torch.ones(scores.shape, dtype=torch.bool), scores)]) == pytest.approx(0.5, abs=0.03)


def test_the_teacher_is_judged_by_its_pool():
    valid = boolean([[1, 1, 1]])
    rows = torch.zeros(valid.shape, dtype=torch.long)
    pool = CandidatePool(rows, rows, valid, "image_to_text")
    seen = selection([[1.0, 2.0]], [[1, 1]])
    scores = torch.tensor([[1.0, 2.0, 0.0]])
    found = diagnostics([seen], [torch.tensor([[0.0, 1.0]])], [(pool, scores), (pool, None)])
    assert found["teacher_match_rank"] == 0.5
    assert "teacher_match_rank" not in diagnostics([seen], [torch.tensor([[0.0, 1.0]])], [(pool, None)])
