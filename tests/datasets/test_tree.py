"""Sets inside sets: what is at the leaves, how a tree is rebuilt, and in which order its rows count."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import ConcatDataset, Dataset, Subset

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.tree import (
    StandInSet,
    WrappedSet,
    annotation_rows,
    batch_groups,
    collater_of,
    original,
    plain_sets,
    replace_plain_sets,
    set_epoch,
)


class Letters(Dataset):
    def __init__(self, letters: str) -> None:
        self.annotation = [{"image": letter} for letter in letters]
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> str:
        return self.annotation[index]["image"]

    def collater(self, samples: list[str]) -> str:
        return "".join(samples)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Upper(WrappedSet):
    def __getitem__(self, index: int) -> str:
        return super().__getitem__(index).upper()


def items(dataset: Any) -> str:
    return "".join(dataset[index] for index in range(len(dataset)))


def test_plain_sets_of_wrapped_and_concatenated_sets() -> None:
    one, two = Letters("ab"), Letters("cd")
    both = ConcatDataset([one, Upper(Upper(two))])
    assert plain_sets(both, "train") == {"train.0": one, "train.1": two}
    assert plain_sets(Subset(one, [1]), "train") == {"train": one}
    assert plain_sets(["a plain list"], "train") == {"train": ["a plain list"]}
    assert annotation_rows(both) == [(one, row) for row in one.annotation] + [(two, row) for row in two.annotation]


def test_a_tree_is_rebuilt_around_other_sets_and_the_old_one_stays() -> None:
    both = ConcatDataset([Letters("ab"), Upper(Letters("cd"))])
    named: list[str] = []

    def replacement(name: str, plain: Any) -> Letters:
        named.append(name)
        return Letters(items(plain)[::-1])

    assert items(replace_plain_sets(both, "train", replacement)) == "baDC"
    assert items(both) == "abCD" and named == ["train.0", "train.1"]


def test_wrappers_pass_on_the_epoch_and_the_collater() -> None:
    one, two = Letters("ab"), Letters("cd")
    both = ConcatDataset([one, Upper(two)])
    set_epoch(WrappedSet(both), 3)
    assert one.epochs == two.epochs == [3]
    assert Upper(one).collater(["x", "y"]) == "xy"
    assert collater_of(both)([1, 2]).tolist() == [1, 2]  # torch's, where the set has none


def test_a_stand_in_has_what_its_source_has_and_is_plain() -> None:
    source = Letters("ab")
    stand_in = StandInSet(StandInSet(source))
    assert stand_in.annotation is source.annotation and len(stand_in) == 2 and original(stand_in) is source
    assert plain_sets(stand_in, "val") == {"val": stand_in}
    assert pickle.loads(pickle.dumps(stand_in)).annotation == source.annotation
    with pytest.raises(AttributeError, match="colour"):
        _ = stand_in.colour


def test_groups_of_a_batch_are_read_from_the_rows() -> None:
    rows = [{"image_id": 7, "family": 1}, {"image_id": 8, "family": 1}]
    plain = SimpleNamespace(annotation=rows)
    both = SimpleNamespace(datasets=[plain, plain])
    assert batch_groups(both, "family")[1] == ((".0", 1), (".0", 8))
    assert len(set(batch_groups(both, "family"))) == 4
    with pytest.raises(UserError, match=r"run\.batch_by: the rows have no 'colour'; they have image_id, family"):
        batch_groups(plain, "colour")


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
