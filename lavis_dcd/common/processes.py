"""torchrun's processes: this one's rank, objects of all of them, and work that the main one does first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

WAIT_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that share a piece of work: by default it is alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> ProcessGroup:
        """Return this process as torchrun's process group has it; alone without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def alone(self) -> bool:
        """Return whether no other process shares the work."""
        return self.size == 1

    def share(self, count: int) -> range:
        """Return this process's share of ``count`` items: in order, without gaps, of one size but for one item."""
        whole, more = divmod(count, self.size)
        start = self.rank * whole + min(self.rank, more)
        return range(start, start + whole + (self.rank < more))


ALONE = ProcessGroup()


def gather_objects(value: Any, ranks: ProcessGroup) -> list[Any]:
    """Return every process's ``value`` (plain containers), by rank."""
    if ranks.alone:
        return [value]
    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value)
    return values


def patient_group() -> Any:
    """Return a group of all processes whose members may wait for hours, say for one that builds a feature bank."""
    return dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


def leave_group() -> None:
    """Leave torchrun's process group, where one was joined, once every process has come this far.

    Without the barrier a process that is done first closes connections that another is still reading from.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier(group=patient_group())
        dist.destroy_process_group()


def main_process_first(work: Callable[[], T]) -> T:
    """Return what ``work`` returns, in each of torchrun's processes; the main one, whose log is read, goes first.

    Where it fails there, the others try for themselves, and end with the same error instead of waiting for ever.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    waiting = patient_group()
    if dist.get_rank() != 0:
        dist.barrier(group=waiting)
        return work()
    try:
        return work()
    finally:
        dist.barrier(group=waiting)
