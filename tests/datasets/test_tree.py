"""Sets inside sets: what is at the leaves, and in which order its rows count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.tree import batch_groups, plain_sets


def leaf(*ids: int, **keys: object) -> SimpleNamespace:
    return SimpleNamespace(annotation=[{"image_id": i, "scene": i % 2, **keys} for i in ids])


def test_a_plain_set_is_its_only_leaf():
    plain = leaf(1)
    assert plain_sets(plain, "train") == {"train": plain}


def test_wrappers_and_concatenations_are_opened_to_any_depth():
    one, two, three = leaf(1), leaf(2), leaf(3)
    inner = SimpleNamespace(datasets=[two, SimpleNamespace(dataset=three)])
    found = plain_sets(SimpleNamespace(dataset=SimpleNamespace(datasets=[one, inner])), "train")
    assert list(found) == ["train.0", "train.1.0", "train.1.1"]
    assert [found[name] for name in found] == [one, two, three]


def test_what_a_class_says_of_all_its_sets_is_no_wrapped_set():
    class Plain:
        dataset = "the name of the set, as some give it"

    plain = Plain()
    assert plain_sets(plain, "val") == {"val": plain}


def test_groups_are_per_row_and_never_of_two_sets():
    both = SimpleNamespace(datasets=[leaf(4, 5, 7), SimpleNamespace(dataset=leaf(4))])
    groups = batch_groups(both, "scene")
    assert groups == [((".0", i % 2), (".0", i)) for i in (4, 5, 7)] + [((".1", 0), (".1", 4))]


@pytest.mark.parametrize(
    ("dataset", "line"),
    [
        (leaf(1, width=3), "the rows have no 'height'; they have image_id, scene, width"),
        (SimpleNamespace(), "the rows have no 'height'; they have no keys"),
    ],
)
def test_rows_without_the_key_say_what_they_have(dataset, line):
    with pytest.raises(UserError, match=f"run.batch_by: {line}"):
        batch_groups(dataset, "height")
