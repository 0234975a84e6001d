"""Checkpoints of a running job: whole or absent, tensors and plain containers only, found by themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write

FORMAT = 1
FOLDER = "checkpoints"
_FIELDS = {
    "format",
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",
    "position",
    "best",
    "window",
    "config",
    "teacher_fingerprint",
}
# Keys of run: without which the position of a checkpoint, or its optimizer state, would mean something else.
_FIXED_RUN_KEYS = (
    "seed",
    "batch_size_train",
    "accum_grad_iters",
    "drop_last",
    "batch_by",
    "train_splits",
    "init_lr",
    "head_lr_multiplier",
    "weight_decay",
    "betas",
    "eps",
    "lr_sched",
    "amp",
)

logger = logging.getLogger(__name__)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` is the whole file or does not exist."""
    with atomic_write(path) as handle:
        torch.save(content, handle)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: the file is absent, broken, or not a checkpoint of a running job.
    """
    content = _read(path)
    if not isinstance(content, dict) or not set(content) >= _FIELDS:
        raise UserError(
            f"run.resume: {path} holds no state of a running job; "
            f"name a file <run folder>/{FOLDER}/step-*.pth"
        )
    if content["format"] != FORMAT:
        raise UserError(f"run.resume: {path} has format {content['format']}, this version reads {FORMAT}")
    return content


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"run.resume: {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds of errors on a damaged file
        raise UserError(
            f"run.resume: {path} is not a readable checkpoint ({type(error).__name__})"
        ) from error


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint, or in a file of best weights.

    Raises:
        UserError: the file is absent, broken, or holds no "model".
    """
    content = _read(path)
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f'run.resume: {path} holds no weights of a run (no entry "model")')
    return content["model"]


def best_weights(path: Path) -> dict[str, torch.Tensor]:
    """The best model's tensors in the job whose checkpoint is `path`; those of `path` if there is none."""
    content = load(path)
    best = content["best"] and best_file(path.absolute().parent.parent, content["best"]["step"])
    return load_weights(best) if best and best.is_file() else content["model"]


def step_file(run_folder: Path, step: int) -> Path:
    """The checkpoint written after optimizer step `step`."""
    return run_folder / FOLDER / f"step-{step:08d}.pth"


def best_file(run_folder: Path, step: int) -> Path:
    """The weights of the best model, as of optimizer step `step`."""
    return run_folder / FOLDER / f"best-{step:08d}.pth"


def newest_valid(folders: list[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint in any of the run folders, and its content; None where there is none."""
    files = [path for folder in folders for path in (folder / FOLDER).glob("step-*.pth")]
    for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            return path, load(path)
        except UserError as error:
            logger.warning("%s; trying the one before it", error)
    return None


def find(resume: str, project_folder: Path, job_id: str | None = None) -> tuple[Path, dict[str, Any]] | None:
    """What `run.resume` names.

    Args:
        resume: "auto" (the newest valid checkpoint of the project), a checkpoint file, or a run folder.
        project_folder: holds the run folders.
        job_id: with "auto", look in this run folder only.

    Returns:
        The file and its content; None when "auto" finds nothing.

    Raises:
        UserError: a named file or folder has no readable checkpoint.
    """
    if resume == "auto":
        return newest_valid([project_folder / job_id] if job_id else sorted(project_folder.glob("*")))
    path = Path(resume)
    if not path.is_dir():
        return path, load(path)
    found = newest_valid([path])
    if found is None:
        raise UserError(f"run.resume: {path} has no readable checkpoint in its folder {FOLDER}/")
    return found


def prune(run_folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and the best weights that none of them refers to."""
    folder = run_folder / FOLDER
    for path in sorted(folder.glob("step-*.pth"))[:-keep_last]:
        path.unlink()
    # Between two kept checkpoints at most one best is written, and one more after the newest.
    for path in sorted(folder.glob("best-*.pth"))[: -keep_last - 1]:
        path.unlink()


def discard_after(run_folder: Path, step: int) -> None:
    """Delete checkpoints and best weights of later steps: the job goes back to `step` and rewrites them."""
    for path in (run_folder / FOLDER).glob("*-*.pth"):
        if int(path.stem.split("-")[1]) > step:
            path.unlink()


def refusals(
    saved: dict[str, Any], config: dict[str, Any], teacher_fingerprint: str, world_size: int
) -> list[str]:
    """Why a checkpoint cannot be continued with this config, one line per difference.

    Args:
        saved: a checkpoint's content.
        config: {"model": ..., "datasets": ..., "run": ...}, plain containers.
        teacher_fingerprint: of the teacher as built now.
        world_size: the number of processes now.
    """
    lines = []
    if saved["teacher_fingerprint"] != teacher_fingerprint:
        before, now = _short(saved["teacher_fingerprint"]), _short(teacher_fingerprint)
        lines.append(
            f"run.resume: the teacher's weights changed (fingerprint {before} in the checkpoint, {now} now)"
        )
    pairs = [
        (section, saved["config"].get(section), config.get(section)) for section in ("model", "datasets")
    ]
    pairs += [
        (f"run.{key}", saved["config"]["run"].get(key), config["run"].get(key)) for key in _FIXED_RUN_KEYS
    ]
    pairs.append(("number of processes", saved["position"]["world_size"], world_size))
    for name, before, now in pairs:
        lines += [f"run.resume: {line}" for line in _differences(name, before, now)]
    if lines:
        lines.append("run.resume: put these back to continue the job, or start a new one without run.resume")
    return lines


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"


def _differences(name: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now), key=str)
        return [line for key in keys for line in _differences(f"{name}.{key}", before.get(key), now.get(key))]
    same = before == now or (
        isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and list(before) == list(now)
    )
    return [] if same else [f"{name} was {before!r} in the checkpoint, is {now!r} now"]
