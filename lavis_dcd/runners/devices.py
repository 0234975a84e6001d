"""Where a job runs: the device, the processes of torchrun, precision, and moving batches there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_dcd.common.errors import UserError
from lavis_dcd.runners.config import RunConfig


@dataclass(frozen=True)
class Place:
    """This process: its device, and its rank among `world_size` processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The main process's `value` (any picklable object), in every process. Also serves as a barrier."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over the processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world_size == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(total)
        return bool(total > 0)


def find_place(run: RunConfig) -> Place:
    """Choose the device and, under torchrun with several processes, join their group. May be called again.

    Raises:
        UserError: run.device is cuda and there is none; run.amp is fp16 on a CPU.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda is not available here; set run.device=auto or cpu")
    kind = "cpu" if run.device == "cpu" or not torch.cuda.is_available() else "cuda"
    if run.amp == "fp16" and kind == "cpu":
        raise UserError("run.amp: fp16 needs CUDA; on a CPU set run.amp=bf16 or off")
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    )
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return Place(device)
    if not dist.is_initialized():
        # While the main process evaluates, the others wait; that can take hours.
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=run.dist_url, timeout=timedelta(days=1))
    return Place(device, dist.get_rank(), dist.get_world_size())


def leave_group() -> None:
    """Leave torchrun's process group, where one was joined, once every process has come this far.

    Without the barrier a process that is done first closes connections that another is still reading from.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wrap_for_training(model: nn.Module, place: Place) -> nn.Module:
    """The model itself, or DistributedDataParallel around it when several processes train.

    A model whose loss may leave trainable parameters out says so in an attribute `find_unused_parameters`.
    """
    if place.world_size == 1:
        return model
    ids = [place.device.index] if place.device.type == "cuda" else None
    unused = bool(getattr(model, "find_unused_parameters", False))
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=unused)


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """The context of the forward pass for run.amp."""
    dtype = torch.float16 if run.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=run.amp != "off")


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in its dicts, lists and tuples on `device`.

    Other objects with a method `to` (`Features`) move too; anything else stays as it is.
    """
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value
