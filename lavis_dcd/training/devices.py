"""The place where a job runs: its device, its precision, torchrun's processes, and the memory that its phases take."""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ProcessGroup, patient_group
from lavis_dcd.common.texts import memory_in_words
from lavis_dcd.config.run_section import FP16_ON_CPU, RunConfig
from lavis_dcd.training.heartbeat import watch_ranks

log = logging.getLogger(__name__)

# All processes are in the same step, so a peer that is silent for so long is lost: torch ends this one with an error.
# One that dies is noticed at once, by its closed connections and by torchrun.
STEP_TIMEOUT = timedelta(minutes=30)

# Loader processes wait for disks, so that some more than the cores are no mistake.
_FEW_LOADERS, _LOADERS_PER_CORE = 4, 2

MB = 1e6
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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
        """Return whether this process writes the files."""
        return self.rank == 0

    @property
    def ranks(self) -> ProcessGroup:
        """The same without a device, for code that only shares out work."""
        return ProcessGroup(self.rank, self.world_size)

    def share(self, value: Any) -> Any:
        """Return the main process's `value` (any picklable object) in every process; also serves as a barrier."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of `values` over the processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def share_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes the main one's values, in place."""
        for tensor in tensors:
            sent = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor  # gloo sends no bool
            contiguous = sent.contiguous()
            dist.broadcast(contiguous, src=0)
            if contiguous is not sent:
                sent.copy_(contiguous)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give 0-dim parameters the mean over the processes of their gradients; one without counts as 0."""
        if not parameters:
            return
        none = torch.zeros((), device=self.device)
        gradients = [none if p.grad is None else p.grad.float() for p in parameters]
        there = [none + (p.grad is not None) for p in parameters]
        means, having = self.mean(torch.stack([*gradients, *there])).chunk(2)
        for parameter, mean, share in zip(parameters, means, having.tolist(), strict=True):
            parameter.grad = mean.to(parameter.dtype).clone() if share else None

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
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


def load_warnings(run: RunConfig) -> list[str]:
    """Return a line where the processes that load the data are far more than this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    loaders = run.num_workers * here
    if loaders <= max(_FEW_LOADERS, _LOADERS_PER_CORE * cores):
        return []
    of_all = f" in each of {here} processes" if here > 1 else ""
    return [
        f"run.num_workers: {run.num_workers}{of_all}, but there are {cores} cores: so many loaders take memory and "
        f"slow each other down; at most {max(1, cores // here)} is sensible here"
    ]


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
    watch_ranks(store, rank, world_size)


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """Return the context of the forward pass for run.amp."""
    dtype = torch.float16 if run.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=run.amp != "off")


def to_device(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor in its dicts, lists and tuples on `device`.

    Other objects with a method `to` (`Features`) move too; anything else stays as it is.
    """

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return map_leaves(value, moved)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return `value` with `change` done to everything in its nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map_leaves(item, change) for item in value)
    return change(value)


class MemoryPeaks:
    """Peaks of this process by phase ("training", "evaluation"); loader workers are processes of their own.

    Args:
        device: a CUDA device's memory is counted beside the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure inside; the largest peak of all phases of a name is kept, and the log has each of them."""
        restart(self._device)
        try:
            yield
        finally:
            now = peak(self._device)
            largest = self._peaks.setdefault(name, {})
            for key, value in now.items():
                largest[key] = max(largest.get(key, 0), value)
            log.info("peak memory of %s: %s", name, memory_in_words(now))

    def facts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return {"peak_memory": {phase: {"host_mb", and with CUDA "gpu_mb"}}}, for results.json.

        The dictionary is empty before any phase.
        """
        return {"peak_memory": {name: dict(peaks) for name, peaks in self._peaks.items()}} if self._peaks else {}


def restart(device: torch.device) -> None:
    """Let the peaks start anew, where the system can; else they go on from the start of the process."""
    with suppress(OSError):  # not Linux, or not allowed in this container
        _CLEAR.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int]:
    """Return megabytes (10^6 bytes): "host_mb", resident memory; on CUDA also "gpu_mb", what tensors took there."""
    peaks = {"host_mb": round(_resident_peak() / MB)}
    if device.type == "cuda":
        peaks["gpu_mb"] = round(torch.cuda.max_memory_allocated(device) / MB)
    return peaks


def _resident_peak() -> int:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
