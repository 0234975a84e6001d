"""What a job evaluates: the learner while it trains, the best of it, the teacher once, the final table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lavis_dcd.runners import checkpoint
from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.devices import Place
from lavis_dcd.runners.evaluations import Evaluations, machine
from lavis_dcd.runners.folder import write_results
from lavis_dcd.runners.logs import MetricsLog
from lavis_dcd.runners.report_table import format_table
from lavis_dcd.runners.sharding import load_model, whole

logger = logging.getLogger(__name__)


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
        place: Place,
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
                gallery = self._task.gallery(
                    self.matchers, self._datasets[splits[0]], run, self._place.device
                )
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
