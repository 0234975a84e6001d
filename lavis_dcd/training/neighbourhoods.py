"""The order of an epoch whose batches are made of neighbourhoods: pictures that are near each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.neighbours import NeighbourTable

_AT_ONCE = 1024  # pictures of a pass that are looked at together


@dataclass(frozen=True)
class Neighbourhoods:
    """Batches made of neighbourhoods.

    Args:
        table: the neighbours of the training set's pictures.
        size: pictures of a neighbourhood; None: as many as a batch has in neighbourhoods.
        share: of a batch, in neighbourhoods; its other pictures are drawn at random.
    """

    table: NeighbourTable
    size: int | None = None
    share: float = 1.0

    def order(self, batch: int, generator: torch.Generator) -> list[int]:
        """Return every row once, batch after batch; the rows of an incomplete last batch are random ones.

        In a batch stand the neighbourhoods, one behind the other, then its random pictures. The first batches of a
        pass have the nearest pictures together, the last ones what is left, so whole batches change places.

        Args:
            batch: rows of the batch of all processes.
            generator: of all that is drawn.
        """
        shuffled = torch.randperm(len(self.table.picture_of_row), generator=generator)
        whole = len(shuffled) // batch
        dealer = _Dealer(self.table, shuffled[: whole * batch].numpy(), generator)
        near = round(self.share * batch)
        batches = [dealer.batch(batch, near, self.size or near) for _ in range(whole)]
        mixed = torch.randperm(whole, generator=generator).tolist()
        return [row for number in mixed for row in batches[number]] + shuffled[whole * batch :].tolist()

    def check(self, length: int) -> None:
        """Refuse a table of other rows.

        Raises:
            UserError: the training set has another number of rows.
        """
        rows = len(self.table.picture_of_row)
        if rows != length:
            raise UserError(f"run.batches: the neighbours are of {rows:,} rows, the training set has {length:,}")


class _Dealer:
    """The pictures of an epoch, dealt in passes: none twice in a pass, each time with the next of its rows.

    A picture is free until the pass has dealt it, and held while it should not come into the batch: it is there, or
    one that it is kept apart from. A pass ends, perhaps in the middle of a batch, when all that is free is held; what
    it has not dealt comes later, and what is left at the very end is dealt all the same.

    Args:
        rows: those to deal, int64, in random order.
    """

    def __init__(self, table: NeighbourTable, rows: np.ndarray, generator: torch.Generator) -> None:
        self._nearest, self._generator = table.nearest.numpy(), generator
        count = len(self._nearest)
        picture_of_row = table.picture_of_row.numpy()[rows]
        self._rows = rows[np.argsort(picture_of_row, kind="stable")]  # of each picture, in random order
        self._left = np.bincount(picture_of_row, minlength=count)
        self._next = self._left.cumsum() - self._left  # where in _rows the next row of each picture is
        self._apart = table.apart.numpy()
        self._starts = table.apart_starts.numpy()
        self._groups, self._group_starts = _groups_by_member(self._apart, self._starts, count)
        self._held = np.zeros(count, dtype=bool)
        self._batch: list[int] = []
        self._met: set[int] = set()  # groups to keep apart that the batch has a picture of
        self._begin_pass()

    def batch(self, size: int, near: int, of_one: int) -> list[int]:
        """Deal a batch of ``size`` rows: ``near`` of them in neighbourhoods of ``of_one`` pictures, the others random.

        The last neighbourhood is smaller where they do not divide.
        """
        self._held[:] = False
        self._batch, self._met = [], set()
        rows: list[int] = []
        while len(rows) < near:
            rows += self._neighbourhood(min(of_one, near - len(rows)))
        while len(rows) < size:
            rows.append(self._take(self._any()))
        return rows

    def _neighbourhood(self, size: int) -> list[int]:
        """Deal a random picture and the free ones nearest to it.

        Where its own list has too few, the lists of the pictures that were taken go on, nearest first; where these end,
        too, the neighbourhood is smaller.
        """
        members = [self._any()]
        rows = [self._take(members[0])]
        for member in members:  # which grows meanwhile
            if len(rows) == size:
                break
            near = self._nearest[member]
            near = near[near >= 0]
            for picture in near[self._free[near] & ~self._held[near]].tolist():
                if self._held[picture]:  # by one of its own neighbours, just taken
                    continue
                members.append(picture)
                rows.append(self._take(picture))
                if len(rows) == size:
                    break
        return rows

    def _take(self, picture: int) -> int:
        """Return the next row of a picture, which is then in the batch, and hold those that are kept apart from it."""
        row = int(self._rows[self._next[picture]])
        self._next[picture] += 1
        self._left[picture] -= 1
        self._free[picture] = False
        self._held[picture] = True
        self._batch.append(picture)
        for group in self._groups[self._group_starts[picture] : self._group_starts[picture + 1]].tolist():
            if group not in self._met:
                self._met.add(group)
                self._held[self._apart[self._starts[group] : self._starts[group + 1]]] = True
        return row

    def _any(self) -> int:
        """Return a random picture that is free and not held."""
        while True:
            picture = self._first()
            if picture is not None:
                return picture
            if bool(((self._left > 0) & ~self._held).any()):
                self._begin_pass()
            else:
                self._release()

    def _first(self) -> int | None:
        """Return the first picture in the pass's random order that is free and not held."""
        queue = self._queue
        while self._place < len(queue) and not self._free[queue[self._place]]:
            self._place += 1
        for start in range(self._place, len(queue), _AT_ONCE):
            some = queue[start : start + _AT_ONCE]
            places = np.flatnonzero(self._free[some] & ~self._held[some])
            if len(places):
                return int(some[places[0]])
        return None

    def _begin_pass(self) -> None:
        self._free = self._left > 0
        self._queue = torch.randperm(len(self._free), generator=self._generator).numpy()
        self._place = 0

    def _release(self) -> None:
        """Let pictures into the batch that should be kept apart; where there are none, those that it has already."""
        own = np.zeros_like(self._held)
        own[self._batch] = True
        self._held = own if bool((self._held & ~own).any()) else np.zeros_like(self._held)


def _groups_by_member(members: np.ndarray, starts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups of each of ``count`` pictures, one picture behind the other, and where each one's start."""
    groups = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.argsort(members, kind="stable")
    ends = np.bincount(members, minlength=count).cumsum()
    return groups[order], np.concatenate([[0], ends])
