"""A job's evaluations: the learner while it trains, its best weights, the teacher once, the final table."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.learner import as_learner
from lavis_dcd.reporting.memorised import Memorised
from lavis_dcd.reporting.table import format_table
from lavis_dcd.training import checkpoint
from lavis_dcd.training.contracts import TrainTask
from lavis_dcd.training.devices import Process
from lavis_dcd.training.evaluations import Evaluations, evaluation_identity
from lavis_dcd.training.logs import WEIGHTS_OF_STEP, MetricsLog
from lavis_dcd.training.run_folder import write_results
from lavis_dcd.training.strategy import Strategy

log = logging.getLogger(__name__)

TRAIN = "train"


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
        identity: of the job.
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
        identity: Identity,
        resume_step: int | None = None,
    ) -> None:
        self._identity = identity
        self._folder, self._run, self._task, self._strategy = folder, run, task, strategy
        self._process, self._datasets, self._metrics = strategy.process, datasets, metrics
        of_evaluations = evaluation_identity(identity, run)
        self._evaluations = Evaluations(folder, task, run, self._process, of_evaluations, resume_step)
        self._on_training: dict[str, Any] | None = None  # the teacher's metrics
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
        """Evaluate the teacher, if there is one, on run.teacher_splits and where the task says so on training pictures.

        Args:
            step: where the job stands.
        """
        splits = self._run.teacher_splits
        if "teacher" not in self.matchers or not splits:
            return
        # first, so that the task's last evaluation is one that the gallery shows
        like = self._datasets[splits[0]]
        sample = self._task.training_sample(self.matchers["teacher"], like, self._run)
        if sample is not None:
            self._on_training = self._evaluate("teacher", TRAIN, None, step, sample, {"pictures": len(sample)})
            self.write_evaluations()
        for split in splits:
            self._evaluate("teacher", split, None, step)
            self.write_evaluations()

    def _evaluate(
        self,
        name: str,
        split: str,
        step: int | None,
        log_step: int,
        dataset: Any = None,
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        self._strategy.bare_model.eval()
        dataset = self._datasets[split] if dataset is None else dataset
        metrics = self._evaluations.evaluate(name, self.matchers[name], dataset, split, step, facts)
        line = {"split": split, "model": name, WEIGHTS_OF_STEP: step, **metrics}
        self._metrics.write("eval", log_step, log_step / self.steps_per_epoch, line)
        return metrics

    def write_evaluations(self) -> None:
        """Write what was evaluated to the run folder, so that a resumed job does not repeat it."""
        self._evaluations.write()

    def validate(self, step: int) -> None:
        """Evaluate on run.valid_splits; keep the weights if their mean `agg_metrics` is the best so far."""
        metric = self._metric(step)
        if metric is None:
            return
        if self.best is None or metric > self.best["metric"]:
            self.best = {"step": step, "metric": metric}
            weights = self._strategy.whole(self._strategy.bare_model.state_dict())
            content = {"model": weights, **self.best}
            if self._process.is_main:
                path = checkpoint.best_file(self._folder, step)
                checkpoint.save(path, content, checkpoint.BEST_KIND, self._identity)
            log.info("best so far: %.2f at step %d", metric, step)
        # After the weights, so that a stored evaluation always has the file it speaks of.
        self.write_evaluations()

    def _metric(self, step: int) -> float | None:
        by_split = self.evaluate_learner(self._run.valid_splits, step)
        if not by_split:
            return None
        for split, metrics in by_split.items():
            if not isinstance(metrics.get("agg_metrics"), (int, float)):
                raise UserError(
                    f"run.valid_splits: the task's evaluation of {split} has no agg_metrics, by which the best step is "
                    "chosen; leave the split out, or let the task return it"
                )
        return float(sum(metrics["agg_metrics"] for metrics in by_split.values()) / len(by_split))

    def lacks_before(self) -> list[str]:
        """Return the splits of the table on which the learner as built was not evaluated."""
        return [split for split in self._run.table_splits if not self._evaluations.get(self.learner_name, split, 0)]

    def rescore(self) -> None:
        """Evaluate the best weights so far anew, whose metric is of other data; they stay in the model."""
        if self.best is not None:
            self.load_best()
            metric = self._metric(self.best["step"])
            if metric is not None:
                log.info("the best so far, of step %d: %.2f on the data of now", self.best["step"], metric)
                self.best = {"step": self.best["step"], "metric": metric}

    def load_best(self) -> None:
        """Put the best weights into the model, where a best was chosen."""
        if self.best is not None:
            self._process.share(None)  # the main process has written the file
            path = checkpoint.best_file(self._folder, self.best["step"])
            self._strategy.load_model(checkpoint.load_best(path))

    def write_results(self, title: str, step: int, facts: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
        """Write results.json, and the table to the log, for the learner of optimizer step `step`.

        Args:
            facts: more of the machine.

        Returns:
            The names of the files; none where no split is evaluated.
        """
        run = self._run
        splits = list(dict.fromkeys([*run.table_splits, *run.teacher_splits]))
        if not splits:
            log.info(
                "nothing to evaluate: run.valid_splits and run.test_splits are empty; no recall is known, and the "
                "weights are those of the last step"
            )
            return []
        # the gallery scores whatever has no scores yet: a teacher that the job does not evaluate is left out
        shown = {
            name: matcher
            for name, matcher in self.matchers.items()
            if name != "teacher" or splits[0] in run.teacher_splits
        }
        with torch.no_grad():
            gallery = self._task.gallery(shown, self._datasets[splits[0]], run, self._process.device)
        rows = {split: self._rows(split, step) for split in splits}
        facts, memorised = {**machine(run, self._process), **facts}, self._memorised()
        names = write_results(self._folder, title, rows, gallery, facts, self._identity, memorised)
        for split in splits:
            log.info("results on %s:\n%s", split, format_table(rows[split]))
        if memorised is not None:
            log.info("%s", memorised)
        return names

    def _memorised(self) -> Memorised | None:
        """Return the teacher's recall on training pictures beside that on its first split, where both are known."""
        if self._on_training is None:
            return None
        split = self._run.teacher_splits[0]
        return Memorised.of(split, self._on_training, self._evaluations.get("teacher", split, None) or {})

    def _rows(self, split: str, step: int) -> list[dict[str, Any]]:
        name, get = self.learner_name, self._evaluations.get
        rows = {"teacher": get("teacher", split, None)}
        if step > 0:
            rows[f"{name} before training"] = get(name, split, 0)
        rows[name] = get(name, split, step)
        return [{"name": title, **metrics} for title, metrics in rows.items() if metrics is not None]
