"""What the steps of a training job tell: means over a window of them, in the log and in metrics.jsonl."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.devices import Place
from lavis_dcd.runners.health import SKIPPED
from lavis_dcd.runners.logs import DATA_WAIT, DataClock, MetricsLog, Window
from lavis_dcd.runners.watch import ScoreWatch

logger = logging.getLogger(__name__)


class StepLog:
    """Writes a line for every `run.log_freq` steps, and warns of scores that tell of trouble.

    Args:
        folder: the run folder, for messages.
        total_steps: of the whole job, whose last step also ends a window.
    """

    def __init__(
        self,
        run: RunConfig,
        place: Place,
        folder: Path,
        metrics: MetricsLog,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self._run, self._place, self._folder, self._metrics = run, place, folder, metrics
        self._steps_per_epoch, self._total = steps_per_epoch, total_steps
        self._watch = ScoreWatch()
        self.window, self.clock = Window(), DataClock()

    def add(self, report: Mapping[str, torch.Tensor], step: int, lr: float, skipped: int) -> None:
        """Count a step; every process must call it.

        Args:
            report: the step's scalars; none where it was skipped.
            step: where the job stands now.
            lr: at which the step was taken.
            skipped: steps of the job that were.
        """
        self.window.add(report)
        if step % self._run.log_freq == 0 or step == self._total:
            self._write(step, lr, skipped)

    def _write(self, step: int, lr: float, skipped: int) -> None:
        means = self.finite_means(step)
        self._watch.see(means, self.window.steps)
        self.window.clear()
        epoch, waited = step / self._steps_per_epoch, self.clock.share()
        self._metrics.write("train", step, epoch, {"lr": lr, **means, DATA_WAIT: waited, SKIPPED: skipped})
        told = {**means, DATA_WAIT: waited, **({SKIPPED: skipped} if skipped else {})}
        shown = " ".join(f"{name} {value:.4g}" for name, value in told.items())
        logger.info("epoch %.2f step %d/%d lr %.3g %s", epoch, step, self._total, lr, shown)

    def finite_means(self, step: int) -> dict[str, float]:
        """The window's means over all processes, which all must call.

        Raises:
            UserError: the loss is not finite.
        """
        return self.window.finite_means(self._place, step, self._folder)
