"""What comes beside what: once a pass, anew each epoch, from (seed, name, epoch) alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lavis.datasets.datasets.base_dataset import ConcatDataset
from retrieval_sets import NumberedRows, captioned
from torch.utils.data import DataLoader

from lavis_dcd.datasets.splits import distinct_image_ids
from lavis_dcd.datasets.tree import plain_sets, set_epoch
from lavis_dcd.datasets.unpaired_rows import UnpairedRows, UnrelatedPairs, drawn_apart
from lavis_dcd.training.sampler import TrainLoader


class Numbered(UnpairedRows, NumberedRows):
    """Pictures are their numbers in a tensor."""


def unpaired(pictures: int, texts: int) -> Numbered:
    names, words = [f"{i}.jpg" for i in range(pictures)], [f"text {i}" for i in range(texts)]
    return Numbered(lambda picture: picture, str.upper, "", names, words)


def items(dataset: Any) -> list[tuple[int, str]]:
    return [(sample["image_id"], sample["text_input"]) for sample in (dataset[i] for i in range(len(dataset)))]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_every_item_of_the_longer_list_comes_once_and_the_others_equally_often(pictures, texts, epoch):
    dataset = drawn_apart(unpaired(pictures, texts), 5)
    dataset.set_epoch(epoch)
    found = items(dataset)
    assert len(found) == max(pictures, texts)
    for place, count in ((0, pictures), (1, texts)):
        often = Counter(item[place] for item in found)
        assert len(often) == count
        assert set(often.values()) <= {len(found) // count, -(-len(found) // count)}
    assert {text for _, text in found} == {f"TEXT {i}" for i in range(texts)}


def test_the_picture_is_the_one_that_the_id_names():
    dataset = drawn_apart(unpaired(4, 7), 1)
    for index in range(7):
        sample = dataset[index]
        assert (sample["image"] == sample["image_id"]).all()


def test_the_draw_follows_from_seed_epoch_and_name_alone():
    def of(seed: int, epoch: int, name: str = "train") -> list[tuple[int, str]]:
        dataset = UnrelatedPairs(unpaired(30, 40), seed, name)
        dataset.set_epoch(9)
        dataset.set_epoch(epoch)
        return items(dataset)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = of(1, 0)
    assert of(1, 0) == first and torch.equal(torch.get_rng_state(), before)
    others = [of(2, 0), of(1, 1), of(1, 0, "train.0")]
    assert len({tuple(items) for items in [first, *others]}) == 4
    # pictures and texts are drawn apart from each other: no picture keeps its texts
    same = len(set(first) & set(others[1]))
    assert same <= 8  # about 1.3 of 40 pairs are alike by chance


def test_any_pair_is_equally_likely():
    dataset, counts = drawn_apart(unpaired(3, 4), 0), Counter()
    for epoch in range(900):
        dataset.set_epoch(epoch)
        counts.update(items(dataset))
    assert len(counts) == 12
    assert all(220 < count < 380 for count in counts.values())  # 300 each


def test_paired_sets_stay_as_they_are_beside_unpaired_ones():
    paired = captioned(2, 1)
    assert drawn_apart(paired, 1) is paired
    joined = ConcatDataset([paired, unpaired(3, 5)])
    distinct_image_ids(joined.datasets)
    drawn = drawn_apart(joined, 1)
    assert items(drawn)[:3] == items(paired)
    assert {image for image, _ in items(drawn)[3:]} == {2, 3, 4}
    first = items(drawn)
    set_epoch(drawn, 1)
    assert items(drawn)[:3] == first[:3] and items(drawn)[3:] != first[3:]
    assert list(plain_sets(drawn, "train")) == ["train.0", "train.1"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_a_loader_that_starts_in_the_middle_goes_on_as_one_that_did_not(workers):
    def batches(epoch: int, skip: int = 0) -> list[Any]:
        loader = TrainLoader(drawn_apart(unpaired(5, 23), 3), 4, 3, num_workers=workers)
        return [(batch["image_id"].tolist(), batch["text_input"]) for batch in loader.epoch(epoch, skip)]

    whole = batches(2)
    assert len(whole) == 5 and batches(2, 3) == whole[3:]
    assert batches(1) != whole


@pytest.mark.slow
def test_processes_share_one_draw():
    def part(rank: int, world_size: int) -> list[Any]:
        loader = TrainLoader(drawn_apart(unpaired(6, 16), 3), 8 // world_size, 3, rank=rank, world_size=world_size)
        return [list(zip(b["image_id"].tolist(), b["text_input"], strict=True)) for b in loader.epoch(1)]

    shares = zip(part(0, 2), part(1, 2), strict=True)
    assert [one + other for one, other in shares] == part(0, 1)


def test_batches_of_a_plain_loader():
    (batch,) = DataLoader(drawn_apart(unpaired(2, 3), 0), batch_size=3)
    assert batch["image"].shape == (3, 3, 1, 1) and len(batch["text_input"]) == 3
