"""The state of a job: the checkpoint that it continues or the folder it starts in, and what its checkpoints hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import clear_leftovers
from lavis_dcd.common.seeding import rng_state, set_rng_state
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import checkpoint
from lavis_dcd.training.best_checkpoint import BestCheckpoint
from lavis_dcd.training.devices import Process
from lavis_dcd.training.logs import ScalarMeans
from lavis_dcd.training.resume_checks import check_shapes, data_fingerprint, resume_faults
from lavis_dcd.training.run_folder import new_run_folder
from lavis_dcd.training.step import Stepper
from lavis_dcd.training.strategy import Strategy

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Position:
    """The progress of a job, in optimizer steps, and with how many processes."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    world_size: int = 1


class Origin(TypedDict):
    """The origin of a job: a checkpoint of another origin is not continued.

    `config` is {"model", "datasets", "run"} in plain containers, `data` the training set's `data_fingerprint`.
    """

    config: Mapping[str, Any]
    teacher_fingerprint: str
    data: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ResumePoint:
    """The run folder, and what is to be loaded into the job.

    Args:
        folder: the run folder, which exists.
        origin: of the job, for its checkpoints.
        continued: the content of the checkpoint that training continues, else None.
        weights: the model's tensors to evaluate (run.evaluate with run.resume), else None.
    """

    folder: Path
    origin: Origin
    continued: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None


def find_resume_point(
    run: RunConfig,
    process: Process,
    project_folder: Path,
    job_id: str | None,
    config: Mapping[str, Any],
    teacher: str,
    model: nn.Module,
    dataset: Any = None,
) -> ResumePoint:
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
    origin = Origin(config=config, teacher_fingerprint=teacher, data=data)
    named: tuple[Path, dict[str, Any]] | None = None

    def find() -> Path | None:
        nonlocal named
        named = checkpoint.find(run.resume, project_folder, run.job_id) if run.resume else None
        return named[0] if named else None

    path = _from_main(process, find)
    if path is None and run.resume:
        log.info("run.resume=auto: no checkpoint below %s, starting anew", project_folder)
    if path is not None and not run.evaluate:
        content = named[1] if named else checkpoint.load(path)
        return _continued(path, content, origin, run, process, model)
    weights = None
    if path is not None:
        weights = checkpoint.best_weights(path)
        check_shapes(path, weights, model.state_dict())
    folder = _from_main(process, lambda: new_run_folder(project_folder, run, job_id))
    return ResumePoint(folder, origin, weights=weights)


def _continued(
    path: Path, content: dict[str, Any], origin: Origin, run: RunConfig, process: Process, model: nn.Module
) -> ResumePoint:
    refused, passed = resume_faults(
        content, origin["config"], origin["teacher_fingerprint"], process.world_size, origin["data"], run.resume_force
    )
    if refused:
        raise UserError(refused)
    check_shapes(path, content["model"], model.state_dict())
    for line in passed:
        log.warning("%s", line)
    folder = path.absolute().parent.parent
    if process.is_main:
        clear_leftovers(folder)
    log.info("continuing %s", path)
    return ResumePoint(folder, origin, continued=content)


def _from_main(process: Process, work: Callable[[], T]) -> T:
    """Return in every process what `work` returns in the main one; a user error there is raised in every process."""
    result: T | None = None
    error: UserError | None = None
    if process.is_main:
        try:
            result = work()
        except UserError as caught:
            error = caught
    result, error = process.share((result, error))
    if error is not None:
        raise error
    return result


class JobState:
    """Saves the state of a job and restores it, whatever `run.strategy` trains it.

    Args:
        folder: the run folder.
        means: of the scalars since the last log line.
        origin: what the job is made of.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        strategy: Strategy,
        stepper: Stepper,
        means: ScalarMeans,
        best: BestCheckpoint,
        origin: Origin,
    ) -> None:
        self._folder, self._run, self._strategy = folder, run, strategy
        self._stepper, self._means, self._best, self._origin = stepper, means, best, origin

    def save(self, position: Position) -> None:
        """Write a checkpoint. Every process must call it: the main one writes what all have gathered.

        Raises:
            UserError: it cannot be written.
        """
        content = {
            "format": checkpoint.FORMAT,
            "model": self._strategy.whole(self._strategy.bare_model.state_dict()),
            **self._stepper.state_dict(),
            "rng": rng_state(),
            "position": asdict(position),
            "best": self._best.best,
            "window": self._means.state_dict(),
            **self._origin,
        }
        if not self._strategy.process.is_main:
            return
        path = checkpoint.step_file(self._folder, position.global_step)
        checkpoint.save(path, content)
        checkpoint.prune(self._folder, self._run.keep_last, self._run.keep_best)
        log.info("saved %s", path.name)

    def restore(self, content: dict[str, Any]) -> Position:
        """Put the content of a checkpoint back, the same in every process; return where the job stood."""
        self._strategy.load_model(content["model"])
        self._stepper.load_state_dict(content)
        self._means.load_state_dict(content["window"], self._strategy.process.device)
        set_rng_state(content["rng"])
        best = content["best"]
        if best is not None and not checkpoint.has_best(self._folder, best["step"]):
            best = None
        self._best.best = best
        position = Position(**content["position"])
        log.info("resumed at step %d (epoch %d)", position.global_step, position.epoch + 1)
        return position
