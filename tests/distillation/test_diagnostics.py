import pytest
import torch

from lavis_dcd.distillation.diagnostics import diagnostics
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
    })  # fmt: skip


def test_a_teacher_that_did_not_score_is_left_out():
    found = diagnostics([selection(None, [[1, 1]])], [torch.tensor([[2.0, 1.0]])])
    assert sorted(found) == ["student_hardest_score", "student_match_score", "student_misranked"]
