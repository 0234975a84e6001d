"""Where a job runs: the device, the processes of torchrun, precision, and moving batches there."""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ProcessGroup, patient_group
from lavis_dcd.common.texts import memory_in_words
from lavis_dcd.config.run_section import FP16_ON_CPU, RunConfig
from lavis_dcd.training.sharding import shard

logger = logging.getLogger(__name__)

# All processes are in the same step, so a peer that is silent for so long is lost: torch ends this one with an error.
# One that dies is noticed at once, by its closed connections and by torchrun.
STEP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """This process: its device, and its rank among `world_size` processes.

    `patient` is the group in which the others wait for what only the main process does.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    patient: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def ranks(self) -> ProcessGroup:
        """The same for code that knows nothing of runners."""
        return ProcessGroup(self.rank, self.world_size)

    def share(self, value: Any) -> Any:
        """The main process's `value` (any picklable object), in every process. Also serves as a barrier."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over the processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def share_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes the main one's values, in place."""
        for tensor in tensors:
            sent = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor  # gloo sends no bool
            found = sent.contiguous()
            dist.broadcast(found, src=0)
            if found is not sent:
                sent.copy_(found)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give 0-dim parameters the mean over the processes of their gradients; one without counts as 0."""
        if not parameters:
            return
        none = torch.zeros((), device=self.device)
        found = [none if p.grad is None else p.grad.float() for p in parameters]
        means, having = self.mean(torch.stack([*found, *(none + (p.grad is not None) for p in parameters)])).chunk(2)
        for parameter, mean, share in zip(parameters, means, having.tolist(), strict=True):
            parameter.grad = mean.to(parameter.dtype).clone() if share else None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world_size == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(total)
        return bool(total > 0)


def device_faults(run: RunConfig) -> list[str]:
    """Return one line per setting that this machine cannot serve; nothing is started."""
    if run.device == "cpu" or torch.cuda.is_available():
        return []
    if run.device == "cuda":
        return ["run.device: cuda is not available here; set run.device=auto or cpu"]
    return [FP16_ON_CPU] if run.amp == "fp16" else []


def this_process(run: RunConfig) -> Process:
    """Choose the device and, under torchrun with several processes, join their group. May be called again.

    Raises:
        UserError: run.device is cuda and there is none; run.amp is fp16 on a CPU.
    """
    if faults := device_faults(run):
        raise UserError(faults)
    kind = "cpu" if run.device == "cpu" or not torch.cuda.is_available() else "cuda"
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return Process(device)
    if not dist.is_initialized():
        # evaluations and feature banks keep tensors on the host, which nccl does not send
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        _join(backend, run.dist_url)
    return Process(device, dist.get_rank(), dist.get_world_size(), patient_group())


def _join(backend: str, url: str) -> None:
    store, rank, world_size = next(dist.rendezvous(url, timeout=STEP_TIMEOUT))
    # torchrun keeps the store of a single node over its restarts, with the addresses of processes that are gone
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=STEP_TIMEOUT)


def wrap_for_training(model: nn.Module, place: Process, strategy: str = "ddp") -> nn.Module:
    """The model itself; when several processes train, inside DistributedDataParallel, or sharded in place.

    A model whose loss may leave trainable parameters out says so in an attribute `find_unused_parameters`.

    Args:
        strategy: "ddp" or "fsdp".
    """
    if place.world_size == 1:
        if strategy == "fsdp":
            logger.info("run.strategy: fsdp has nothing to share out with one process; the model stays whole")
        return model
    if strategy == "fsdp":
        shard(model, place.device, place.world_size)
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


# ----------------------------------------------------------------------------------------------------
# The most memory that the phases of a job took, in host memory and on the GPU.

MB = 1e6

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class MemoryPeaks:
    """Peaks of this process by phase ("training", "evaluation"); loader workers are processes of their own.

    Args:
        device: a CUDA device's memory is counted beside the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure inside; the largest peak of all phases of a name is kept, and the log has each of them."""
        restart(self._device)
        try:
            yield
        finally:
            found = peak(self._device)
            kept = self._found.setdefault(name, {})
            for key, value in found.items():
                kept[key] = max(kept.get(key, 0), value)
            logger.info("peak memory of %s: %s", name, memory_in_words(found))

    def facts(self) -> dict[str, dict[str, dict[str, int]]]:
        """For results.json: {"peak_memory": {phase: {"host_mb", and with CUDA "gpu_mb"}}}; empty before any phase."""
        return {"peak_memory": {name: dict(found) for name, found in self._found.items()}} if self._found else {}


def restart(device: torch.device) -> None:
    """Let the peaks start anew, where the system can; else they go on from the start of the process."""
    with suppress(OSError):  # not Linux, or not allowed in this container
        _CLEAR.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int]:
    """Megabytes (10^6 bytes): "host_mb", resident memory; on CUDA also "gpu_mb", what tensors took there."""
    found = {"host_mb": round(_resident_peak() / MB)}
    if device.type == "cuda":
        found["gpu_mb"] = round(torch.cuda.max_memory_allocated(device) / MB)
    return found


def _resident_peak() -> int:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
