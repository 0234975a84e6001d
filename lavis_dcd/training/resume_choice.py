"""The choice of the checkpoint that `run.resume` names, and of the weights that an evaluation is of."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.training import checkpoint
from lavis_dcd.training.checkpoint import (
    BEST,
    FOLDER,
    FORMAT,
    OLD,
    STATE,
    STEP,
    Check,
    Checkpoint,
    anything,
    load,
    load_best,
    step_of,
)
from lavis_dcd.training.run_folder import best_step_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights to evaluate.

    Args:
        path: the folder that they are from.
        model: the model's tensors.
        words: for the log.
    """

    path: Path
    model: dict[str, torch.Tensor]
    words: str


def newest_valid(folders: Sequence[Path], fits: Check = anything) -> Checkpoint | None:
    """Return the newest whole checkpoint in any of the run folders; None where there is none.

    The folder with the newest checkpoint comes first, and in each folder the latest step. Each one passed over
    gets a line in the log, with the reason.

    Args:
        fits: the job's own check of a content.

    Raises:
        UserError: there are checkpoints in folders, and none is whole: starting anew would hide the loss.
    """
    by_folder = [[path for _, path in checkpoint.by_step(folder, STEP)] for folder in folders]
    for old in [path for folder in folders for _, path in checkpoint.by_step(folder, OLD)]:
        log.warning("passed over: run.resume: %s has format 1, this version reads %d", old, FORMAT)
    passed: list[str] = []
    for paths in sorted(filter(None, by_folder), key=lambda paths: max(map(_time, paths)), reverse=True):
        for path in reversed(paths):
            try:
                return load(path, fits)
            except UserError as error:
                log.warning("passed over: %s", error)
                passed += error.faults
    if passed:
        raise UserError(
            [*passed, f"run.resume: none of these {len(passed)} checkpoints is whole; move them away to start anew"]
        )
    return None


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def is_newest(path: Path) -> bool:
    """Return whether a checkpoint is there, and none of a later step beside it."""
    run_folder, step = path.absolute().parent.parent, step_of(path, STEP)
    return path.is_dir() and (step is None or all(other <= step for other, _ in checkpoint.by_step(run_folder, STEP)))


def find(resume: str, project_folder: Path, job_id: str | None = None, fits: Check = anything) -> Checkpoint | None:
    """Return the checkpoint that `run.resume` names; None when "auto" finds nothing.

    Args:
        resume: "auto" (the newest whole checkpoint of the project), a checkpoint, or a run folder.
        project_folder: holds the run folders.
        job_id: with "auto", look in this run folder only.
        fits: the job's own check of a content.

    Raises:
        UserError: there are checkpoints, and none is whole; a named folder has none.
    """
    if resume == "auto":
        return newest_valid([project_folder / job_id] if job_id else sorted(project_folder.glob("*")), fits)
    path = Path(resume)
    if _is_one(path):
        return load(path, fits)
    newest = newest_valid([path], fits)
    if newest is None:
        raise UserError(f"run.resume: {path} has no readable checkpoint in its folder {FOLDER}/")
    return newest


def _is_one(path: Path) -> bool:
    """Return whether a path is to be read as a checkpoint, not as a run folder."""
    return not path.is_dir() or any(p.fullmatch(path.name) for p in (STEP, BEST)) or (path / STATE).exists()


def find_weights(resume: str, project_folder: Path, job_id: str | None = None) -> Weights | None:
    """Return the weights that an evaluation with `run.resume` is of; None when "auto" finds nothing.

    A folder `step-*` or `best-*` that is named gives its own; a run folder and "auto" give the best of the job's
    newest checkpoint.

    Raises:
        UserError: as :func:`find`; the best weights are missing or damaged.
    """
    path = Path(resume)
    if resume != "auto" and BEST.fullmatch(path.name):
        return Weights(path, load_best(path), f"the best weights, of step {step_of(path, BEST)}")
    newest = find(resume, project_folder, job_id)
    if newest is None:
        return None
    own: dict[str, torch.Tensor] = newest.content["model"]
    if resume != "auto" and _is_one(path):
        return Weights(path, own, f"the weights of step {newest.step}, as run.resume names them")
    best = _best_step(newest)
    if best is None:
        return Weights(newest.path, own, f"the last weights, of step {newest.step}: no best was chosen by then")
    best_path = checkpoint.best_file(newest.path.absolute().parent.parent, best)
    try:
        return Weights(best_path, load_best(best_path), f"the best weights, of step {best}")
    except UserError as error:
        way_out = f"run.resume={newest.path} evaluates the last weights instead, of step {newest.step}"
        raise UserError(f"{'; '.join(error.faults)}: these are the best weights of the job; {way_out}") from error


def weights_at(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors in a checkpoint, or in a folder of best weights.

    Raises:
        UserError: it is absent or damaged.
    """
    if BEST.fullmatch(path.name):
        return load_best(path)
    weights: dict[str, torch.Tensor] = load(path).content["model"]
    return weights


def _best_step(newest: Checkpoint) -> int | None:
    """Return the step of a job's best weights as of its newest checkpoint, which is older than its own validation."""
    run_folder = newest.path.absolute().parent.parent
    chosen = best_step_of(run_folder)
    if chosen is not None and chosen <= newest.step:
        return chosen
    if os.path.lexists(checkpoint.best_file(run_folder, newest.step)):
        return newest.step
    best = newest.content["best"]
    return None if best is None else int(best["step"])
