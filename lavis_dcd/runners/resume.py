"""Where a job lives: the checkpoint it continues, or the new folder it starts in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_dcd.common.errors import UserError
from lavis_dcd.runners import checkpoint
from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.devices import Place
from lavis_dcd.runners.folder import new_run_folder

logger = logging.getLogger(__name__)


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
    """

    folder: Path
    continued: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None


def find_start(
    run: RunConfig,
    place: Place,
    project_folder: Path,
    job_id: str | None,
    config: Mapping[str, Any],
    teacher: str,
) -> Start:
    """Follow run.resume and run.job_id. Every process must call it.

    Args:
        project_folder: holds the run folders.
        job_id: a proposed name for a new run folder.
        config: {"model", "datasets", "run"} as the job would run now.
        teacher: the teacher's fingerprint.

    Raises:
        UserError: the checkpoint cannot be read, or does not belong to this config; the new folder is taken.
    """
    found = checkpoint.find(run.resume, project_folder, run.job_id) if run.resume and place.is_main else None
    path = place.share(found and found[0])
    if path is None and run.resume:
        logger.info("run.resume=auto: no checkpoint below %s, starting anew", project_folder)
    if path is not None and not run.evaluate:
        content = found[1] if found else checkpoint.load(path)
        refused = checkpoint.refusals(content, config, teacher, place.world_size)
        if refused:
            raise UserError(refused)
        logger.info("continuing %s", path)
        return Start(path.absolute().parent.parent, continued=content)
    weights = None if path is None else checkpoint.best_weights(path)
    return Start(
        Path(place.share(new_run_folder(project_folder, run, job_id) if place.is_main else None)),
        None,
        weights,
    )
