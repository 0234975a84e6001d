import pytest

from lavis_dcd.reporting.memorised import FAR, Memorised


def test_the_words_tell_whether_doubt_says_anything():
    far = Memorised.of("val", {"img_r1": 75.04, "pictures": 1000}, {"img_r1": 24.1})
    assert far is not None and far.is_far
    assert "first for 75.0 (among 1,000); of val, among as many, for 24.1." in str(far)
    assert "memorised" in str(far) and "loss.weighting" in str(far) and "loss.teacher_temperature" in str(far)
    near = Memorised("val", 1000, 24.1 + FAR - 0.1, 24.1)
    assert not near.is_far and "memorised" not in str(near)
    assert Memorised("val", 1000, 44.1, 24.1).is_far


def test_nothing_is_compared_without_both_figures():
    assert Memorised.of("val", {"img_r1": 75.0, "pictures": 10}, {}) is None
    assert Memorised.of("val", {"pictures": 10}, {"img_r1": 1.0}) is None


def test_what_is_stored_is_read_back_and_nothing_else():
    made = Memorised("val", 1000, 75.0, 24.0)
    assert Memorised.parse(made.stored()) == made
    for damaged in ([], {}, {**made.stored(), "split": 3}, {**made.stored(), "train_r1": "75"}, {"split": "val"}):
        with pytest.raises(ValueError, match="has"):
            Memorised.parse(damaged)
