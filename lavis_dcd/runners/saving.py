"""What a checkpoint of a running job holds: gathered from its parts, written, and put back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lavis_dcd.runners import checkpoint
from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.devices import Place
from lavis_dcd.runners.judge import Judge
from lavis_dcd.runners.logs import Window
from lavis_dcd.runners.resume import Position
from lavis_dcd.runners.seeding import rng_state, set_rng_state
from lavis_dcd.runners.sharding import load_model, whole
from lavis_dcd.runners.steps import Stepper

logger = logging.getLogger(__name__)


class Saver:
    """Saves the state of a job and restores it, whatever `run.strategy` trains it.

    Args:
        folder: the run folder.
        model: without DistributedDataParallel around it.
        origin: what the job is made of: "config", "teacher_fingerprint" and "data".
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        place: Place,
        model: nn.Module,
        stepper: Stepper,
        window: Window,
        judge: Judge,
        origin: Mapping[str, Any],
    ) -> None:
        self._folder, self._run, self._place = folder, run, place
        self._model, self._stepper, self._window, self._judge = model, stepper, window, judge
        self._origin = dict(origin)

    def save(self, position: Position) -> None:
        """Write a checkpoint. Every process must call it: the main one writes what all have gathered.

        Raises:
            UserError: it cannot be written.
        """
        content = {
            "format": checkpoint.FORMAT,
            "model": whole(self._model.state_dict(), self._place.is_main),
            **self._stepper.state_dict(),
            "rng": rng_state(),
            "position": asdict(position),
            "best": self._judge.best,
            "window": self._window.state_dict(),
            **self._origin,
        }
        if not self._place.is_main:
            return
        path = checkpoint.step_file(self._folder, position.global_step)
        checkpoint.save(path, content)
        checkpoint.prune(self._folder, self._run.keep_last, self._run.keep_best)
        logger.info("saved %s", path.name)

    def restore(self, content: dict[str, Any]) -> Position:
        """Put the content of a checkpoint back, the same in every process; returns where the job stood."""
        load_model(self._model, content["model"])
        self._stepper.load_state_dict(content)
        self._window.load_state_dict(content["window"], self._place.device)
        set_rng_state(content["rng"])
        best = content["best"]
        if best is not None and not checkpoint.has_best(self._folder, best["step"]):
            best = None
        self._judge.best = best
        position = Position(**content["position"])
        logger.info("resumed at step %d (epoch %d)", position.global_step, position.epoch + 1)
        return position
