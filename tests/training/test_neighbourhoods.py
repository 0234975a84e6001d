"""Batches of neighbourhoods: every row once, the same for everybody, from anywhere, and near each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.neighbours import NeighbourTable
from lavis_dcd.training.neighbourhoods import Neighbourhoods
from lavis_dcd.training.sampler import ResumableBatchSampler


def line_of_pictures(captions: list[int], nearest: int, apart: list[list[int]] | None = None) -> NeighbourTable:
    """Pictures on a line, whose nearest are those beside them; picture i has captions[i] rows."""
    count = len(captions)
    places = torch.arange(count)
    distance = (places[:, None] - places).abs().double()
    distance.fill_diagonal_(torch.inf)
    order = distance.sort(dim=1, stable=True).indices[:, : min(nearest, count - 1)].int()
    rows = torch.repeat_interleave(torch.tensor(captions))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))]
    return NeighbourTable.of(rows, order, apart or [])


def batches_of(sampler: ResumableBatchSampler, epoch: int, skip: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch, skip)
    return list(sampler)


@st.composite
def cases(draw):
    captions = draw(st.lists(st.integers(1, 4), min_size=2, max_size=30))
    groups = draw(
        st.lists(st.lists(st.integers(0, len(captions) - 1), min_size=2, max_size=4, unique=True), max_size=4)
    )
    table = line_of_pictures(captions, draw(st.integers(1, 8)), groups)
    batch = draw(st.integers(1, max(1, sum(captions) // 2))) * 2
    size = draw(st.one_of(st.none(), st.integers(2, max(2, batch))))
    return table, batch, Neighbourhoods(table, size, draw(st.floats(0.05, 1.0)))


@given(cases(), st.integers(0, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_row_comes_once_and_the_order_follows_from_seed_and_epoch(case, seed, drop_last):
    table, batch, how = case
    rows = len(table.picture_of_row)
    if drop_last and rows < batch:
        return
    sampler = ResumableBatchSampler(rows, batch, seed, drop_last=drop_last, neighbourhoods=how)
    first = batches_of(sampler, 1)
    dealt = [row for some in first for row in some]
    assert len(set(dealt)) == len(dealt) == (rows // batch * batch if drop_last else rows)
    again = ResumableBatchSampler(rows, batch, seed, drop_last=drop_last, neighbourhoods=how)
    assert batches_of(again, 1) == first


@given(cases(), st.data())
@settings(max_examples=80, deadline=None)
def test_two_processes_share_the_batches_of_one_and_any_batch_may_be_the_first(case, data):
    table, batch, how = case
    rows = len(table.picture_of_row)
    alone = batches_of(ResumableBatchSampler(rows, batch, 5, drop_last=False, neighbourhoods=how), 2)
    skip = data.draw(st.integers(0, len(alone)))
    parts = [
        batches_of(
            ResumableBatchSampler(rows, batch // 2, 5, drop_last=False, rank=rank, world_size=2, neighbourhoods=how),
            2,
            skip,
        )
        for rank in (0, 1)
    ]
    together = [one + other for one, other in zip(*parts, strict=True)]
    assert [some[: len(whole)] for some, whole in zip(together, alone[skip:], strict=True)] == alone[skip:]


class SlowDealer:
    """The same batches by lists and sets, with whatever is held looked up anew each time."""

    def __init__(self, table: NeighbourTable, rows: list[int], generator: torch.Generator) -> None:
        self.nearest, self.generator = table.nearest.tolist(), generator
        self.rows: dict[int, list[int]] = {picture: [] for picture in range(len(self.nearest))}
        for row in rows:
            self.rows[int(table.picture_of_row[row])].append(row)
        edges = table.apart_starts.tolist()
        self.groups = [table.apart[a:b].tolist() for a, b in pairwise(edges)]
        self.new_pass()

    def new_pass(self) -> None:
        self.queue = torch.randperm(len(self.nearest), generator=self.generator).tolist()
        self.free = {picture for picture, rows in self.rows.items() if rows}

    def held(self, picture: int) -> bool:
        return picture in self.pictures[self.counted_from :] or any(picture in self.groups[g] for g in self.counted)

    def any(self) -> int:
        while True:
            for picture in self.queue:
                if picture in self.free and not self.held(picture):
                    return picture
            if any(rows and not self.held(picture) for picture, rows in self.rows.items()):
                self.new_pass()
                continue
            others = any(self.held(picture) and picture not in self.pictures for picture in self.rows)
            self.counted, self.counted_from = set(), 0 if others else len(self.pictures)

    def take(self, picture: int) -> int:
        self.free.discard(picture)
        self.pictures.append(picture)
        new = {g for g, members in enumerate(self.groups) if picture in members} - self.met
        self.met |= new
        self.counted |= new
        return self.rows[picture].pop(0)

    def batch(self, size: int, near: int, of_one: int) -> list[int]:
        self.pictures: list[int] = []
        self.met: set[int] = set()
        self.counted: set[int] = set()
        self.counted_from = 0
        rows: list[int] = []
        while len(rows) < near:
            wanted, members = min(of_one, near - len(rows)), [self.any()]
            rows.append(self.take(members[0]))
            place = 0
            while len(members) < wanted and place < len(members):
                for picture in self.nearest[members[place]]:
                    if len(members) < wanted and picture >= 0 and picture in self.free and not self.held(picture):
                        members.append(picture)
                        rows.append(self.take(picture))
                place += 1
        while len(rows) < size:
            rows.append(self.take(self.any()))
        return rows


@given(cases(), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_batches_are_those_of_a_slow_dealer(case, seed):
    table, batch, how = case
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(table.picture_of_row), generator=generator).tolist()
    whole = len(shuffled) // batch
    slow, near = SlowDealer(table, shuffled[: whole * batch], generator), round(how.share * batch)
    batches = [slow.batch(batch, near, how.size or near) for _ in range(whole)]
    mixed = torch.randperm(whole, generator=generator).tolist()
    expected = [row for number in mixed for row in batches[number]] + shuffled[whole * batch :]
    assert how.order(batch, torch.Generator().manual_seed(seed)) == expected


def test_all_pictures_of_a_pass_differ_where_batches_divide_them():
    table = line_of_pictures([3] * 24, 5)
    order = Neighbourhoods(table, 4, 0.5).order(8, torch.Generator().manual_seed(0))
    for start in range(0, 72, 8):
        pictures = table.picture_of_row[order[start : start + 8]].tolist()
        assert len(set(pictures)) == 8


def test_a_batch_across_two_passes_has_no_picture_twice():
    table = line_of_pictures([4] * 10, 9)
    order = Neighbourhoods(table, 8).order(8, torch.Generator().manual_seed(0))
    for start in range(0, 40, 8):
        assert len(set(table.picture_of_row[order[start : start + 8]].tolist())) == 8


def test_a_neighbourhood_is_a_random_picture_and_its_nearest():
    """With as many pictures as the first batch leaves untouched, the first batch is known: a run on the line."""
    table = line_of_pictures([1] * 60, 59)
    order = Neighbourhoods(table, 6).order(6, torch.Generator().manual_seed(2))
    runs = 0
    for start in range(0, 60, 6):
        pictures = sorted(table.picture_of_row[order[start : start + 6]].tolist())
        runs += pictures[-1] - pictures[0] == 5
    assert runs >= 4  # the first at least; the last ones are what is left


def test_a_neighbourhood_goes_on_with_the_lists_of_its_members():
    table = line_of_pictures([1] * 40, 2)
    order = Neighbourhoods(table, 10).order(10, torch.Generator().manual_seed(4))
    spans = []
    for start in range(0, 40, 10):
        pictures = sorted(table.picture_of_row[order[start : start + 10]].tolist())
        spans.append(pictures[-1] - pictures[0])
    assert min(spans) == 9  # ten beside each other, by lists of two


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_each_batch_is_random(share):
    table = line_of_pictures([1] * 400, 399)
    order = Neighbourhoods(table, None, share).order(40, torch.Generator().manual_seed(0))
    near = round(share * 40)
    apart = [table.picture_of_row[order[start + near : start + 40]].double().std() for start in range(0, 400, 40)]
    assert sorted(apart)[4] > 60  # all over the line; the last batches of the pass have what is left
    spans = [
        int(pictures.max() - pictures.min())
        for pictures in (table.picture_of_row[order[start : start + near]] for start in range(0, 400, 40))
    ]
    assert sorted(spans)[4] < 4 * near  # half of the neighbourhoods at least are close together


def test_pictures_to_keep_apart_do_not_meet_while_others_are_left():
    apart = [[i, i + 1] for i in range(0, 40, 2)]  # the nearest of each
    table = line_of_pictures([2] * 40, 39, apart)
    order = Neighbourhoods(table, 8).order(8, torch.Generator().manual_seed(0))
    batches = [set(table.picture_of_row[order[start : start + 8]].tolist()) for start in range(0, 80, 8)]
    assert (
        sum(any(set(pair) <= pictures for pair in apart) for pictures in batches) <= 1
    )  # the last one, of what is left
    without = Neighbourhoods(line_of_pictures([2] * 40, 39), 8).order(8, torch.Generator().manual_seed(0))
    batches = [set(table.picture_of_row[without[start : start + 8]].tolist()) for start in range(0, 80, 8)]
    assert sum(set(pair) <= pictures for pair in apart for pictures in batches) > 20


def test_pictures_that_all_should_be_kept_apart_are_dealt_all_the_same():
    table = line_of_pictures([2] * 6, 5, [list(range(6))])
    order = Neighbourhoods(table, 3).order(3, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(12))


def test_a_table_of_other_rows_is_refused():
    table = line_of_pictures([1] * 6, 5)
    with pytest.raises(UserError, match=r"run\.batches: the neighbours are of 6 rows, the training set has 7"):
        ResumableBatchSampler(7, 2, 0, neighbourhoods=Neighbourhoods(table))


def test_batches_of_an_epoch_differ_from_those_of_another():
    table = line_of_pictures([2] * 20, 10)
    sampler = ResumableBatchSampler(40, 8, 0, neighbourhoods=Neighbourhoods(table))
    assert batches_of(sampler, 0) != batches_of(sampler, 1)
