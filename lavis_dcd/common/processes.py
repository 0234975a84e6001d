"""torchrun's processes: who this one is, what all know, waiting for the main one."""

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
        """As torchrun's process group has it; alone without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, count: int) -> range:
        """This process's part of ``count`` items: in order, without gaps, of one size but for one item."""
        whole, more = divmod(count, self.size)
        start = self.rank * whole + min(self.rank, more)
        return range(start, start + whole + (self.rank < more))


ALONE = ProcessGroup()


def gather_objects(value: Any, ranks: ProcessGroup) -> list[Any]:
    """Every process's ``value`` (plain containers), by rank."""
    if ranks.alone:
        return [value]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, value)
    return found


def patient_group() -> Any:
    """A group of all processes whose members may wait for hours, for one that builds a feature bank, say."""
    return dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


def leave_group() -> None:
    """Leave torchrun's process group, where one was joined, once every process has come this far.

    Without the barrier a process that is done first closes connections that another is still reading from.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier(group=patient_group())
        dist.destroy_process_group()


def main_process_first(work: Callable[[], T]) -> T:
    """What ``work`` returns in each of torchrun's processes; the main one, whose log is read, is done first.

    Where it fails, they try for themselves, and end with the same error rather than waiting for ever.
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
