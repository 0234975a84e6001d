"""A job's evaluations: the learner while it trains, its best weights, the teacher once, the final table."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import torch

from lavis_dcd.common.errors import NotFiniteError, UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.processes import ALONE
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.learner import as_learner
from lavis_dcd.reporting.table import format_table
from lavis_dcd.training import checkpoint
from lavis_dcd.training.contracts import TrainTask
from lavis_dcd.training.devices import Process
from lavis_dcd.training.logs import WEIGHTS_OF_STEP, MetricsLog
from lavis_dcd.training.run_folder import write_results
from lavis_dcd.training.strategy import Strategy

FILE = "evaluations.json"

log = logging.getLogger(__name__)


class _Entry(TypedDict):
    step: int | None
    metrics: dict[str, Any]


class Evaluations:
    """The evaluations of a run, keyed by split, matcher and optimizer step.

    A resumed job repeats none that was kept (`write`). The processes share an evaluation's work where the task says
    that it can (`evaluates_over_ranks`); otherwise the main one evaluates and the others wait.

    Args:
        folder: the run folder.
        task: its `evaluate_matcher` gives the metrics.
        resume_step: forget evaluations of later steps; None forgets all.
    """

    def __init__(
        self, folder: Path, task: TrainTask, run: RunConfig, process: Process, resume_step: int | None = None
    ) -> None:
        self._folder, self._task, self._run, self._process = folder, task, run, process
        self._file = folder / FILE
        self._done: dict[str, _Entry] = {}
        if resume_step is not None and self._file.is_file():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            self._done = {
                key: entry for key, entry in stored.items() if entry["step"] is None or entry["step"] <= resume_step
            }

    def get(self, name: str, split: str, step: int | None) -> dict[str, Any] | None:
        """Return the metrics of an evaluation that was made, else None."""
        entry = self._done.get(_key(name, split, step))
        return dict(entry["metrics"]) if entry else None

    def evaluate(self, name: str, matcher: Any, dataset: Any, split: str, step: int | None) -> dict[str, Any]:
        """Return the metrics of `matcher` on a split, evaluated now unless that was done before.

        The caller puts the model into eval mode.

        Args:
            name: of the matcher ("teacher", "student", ...).
            step: how many optimizer steps its weights have seen; None for weights that do not learn.
        """
        stored = self.get(name, split, step)
        if stored is not None:
            return stored
        measures = self._process.is_main or self._shares_work
        metrics = self._process.share(self._measure(name, matcher, dataset, split) if measures else None)
        self._done[_key(name, split, step)] = {"step": step, "metrics": metrics}
        return dict(metrics)

    @property
    def _shares_work(self) -> bool:
        return self._process.world_size > 1 and self._task.evaluates_over_ranks

    def _measure(self, name: str, matcher: Any, dataset: Any, split: str) -> dict[str, Any]:
        begin = time.monotonic()
        ranks = self._process.ranks if self._shares_work else ALONE
        try:
            with torch.no_grad():
                evaluation = self._task.evaluate_matcher(
                    matcher, dataset, self._run, self._process.device, ranks=ranks, folder=self._folder
                )
        except NotFiniteError as error:
            raise UserError([f"{name} on {split}: {line}" for line in error.faults]) from error
        metrics = {key: _plain(value) for key, value in evaluation.items()}
        if self._process.is_main:
            log.info("%s on %s: %s (%.1f s)", name, split, summary(metrics), time.monotonic() - begin)
        return metrics

    def write(self) -> None:
        """Write what was evaluated so far to the run folder."""
        if self._process.is_main:
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
    """Return the figures of one evaluation as a line."""
    shown = [
        key
        for key in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean", "r_sum")
        if isinstance(metrics.get(key), (int, float))
    ]
    shown = shown or [key for key, value in metrics.items() if isinstance(value, float)]
    return ", ".join(f"{key} {metrics[key]:.2f}" for key in shown)


def machine(run: RunConfig, process: Process) -> dict[str, Any]:
    """Return where the figures were measured, for results.json."""
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(process.device),
        "processes": process.world_size,
        "precision": "fp32" if run.amp == "off" else run.amp,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if process.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(process.device)
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


class Best(TypedDict):
    """The best step so far, and its mean of `agg_metrics` over run.valid_splits."""

    step: int
    metric: float


class BestCheckpoint:
    """Evaluates the matchers of a model and keeps the weights of the best step.

    Args:
        folder: the run folder.
        task: evaluates.
        strategy: holds the model, whose `matchers()` names what is evaluated.
        datasets: by split.
        metrics: gets a line for each evaluation.
        resume_step: of the checkpoint that a resumed job continues, else None.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        task: TrainTask,
        strategy: Strategy,
        datasets: Mapping[str, Any],
        metrics: MetricsLog,
        resume_step: int | None = None,
    ) -> None:
        self._folder, self._run, self._task, self._strategy = folder, run, task, strategy
        self._process, self._datasets, self._metrics = strategy.process, datasets, metrics
        self._evaluations = Evaluations(folder, task, run, self._process, resume_step)
        self.best: Best | None = None
        self.steps_per_epoch = 1

    @property
    def matchers(self) -> Mapping[str, Any]:
        """Return what can be evaluated, by name."""
        return as_learner(self._strategy.bare_model).matchers()

    @property
    def learner_name(self) -> str:
        """The name of the matcher that learns: "student", or the only one that is not the teacher."""
        names = list(self.matchers)
        return "student" if "student" in names else next(name for name in names if name != "teacher")

    def evaluate_learner(
        self, splits: Sequence[str], step: int, log_step: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return the learner's metrics by split.

        Args:
            step: the optimizer steps that its weights have taken.
            log_step: where the job stands, if further than that (the best weights, loaded at the end).
        """
        log_step = step if log_step is None else log_step
        return {split: self._evaluate(self.learner_name, split, step, log_step) for split in splits}

    def evaluate_teacher(self, step: int) -> None:
        """Evaluate the teacher, if there is one, on run.teacher_splits; the job stands at `step`."""
        if "teacher" in self.matchers:
            for split in self._run.teacher_splits:
                self._evaluate("teacher", split, None, step)
                self.write_evaluations()

    def _evaluate(self, name: str, split: str, step: int | None, log_step: int) -> dict[str, Any]:
        self._strategy.bare_model.eval()
        metrics = self._evaluations.evaluate(name, self.matchers[name], self._datasets[split], split, step)
        line = {"split": split, "model": name, WEIGHTS_OF_STEP: step, **metrics}
        self._metrics.write("eval", log_step, log_step / self.steps_per_epoch, line)
        return metrics

    def write_evaluations(self) -> None:
        """Write what was evaluated to the run folder, so that a resumed job does not repeat it."""
        self._evaluations.write()

    def validate(self, step: int) -> None:
        """Evaluate on run.valid_splits; keep the weights if their mean `agg_metrics` is the best so far."""
        by_split = self.evaluate_learner(self._run.valid_splits, step)
        if not by_split:
            return
        metric = sum(metrics["agg_metrics"] for metrics in by_split.values()) / len(by_split)
        if self.best is None or metric > self.best["metric"]:
            self.best = {"step": step, "metric": metric}
            weights = self._strategy.whole(self._strategy.bare_model.state_dict())
            content = {"model": weights, **self.best}
            if self._process.is_main:
                checkpoint.save(checkpoint.best_file(self._folder, step), content)
            log.info("best so far: %.2f at step %d", metric, step)
        # After the weights, so that a stored evaluation always has the file it speaks of.
        self.write_evaluations()

    def load_best(self) -> None:
        """Put the best weights into the model, where a best was chosen."""
        if self.best is not None:
            self._process.share(None)  # the main process has written the file
            path = checkpoint.best_file(self._folder, self.best["step"])
            self._strategy.load_model(checkpoint.load_weights(path))

    def write_results(self, title: str, step: int, facts: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """Write results.json, and the table to the log, for the learner of optimizer step `step`.

        Args:
            facts: more of the machine.

        Returns:
            False where no split is evaluated, so that there are no results.
        """
        run = self._run
        splits = list(dict.fromkeys([*run.table_splits, *run.teacher_splits]))
        if not splits:
            log.info("nothing to evaluate: run.valid_splits and run.test_splits are empty")
            return False
        with torch.no_grad():
            gallery = self._task.gallery(self.matchers, self._datasets[splits[0]], run, self._process.device)
        rows = {split: self._rows(split, step) for split in splits}
        write_results(self._folder, title, rows, gallery, {**machine(run, self._process), **facts})
        for split in splits:
            log.info("results on %s:\n%s", split, format_table(rows[split]))
        return True

    def _rows(self, split: str, step: int) -> list[dict[str, Any]]:
        name, get = self.learner_name, self._evaluations.get
        rows = {"teacher": get("teacher", split, None)}
        if step > 0:
            rows[f"{name} before training"] = get(name, split, 0)
        rows[name] = get(name, split, step)
        return [{"name": title, **metrics} for title, metrics in rows.items() if metrics is not None]
