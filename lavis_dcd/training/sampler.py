"""Batches in an order that follows from (seed, epoch), and that can start in the middle of an epoch."""

from __future__ import annotations

import signal
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import seed_for, seed_host
from lavis_dcd.datasets.tree import collater_of, set_epoch
from lavis_dcd.training.neighbourhoods import Neighbourhoods


class ResumableBatchSampler(Sampler[list[int]]):
    """Lists of indices: a permutation drawn from (seed, epoch), cut into batches and dealt to the processes.

    The global batch (`batch_size * world_size` indices) is the same however many processes share it.

    Args:
        length: the size of the data set.
        batch_size: indices per batch and process.
        seed: of the job.
        drop_last: leave out the incomplete batch at the end. Otherwise it is dealt evenly, repeating indices
            from the start of the permutation where it does not divide by `world_size`.
        rank, world_size: this process among all.
        groups: per index (group, picture): the pictures of a group are dealt together, each with another of its
            captions every time, and whole groups change places. ``None`` deals every index by itself.
        neighbourhoods: of which the batches are made, instead of groups.

    Raises:
        UserError: the data set is too small for a single batch, or the neighbours are of another one.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[tuple[Hashable, Hashable]] | None = None,
        neighbourhoods: Neighbourhoods | None = None,
    ) -> None:
        self.groups, self.neighbourhoods = groups, neighbourhoods
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.epoch = self.skip = 0
        if len(self) == 0:
            raise UserError(
                f"run.batch_size_train: {batch_size} x {world_size} process(es) is more than the {length} "
                "training samples; lower it, or set run.drop_last=false"
            )
        if neighbourhoods is not None:
            neighbourhoods.check(length)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch, and how many of its batches to leave out at the start."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, skipped ones included."""
        whole, rest = divmod(self.length, self.batch_size * self.world_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.batch_size * self.world_size
        order = self._order(step)
        for number in range(self.skip, len(self)):
            batch = order[number * step : (number + 1) * step]
            batch += order[: -len(batch) % self.world_size]
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share]

    def _order(self, step: int) -> list[int]:
        """Return all indices in the epoch's order, of which every ``step`` make a batch of all processes."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "order", self.epoch))
        if self.neighbourhoods is not None:
            return self.neighbourhoods.order(step, generator)
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order if self.groups is None else _together(order, self.groups, generator)


def _together(order: list[int], groups: Sequence[tuple[Hashable, Hashable]], generator: torch.Generator) -> list[int]:
    """Return `order` with a group's pictures side by side, one caption of each at a time, groups in random order."""
    taken: dict[tuple[Hashable, Hashable], int] = {}
    hands: dict[tuple[Hashable, int], list[int]] = {}
    for index in order:
        group, picture = groups[index]
        turn = taken.get((group, picture), 0)
        taken[group, picture] = turn + 1
        hands.setdefault((group, turn), []).append(index)
    dealt = list(hands.values())
    return [index for hand in torch.randperm(len(dealt), generator=generator).tolist() for index in dealt[hand]]


class SeededDataset(Dataset[Any]):
    """Seeds the host's generators from (seed, epoch, index) before a sample is made.

    Augmentation is then the same in the main process and in any number of workers, and after a resume.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seed_host(seed_for(self.seed, "sample", self.epoch, index))
        return self.dataset[index]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, here and in the data sets inside that draw by it."""
        self.epoch = epoch
        set_epoch(self.dataset, epoch)


class TrainLoader:
    """The training batches of an epoch, from any position.

    Args:
        dataset: map-style; its `collater` makes the batches (default: torch's). `set_epoch(epoch)` is called
            where it has one.
        num_workers: loader processes, started anew each epoch.
        pin_memory: for a CUDA device.
        The others as for `ResumableBatchSampler`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[tuple[Hashable, Hashable]] | None = None,
        neighbourhoods: Neighbourhoods | None = None,
    ) -> None:
        self._sampler = ResumableBatchSampler(
            len(dataset),
            batch_size,
            seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            groups=groups,
            neighbourhoods=neighbourhoods,
        )
        self._dataset = SeededDataset(dataset, seed)
        self._loader = DataLoader(
            self._dataset,
            batch_sampler=self._sampler,
            num_workers=num_workers,
            collate_fn=collater_of(dataset),
            pin_memory=pin_memory,
            worker_init_fn=_leave_interrupts_to_the_parent,
            # The loader draws a base seed at each start: keep that away from the global generator.
            generator=torch.Generator().manual_seed(seed_for(seed, "loader")),
        )

    def __len__(self) -> int:
        """Return the number of batches in an epoch, for this process."""
        return len(self._sampler)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Return the batches of `epoch` after the first `skip`, whose samples are not loaded."""
        self._sampler.set_epoch(epoch, skip)
        self._dataset.set_epoch(epoch)
        return iter(self._loader)


_GRACE = 30  # seconds that a worker goes on after SIGTERM, as many as torchrun gives its processes


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    # Ctrl-C, a cluster's SIGTERM and a lost terminal's SIGHUP reach the whole process group; the parent finishes its
    # step and needs the workers for it. After the latter two they end by themselves, should the parent hang.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: signal.alarm(_GRACE))
