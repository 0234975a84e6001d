"""Where a job lives: the checkpoint it continues, or the new folder it starts in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import clear_leftovers
from lavis_dcd.runners import checkpoint
from lavis_dcd.runners.changes import check_shapes, data_fingerprint, refusals
from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.devices import Place
from lavis_dcd.runners.folder import new_run_folder

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
    place: Place,
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


def _from_main(place: Place, work: Callable[[], T]) -> T:
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
