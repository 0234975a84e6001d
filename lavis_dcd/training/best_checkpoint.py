"""What a job evaluates: the learner while it trains, the best of it, the teacher once, the final table."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lavis_dcd.common.files import atomic_write
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.reporting.table import format_table
from lavis_dcd.training import checkpoint
from lavis_dcd.training.devices import Process
from lavis_dcd.training.logs import MetricsLog
from lavis_dcd.training.run_folder import write_results
from lavis_dcd.training.sharding import load_model, whole

# ----------------------------------------------------------------------------------------------------
# The evaluations of a run: each one made once and kept in the run folder, and the machine it ran on.

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

    def __init__(self, folder: Path, task: Any, run: RunConfig, place: Process, resume_step: int | None = None) -> None:
        self._file, self._task, self._run, self._place = folder / FILE, task, run, place
        self._done: dict[str, dict[str, Any]] = {}
        if resume_step is not None and self._file.is_file():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            self._done = {
                key: entry for key, entry in stored.items() if entry["step"] is None or entry["step"] <= resume_step
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


def machine(run: RunConfig, place: Process) -> dict[str, Any]:
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


class Judge:
    """Evaluates the matchers of a model and remembers which step was best.

    Args:
        folder: the run folder.
        model: `matchers()` names what is evaluated; a model without it is evaluated itself, as "model".
        datasets: by split.
        resume_step: of the checkpoint that a resumed job continues, else None.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        place: Process,
        task: Any,
        model: nn.Module,
        datasets: Mapping[str, Any],
        log: MetricsLog,
        resume_step: int | None = None,
    ) -> None:
        self._folder, self._run, self._place, self._task = folder, run, place, task
        self._model, self._datasets, self._log = model, datasets, log
        self._evaluations = Evaluations(folder, task, run, place, resume_step)
        self.best: dict[str, Any] | None = None  # {"step", "metric"}
        self.steps_per_epoch = 1

    @property
    def matchers(self) -> dict[str, Any]:
        """What can be evaluated, by name."""
        return self._model.matchers() if hasattr(self._model, "matchers") else {"model": self._model}

    @property
    def learner(self) -> str:
        """The name of the matcher that learns: "student", or the only one that is not the teacher."""
        names = list(self.matchers)
        return "student" if "student" in names else next(name for name in names if name != "teacher")

    def evaluate_learner(
        self, splits: Sequence[str], step: int, log_step: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """The learner's metrics by split.

        Args:
            step: the optimizer steps that its weights have taken.
            log_step: where the job stands, if further than that (the best weights, loaded at the end).
        """
        log_step = step if log_step is None else log_step
        return {split: self._evaluate(self.learner, split, step, log_step) for split in splits}

    def evaluate_teacher(self, step: int) -> None:
        """Evaluate the teacher, if there is one, on run.teacher_splits; the job stands at `step`."""
        if "teacher" in self.matchers:
            for split in self._run.teacher_splits:
                self._evaluate("teacher", split, None, step)
                self.keep()

    def _evaluate(self, name: str, split: str, step: int | None, log_step: int) -> dict[str, Any]:
        self._model.eval()
        metrics = self._evaluations.evaluate(name, self.matchers[name], self._datasets[split], split, step)
        line = {"split": split, "model": name, "weights_of_step": step, **metrics}
        self._log.write("eval", log_step, log_step / self.steps_per_epoch, line)
        return metrics

    def keep(self) -> None:
        """Write what was evaluated to the run folder, so that a resumed job does not repeat it."""
        self._evaluations.write()

    def validate(self, step: int) -> None:
        """Evaluate on run.valid_splits; keep the weights if their mean `agg_metrics` is the best so far."""
        found = self.evaluate_learner(self._run.valid_splits, step)
        if not found:
            return
        metric = sum(metrics["agg_metrics"] for metrics in found.values()) / len(found)
        if self.best is None or metric > self.best["metric"]:
            self.best = {"step": step, "metric": metric}
            content = {"model": whole(self._model.state_dict(), self._place.is_main), **self.best}
            if self._place.is_main:
                checkpoint.save(checkpoint.best_file(self._folder, step), content)
            logger.info("best so far: %.2f at step %d", metric, step)
        # After the weights, so that a stored evaluation always has the file it speaks of.
        self.keep()

    def load_best(self) -> None:
        """Put the best weights into the model, where a best was chosen."""
        if self.best is not None:
            self._place.share(None)  # the main process has written the file
            path = checkpoint.best_file(self._folder, self.best["step"])
            load_model(self._model, checkpoint.load_weights(path))

    def write_results(self, title: str, step: int, facts: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """results.json and the table in the log, for the learner of optimizer step `step`.

        Args:
            facts: more of the machine.

        Returns:
            False where no split is evaluated, so that there are no results.
        """
        run = self._run
        splits = list(dict.fromkeys([*run.table_splits, *run.teacher_splits]))
        if not splits:
            logger.info("nothing to evaluate: run.valid_splits and run.test_splits are empty")
            return False
        gallery = []
        if hasattr(self._task, "gallery"):
            with torch.no_grad():
                gallery = self._task.gallery(self.matchers, self._datasets[splits[0]], run, self._place.device)
        rows = {split: self._rows(split, step) for split in splits}
        write_results(self._folder, title, rows, gallery, {**machine(run, self._place), **facts})
        for split in splits:
            logger.info("results on %s:\n%s", split, format_table(rows[split]))
        return True

    def _rows(self, split: str, step: int) -> list[dict[str, Any]]:
        name, get = self.learner, self._evaluations.get
        rows = {"teacher": get("teacher", split, None)}
        if step > 0:
            rows[f"{name} before training"] = get(name, split, 0)
        rows[name] = get(name, split, step)
        return [{"name": title, **metrics} for title, metrics in rows.items() if metrics is not None]
