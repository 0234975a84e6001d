"""The state of a job: the checkpoint that it continues or the folder it starts in, and what its checkpoints hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import clear_leftovers
from lavis_dcd.common.seeding import rng_state, set_rng_state
from lavis_dcd.common.texts import shown
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import checkpoint
from lavis_dcd.training.best_checkpoint import BestCheckpoint
from lavis_dcd.training.checkpoint import Checkpoint
from lavis_dcd.training.devices import Process
from lavis_dcd.training.environment import comparable
from lavis_dcd.training.logs import ScalarMeans
from lavis_dcd.training.optimizer_form import OptimizerForm
from lavis_dcd.training.resume_checks import (
    OPTIMIZER_KEYS,
    Origin,
    changed_data,
    check_shapes,
    resume_faults,
    shape_faults,
    splits_of,
)
from lavis_dcd.training.resume_choice import Weights, find, find_weights, is_newest, weights_at
from lavis_dcd.training.run_folder import hold, new_run_folder
from lavis_dcd.training.saved_state import check_finite, same
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


@dataclass(frozen=True)
class ResumePoint:
    """The run folder, and what is to be loaded into the job.

    Args:
        folder: the run folder, which exists.
        origin: of the job, for its checkpoints.
        held: the folder's lock, in the main process; closing it gives the lock back.
        continued: the checkpoint that training continues, else None.
        weights: to evaluate (run.evaluate with run.resume), else None.
    """

    folder: Path
    origin: Origin
    held: ExitStack
    continued: Checkpoint | None = None
    weights: Weights | None = None

    def changed_splits(self, splits: Iterable[str]) -> set[str]:
        """Return those whose rows or pictures are others than in the checkpoint that is continued."""
        if self.continued is None:
            return set()
        return splits_of(changed_data(self.continued.identity, self.origin.identity), splits)


def find_resume_point(
    run: RunConfig, process: Process, project_folder: Path, job_id: str | None, origin: Origin, model: nn.Module
) -> ResumePoint:
    """Follow run.resume and run.job_id, and lock the run folder. Every process must call it.

    Args:
        project_folder: holds the run folders.
        job_id: a proposed name for a new run folder.
        origin: of the job as it would run now.
        model: as built, whose weights a checkpoint must fit.

    Raises:
        UserError: the checkpoint cannot be read, does not belong to this config, or is another model's; the new
            folder is taken; another process writes to the folder.
    """
    search = _Search(run, process, project_folder, job_id, origin, model, ExitStack())
    try:
        return search.weights() if run.evaluate else search.checkpoint()
    except BaseException:
        search.held.close()
        raise


@dataclass(frozen=True)
class _Search:
    """The search for what `run.resume` names, with what a job knows before it begins."""

    run: RunConfig
    process: Process
    project_folder: Path
    job_id: str | None
    origin: Origin
    model: nn.Module
    held: ExitStack

    def weights(self) -> ResumePoint:
        """Find the weights to evaluate, and make the evaluation's folder."""
        run, main = self.run, self.process.is_main
        found: Weights | None = None

        def named() -> tuple[Path, str] | None:
            nonlocal found
            with _reading(run.resume):
                found = find_weights(run.resume, self.project_folder, run.job_id) if run.resume else None
            return (found.path, found.words) if found else None

        place = from_main(self.process, named)
        if place is None:
            if run.resume:
                log.warning(
                    "run.resume=auto: no checkpoint below %s; the model as built is evaluated", self.project_folder
                )
            return self._new_folder()
        # the other processes read for themselves: weights are too large to be sent
        weights = found if main and found else Weights(place[0], weights_at(place[0]), place[1])
        check_shapes(weights.path, weights.model, self.model.state_dict())
        _check_finite(weights.path, weights.model, self.model.state_dict())
        return replace(self._new_folder(), weights=weights)

    def checkpoint(self) -> ResumePoint:
        """Find the checkpoint to continue and lock its folder, or make a new one."""
        run, fits = self.run, _Fits(self.run, self.model, self.origin.config)
        found: Checkpoint | None = None

        def named() -> Path | None:
            nonlocal found
            with _reading(run.resume):
                found = find(run.resume, self.project_folder, run.job_id, fits) if run.resume else None
            if found is None:
                return None
            folder = _run_folder_of(found.path)
            self.held.enter_context(hold(folder))
            if not is_newest(found.path) and checkpoint.step_of(Path(run.resume or "")) is None:
                # another process has trained on since, and has just ended
                found = find(str(folder), self.project_folder, None, fits)
            return found.path if found else None

        path = from_main(self.process, named)
        if path is None:
            return self._new_folder()
        saved = found or checkpoint.load(path, fits)
        _check_origin(saved, self.origin, run, self.process, self.model)
        folder = _run_folder_of(path)
        if self.process.is_main:
            clear_leftovers(folder)
        log.info("continuing %s", path)
        return ResumePoint(folder, self.origin, self.held, continued=saved)

    def _new_folder(self) -> ResumePoint:
        if self.run.resume and not self.run.evaluate:
            log.info("run.resume=auto: no checkpoint below %s, starting anew", self.project_folder)
        make = partial(new_run_folder, self.project_folder, self.run, self.job_id, self.held)
        return ResumePoint(from_main(self.process, make), self.origin, self.held)


@contextmanager
def _reading(resume: str | None) -> Iterator[None]:
    """Turn what the system says of an odd or unreadable path into a line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run.resume: {shown(resume, 300)} cannot be read ({error.strerror or error})") from error


def _run_folder_of(path: Path) -> Path:
    where = path.absolute().parent
    if where.name != checkpoint.FOLDER:
        raise UserError(
            f"run.resume: {path} does not lie in <run folder>/{checkpoint.FOLDER}/, so its job cannot go on there; put "
            "it back"
        )
    return where.parent


class _Fits:
    """The job's own check of a checkpoint: its values are such as this job leaves.

    Another model's checkpoint passes: that is no damage, and is told by `check_shapes` for the newest one.
    """

    def __init__(self, run: RunConfig, model: nn.Module, config: Mapping[str, Any]) -> None:
        self._run, self._model, self._config = run, model, config
        self._form: OptimizerForm | None = None

    def __call__(self, content: Mapping[str, Any]) -> None:
        built = self._model.state_dict()
        if shape_faults("", content["model"], built):
            return
        check_finite(content["model"], built)
        before, now = content["config"]["run"], comparable(content["config"], self._config)["run"]
        if any(not same(before.get(key), now.get(key)) for key in OPTIMIZER_KEYS):
            return  # another optimizer: told as a change, not as damage
        if self._form is None:
            self._form = OptimizerForm.of(self._run, self._model)
        self._form.check(content)


def _check_origin(saved: Checkpoint, origin: Origin, run: RunConfig, process: Process, model: nn.Module) -> None:
    refused, passed = resume_faults(saved, origin, process.world_size, run.resume_force)
    if refused:
        raise UserError(refused)
    check_shapes(saved.path, saved.content["model"], model.state_dict())
    for line in passed:
        log.warning("%s", line)


def _check_finite(path: Path, weights: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    try:
        check_finite(weights, built)
    except ValueError as error:
        raise UserError(f"run.resume: {path}: {error}") from error


def from_main(process: Process, work: Callable[[], T]) -> T:
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
        neighbours: the digest of the neighbours that batches are made of; None without them.
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
        neighbours: str | None = None,
    ) -> None:
        self._folder, self._run, self._strategy = folder, run, strategy
        self._stepper, self._means, self._best, self._origin = stepper, means, best, origin
        self._neighbours = neighbours

    def save(self, position: Position) -> None:
        """Write a checkpoint. Every process must call it: the main one writes what all have gathered.

        Raises:
            UserError: it cannot be written.
        """
        origin = self._origin
        content = {
            "model": self._strategy.whole(self._strategy.bare_model.state_dict()),
            **self._stepper.state_dict(),
            "rng": rng_state(),
            "position": asdict(position),
            "best": self._best.best,
            "window": self._means.state_dict(),
            "config": origin.config,
            "teacher_fingerprint": origin.teacher_fingerprint,
            "as_built": origin.as_built,
            "rows": dict(origin.rows),
        }
        if self._neighbours is not None:
            content["neighbours"] = self._neighbours
        if not self._strategy.process.is_main:
            return
        path = checkpoint.step_file(self._folder, position.global_step)
        checkpoint.save(path, content, identity=origin.identity)
        checkpoint.prune(self._folder, self._run.keep_last, self._run.keep_best)
        log.info("saved %s", path.name)

    def restore_best(self, saved: Checkpoint) -> None:
        """Let the best so far be the checkpoint's, where its weights are there, whole, and of this model."""
        best = saved.content["best"]

        def fits(weights: Mapping[str, Any]) -> None:
            if faults := shape_faults(self._folder, weights, saved.content["model"]):
                raise ValueError(f"they are another model's: {faults[0]}")
            check_finite(weights, saved.content["model"])

        if best is not None and not checkpoint.has_best(self._folder, best["step"], fits):
            best = None
        self._best.best = best

    def restore(self, saved: Checkpoint) -> Position:
        """Put the content of a checkpoint back, the same in every process; return where the job stood."""
        content = saved.content
        self._strategy.load_model(content["model"])
        self._stepper.load_state_dict(content)
        self._means.load_state_dict(content["window"], self._strategy.process.device)
        set_rng_state(content["rng"])
        position = Position(**content["position"])
        log.info("resumed at step %d (epoch %d)", position.global_step, position.epoch + 1)
        return position
