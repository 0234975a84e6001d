"""The most memory that the phases of a job took, in host memory and on the GPU."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

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
            logger.info("peak memory of %s: %s", name, words(found))

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


def words(found: dict[str, int]) -> str:
    """As people read it: "812 MB", or with a GPU "812 MB, on the GPU 1,234 MB"."""
    gpu = f", on the GPU {found['gpu_mb']:,} MB" if "gpu_mb" in found else ""
    return f"{found['host_mb']:,} MB{gpu}"


def _resident_peak() -> int:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
