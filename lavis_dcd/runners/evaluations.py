"""The evaluations of a run: each one made once and kept in the run folder, and the machine it ran on."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavis_dcd.common.files import atomic_write
from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.devices import Place

FILE = "evaluations.json"

logger = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of a run, keyed by split, matcher and optimizer step.

    A resumed job repeats none that was kept (`write`). The processes share an evaluation's work where the task says
    that it can (`evaluates_over_ranks`); otherwise the main one evaluates and the others wait.

    Args:
        folder: the run folder.
        task: `evaluate_matcher(matcher, dataset, run, device)` returns a dict of metrics; with `evaluates_over_ranks`
            it also takes `ranks`, and every process calls it.
        resume_step: forget evaluations of later steps; None forgets all.
    """

    def __init__(
        self, folder: Path, task: Any, run: RunConfig, place: Place, resume_step: int | None = None
    ) -> None:
        self._file, self._task, self._run, self._place = folder / FILE, task, run, place
        self._done: dict[str, dict[str, Any]] = {}
        if resume_step is not None and self._file.is_file():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            self._done = {
                key: entry
                for key, entry in stored.items()
                if entry["step"] is None or entry["step"] <= resume_step
            }

    def get(self, name: str, split: str, step: int | None) -> dict[str, Any] | None:
        """The metrics of an evaluation that was made, else None."""
        entry = self._done.get(_key(name, split, step))
        return entry and dict(entry["metrics"])

    def evaluate(self, name: str, matcher: Any, dataset: Any, split: str, step: int | None) -> dict[str, Any]:
        """The metrics of `matcher` on a split, evaluated now unless that was done before.

        The caller puts the model into eval mode.

        Args:
            name: of the matcher ("teacher", "student", ...).
            step: how many optimizer steps its weights have seen; None for weights that do not learn.
        """
        stored = self.get(name, split, step)
        if stored is not None:
            return stored
        measures = self._place.is_main or self._shares_work
        metrics = self._place.share(self._measure(name, matcher, dataset, split) if measures else None)
        self._done[_key(name, split, step)] = {"step": step, "metrics": metrics}
        return dict(metrics)

    @property
    def _shares_work(self) -> bool:
        return self._place.world_size > 1 and getattr(self._task, "evaluates_over_ranks", False)

    def _measure(self, name: str, matcher: Any, dataset: Any, split: str) -> dict[str, Any]:
        begin = time.monotonic()
        with torch.no_grad():
            more = {"ranks": self._place.ranks} if self._shares_work else {}
            found = self._task.evaluate_matcher(matcher, dataset, self._run, self._place.device, **more)
        metrics = {key: _plain(value) for key, value in found.items()}
        if not self._place.is_main:
            return metrics
        logger.info("%s on %s: %s (%.1f s)", name, split, summary(metrics), time.monotonic() - begin)
        return metrics

    def write(self) -> None:
        """Keep what was evaluated so far."""
        if self._place.is_main:
            with atomic_write(self._file, "w") as handle:
                json.dump(self._done, handle, indent=1)


def _key(name: str, split: str, step: int | None) -> str:
    return f"{split}/{name}" if step is None else f"{split}/{name}@{step}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def summary(metrics: Mapping[str, Any]) -> str:
    """The figures of one evaluation on a line."""
    shown = [
        key
        for key in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean", "r_sum")
        if isinstance(metrics.get(key), (int, float))
    ]
    shown = shown or [key for key, value in metrics.items() if isinstance(value, float)]
    return ", ".join(f"{key} {metrics[key]:.2f}" for key in shown)


def machine(run: RunConfig, place: Place) -> dict[str, Any]:
    """Where the figures were measured."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(place.device),
        "processes": place.world_size,
        "precision": "fp32" if run.amp == "off" else run.amp,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if place.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(place.device)
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
