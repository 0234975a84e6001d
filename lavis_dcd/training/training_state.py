"""Where a job lives: the checkpoint it continues, or the new folder it starts in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import clear_leftovers
from lavis_dcd.common.seeding import rng_state, set_rng_state
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import checkpoint
from lavis_dcd.training.best_checkpoint import Judge
from lavis_dcd.training.devices import Process
from lavis_dcd.training.logs import Window
from lavis_dcd.training.resume_checks import check_shapes, data_fingerprint, refusals
from lavis_dcd.training.run_folder import new_run_folder
from lavis_dcd.training.sharding import load_model, whole
from lavis_dcd.training.step import Stepper

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Position:
    """How far a job has come, in optimizer steps, and with how many processes."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Start:
    """The run folder, and what is to be loaded into the job.

    Args:
        folder: the run folder, which exists.
        continued: the content of the checkpoint that training continues, else None.
        weights: the model's tensors to evaluate (run.evaluate with run.resume), else None.
        data: the fingerprint of the training rows, for checkpoints.
    """

    folder: Path
    continued: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)


def find_start(
    run: RunConfig,
    place: Process,
    project_folder: Path,
    job_id: str | None,
    config: Mapping[str, Any],
    teacher: str,
    model: nn.Module,
    dataset: Any = None,
) -> Start:
    """Follow run.resume and run.job_id. Every process must call it.

    Args:
        project_folder: holds the run folders.
        job_id: a proposed name for a new run folder.
        config: {"model", "datasets", "run"} as the job would run now.
        teacher: the teacher's fingerprint.
        model: as built, whose weights a checkpoint must fit.
        dataset: the training set, if there is one.

    Raises:
        UserError: the checkpoint cannot be read, does not belong to this config, or is another model's; the new
            folder is taken.
    """
    # hashing the rows takes seconds, and an evaluation neither compares nor keeps the hash
    data = {} if run.evaluate else data_fingerprint(dataset)
    found: tuple[Path, dict[str, Any]] | None = None

    def find() -> Path | None:
        nonlocal found
        found = checkpoint.find(run.resume, project_folder, run.job_id) if run.resume else None
        return found and found[0]

    path = _from_main(place, find)
    if path is None and run.resume:
        logger.info("run.resume=auto: no checkpoint below %s, starting anew", project_folder)
    if path is not None and not run.evaluate:
        content = found[1] if found else checkpoint.load(path)
        refused, passed = refusals(content, config, teacher, place.world_size, data, run.resume_force)
        if refused:
            raise UserError(refused)
        check_shapes(path, content["model"], model.state_dict())
        for line in passed:
            logger.warning("%s", line)
        folder = path.absolute().parent.parent
        if place.is_main:
            clear_leftovers(folder)
        logger.info("continuing %s", path)
        return Start(folder, continued=content, data=data)
    weights = None
    if path is not None:
        weights = checkpoint.best_weights(path)
        check_shapes(path, weights, model.state_dict())
    folder = _from_main(place, lambda: new_run_folder(project_folder, run, job_id))
    return Start(folder, weights=weights, data=data)


def _from_main(place: Process, work: Callable[[], T]) -> T:
    """What `work` returns in the main process, in every process; so is a user error of its."""
    result, error = None, None
    if place.is_main:
        try:
            result = work()
        except UserError as caught:
            error = caught
    result, error = place.share((result, error))
    if error is not None:
        raise error
    return result


# ----------------------------------------------------------------------------------------------------
# What a checkpoint of a running job holds: gathered from its parts, written, and put back.


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
        place: Process,
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
