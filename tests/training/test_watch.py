import logging

import pytest

from lavis_dcd.training.health import ScoreWatch


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_dead_student_is_told_once_and_not_after_a_single_step(told):
    watch = ScoreWatch()
    watch.see({"student_spread": 0.0}, 4)
    watch.see({"student_spread": 0.3}, 1)  # it moved: counted anew
    watch.see({"student_spread": 0.0}, 4)
    assert told() == []
    for _ in range(3):
        watch.see({"student_spread": 5e-7}, 2)
    (line,) = told()
    assert line.startswith("the student scores all candidates of a query alike (6 steps now)")


def test_a_teacher_worse_than_chance_is_told_once(told):
    watch = ScoreWatch()
    for rank in (0.9, 0.1, 0.1, 0.1, 0.1, 0.49, 0.49, 0.49, 0.49, 0.49):
        watch.see({"teacher_match_rank": rank}, 1)
    assert told() == []
    for _ in range(3):
        watch.see({"teacher_match_rank": 0.75}, 5)
    (line,) = told()
    assert line.startswith("the teacher is worse than chance: 75 % of the other candidates stand above the match")


def test_a_model_that_says_nothing_of_them_is_left_alone(told):
    watch = ScoreWatch()
    watch.see({"loss": 1.0}, 100)
    watch.see({}, 0)
    assert told() == []
