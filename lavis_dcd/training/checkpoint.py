"""Checkpoints of a running job: whole or absent, with checksums, and nothing in them is unpickled.

A checkpoint is the folder `checkpoints/step-<optimizer step>` of a run folder, the best weights so far are
`checkpoints/best-<optimizer step>`. Such a folder has three files: tensors in safetensors, all else in JSON, and the
manifest of both, which is written last.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import sync, umask
from lavis_dcd.common.manifest import AbsentError, DamagedError, Identity, Manifest
from lavis_dcd.training.nested_state import flatten, unflatten
from lavis_dcd.training.saved_state import check_best, check_content

log = logging.getLogger(__name__)

FORMAT = 3  # 1 was a file of torch.save, 2 had its checksums in state.json
KIND, BEST_KIND = "checkpoint", "folder of best weights"
FOLDER = "checkpoints"
TENSORS, STATE = "tensors.safetensors", "state.json"
TEMPORARY = ".tmp"  # the end of the name of what is being written or deleted; the name begins with a dot
STEP, BEST = re.compile(r"step-(\d+)", re.ASCII), re.compile(r"best-(\d+)", re.ASCII)
OLD = re.compile(r"step-(\d+)\.pth", re.ASCII)
_HEAD_OF_2 = b'{"sha256": "'  # the first bytes of a state.json of format 2

Check = Callable[[Mapping[str, Any]], None]  # raises `ValueError` with the field


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: whole, with values in their ranges.

    Args:
        path: its folder.
        content: see `saved_state.FIELDS`.
        identity: of the job that wrote it.
    """

    path: Path
    content: dict[str, Any]
    identity: Identity

    @property
    def step(self) -> int:
        """Return the optimizer steps that its weights have taken."""
        return int(self.content["position"]["global_step"])


def anything(_: Mapping[str, Any]) -> None:
    """Take whatever comes, where a job has no check of its own."""


def write(path: Path, content: Mapping[str, Any], kind: str = KIND, identity: Identity | None = None) -> None:
    """Write `content` so that `path` is the whole folder or does not exist.

    The files are on the disk before the folder gets its name. A folder that is there is replaced.

    Args:
        content: dictionaries, lists and tuples of tensors, numbers, strings, booleans and None, nested.
        identity: of the job.

    Raises:
        TypeError: anything else is in it.
        OSError, SafetensorError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY))
    try:
        _write_files(temporary, content, kind, identity or Identity())
        os.chmod(temporary, 0o777 & ~umask())
        sync(temporary)
        remove(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def _write_files(folder: Path, content: Mapping[str, Any], kind: str, identity: Identity) -> None:
    state, tensors = flatten(content)
    save_file(tensors, str(folder / TENSORS))
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    for name in (TENSORS, STATE):
        os.chmod(folder / name, 0o666 & ~umask())
        sync(folder / name)
    Manifest.of(folder, (TENSORS, STATE), kind=kind, format=FORMAT, identity=identity).write(folder)


def read(path: Path, kind: str = KIND) -> tuple[dict[str, Any], Identity]:
    """Return what `write` was given, tensors on the CPU.

    Raises:
        DamagedError: a file is missing, cut short, changed, or cannot be read.
    """
    manifest = _manifest(path, kind)
    manifest.check_files(path)
    try:
        state = json.loads((path / STATE).read_bytes())
        content = unflatten(state, load_file(str(path / TENSORS)))
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{STATE} does not fit {TENSORS} ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{STATE} is no section")
    return content, manifest.identity


def _manifest(path: Path, kind: str) -> Manifest:
    manifest = Manifest.read(path, kind, FORMAT)
    if manifest.files.keys() != {TENSORS, STATE}:
        raise DamagedError("manifest.json is not of a checkpoint's files")
    return manifest


def read_plain(path: Path) -> dict[str, Any]:
    """Return the state without its tensors, whose file is not read: quick for folders of any size.

    Raises:
        DamagedError: as :func:`read`.
    """
    _manifest(path, KIND).files[STATE].check(path / STATE)
    try:
        state = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(str(error)) from error
    if not isinstance(state, dict):
        raise DamagedError(f"{STATE} is no section")
    return state


def remove(path: Path) -> None:
    """Delete a folder (or a file) so that nothing half deleted keeps its name."""
    if not os.path.lexists(path):
        return
    doomed = path.with_name(f".{path.name}.old{TEMPORARY}")
    clear(doomed)
    os.rename(path, doomed)
    clear(doomed)


def clear(path: Path) -> None:
    """Delete what is left of a temporary folder or file; what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save(path: Path, content: Mapping[str, Any], kind: str = KIND, identity: Identity | None = None) -> None:
    """Write `content` so that `path` is the whole checkpoint or does not exist.

    Raises:
        UserError: it cannot be written (no space, no permission, the run folder is gone); what was there before is
            untouched.
    """
    try:
        if not path.parent.parent.is_dir():
            raise FileNotFoundError(None, f"the folder {path.parent.parent} is gone")
        write(path, content, kind, identity)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"run.output_dir: the checkpoint {path} cannot be written ({why}); the ones before it are untouched: "
            "put that right, then run.resume=auto"
        ) from error


def load(path: Path, fits: Check = anything) -> Checkpoint:
    """Read a checkpoint onto the CPU, and check its values.

    Args:
        fits: the job's own check of the content.

    Raises:
        UserError: it is absent, damaged, of another format, has values that no job leaves, or is not a checkpoint of a
            running job.
    """
    if BEST.fullmatch(path.name):
        raise UserError(
            f"run.resume: {path} holds no state of a running job; name a folder <run folder>/{FOLDER}/step-*"
        )
    content, identity = _read(path, KIND)
    _checked(path, lambda: check_content(content, step_of(path, STEP)))
    _checked(path, lambda: fits(content))
    return Checkpoint(path, content, identity)


def load_best(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors in a folder of best weights.

    Raises:
        UserError: it is absent, damaged, or has values that no job leaves.
    """
    content, _ = _read(path, BEST_KIND)
    _checked(path, lambda: check_best(content, step_of(path, BEST)))
    weights: dict[str, torch.Tensor] = content["model"]
    return weights


def _read(path: Path, kind: str) -> tuple[dict[str, Any], Identity]:
    if OLD.fullmatch(path.name):
        raise _of_format(1, path)
    if not os.path.lexists(path):
        raise UserError(f"run.resume: {path} does not exist")
    if path.is_file():
        raise UserError(f"run.resume: {path} is a file, not a checkpoint; name a folder <run folder>/{FOLDER}/step-*")
    try:
        return read(path, kind)
    except AbsentError as error:
        if _is_of_format_2(path):
            raise _of_format(2, path) from error
        raise UserError(f"run.resume: {path} is not whole: {error}") from error
    except DamagedError as error:
        raise UserError(f"run.resume: {path} is not whole: {error}") from error


def _of_format(number: int, path: Path) -> UserError:
    return UserError(f"run.resume: {path} has format {number} (of an earlier version), this version reads {FORMAT}")


def _is_of_format_2(path: Path) -> bool:
    file = path / STATE
    try:
        if not file.is_file():
            return False
        with file.open("rb") as handle:
            return handle.read(len(_HEAD_OF_2)) == _HEAD_OF_2
    except OSError:
        return False


def _checked(path: Path, check: Callable[[], None]) -> None:
    try:
        check()
    except (ValueError, RecursionError) as error:
        raise UserError(f"run.resume: {path}: {error}") from error


def step_of(path: Path, pattern: re.Pattern[str] = STEP) -> int | None:
    """Return the step in a folder's name, None where the name is another."""
    match = pattern.fullmatch(path.name)
    return int(match[1]) if match else None


def has_best(run_folder: Path, step: int, fits: Check = anything) -> bool:
    """Return whether the best weights of `step` are there and whole; a line in the log says why not.

    Args:
        fits: the job's own check of the weights.
    """
    path = best_file(run_folder, step)
    try:
        weights = load_best(path)
        _checked(path, lambda: fits(weights))
    except UserError as error:
        log.warning("%s; the best is chosen anew", "; ".join(error.faults))
        return False
    return True


def step_file(run_folder: Path, step: int) -> Path:
    """Return the path of the checkpoint written after optimizer step `step`."""
    return run_folder / FOLDER / f"step-{step:08d}"


def best_file(run_folder: Path, step: int) -> Path:
    """Return the path of the weights that were best, as of optimizer step `step`."""
    return run_folder / FOLDER / f"best-{step:08d}"


def by_step(run_folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Return the steps and paths of what bears such a name, in the order of the steps."""
    try:
        names = os.listdir(run_folder / FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        log.warning("passed over: run.resume: %s cannot be read (%s)", run_folder / FOLDER, error.strerror)
        return []
    steps = sorted((int(match[1]), match[0]) for match in map(pattern.fullmatch, names) if match)
    return [(step, run_folder / FOLDER / name) for step, name in steps]


def prune(run_folder: Path, keep_last: int, keep_best: int = 1) -> None:
    """Delete all but the newest checkpoints, and the best weights that neither count nor belong to one of them.

    A checkpoint speaks of the best weights as of its step; without them a resumed job would choose another best.

    Args:
        keep_last: how many checkpoints stay.
        keep_best: how many of the newest best weights stay in any case.
    """
    steps = [path for _, path in by_step(run_folder, STEP)]
    needed = {_best_of(path) for path in steps[-keep_last:]}
    bests = by_step(run_folder, BEST)[:-keep_best]
    doomed = steps[:-keep_last] + [path for step, path in bests if step not in needed]
    for path in doomed:
        try:
            remove(path)
        except OSError as error:
            log.warning("%s cannot be deleted (%s)", path, error.strerror)
    # a kill in the middle of a write leaves these
    for path in (run_folder / FOLDER).glob(f".*{TEMPORARY}"):
        clear(path)


def _best_of(path: Path) -> int | None:
    try:
        step = read_plain(path)["best"]["step"]
    except (DamagedError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None


def discard_after(run_folder: Path, step: int) -> None:
    """Delete checkpoints and best weights of later steps: the job goes back to `step` and rewrites them.

    Raises:
        OSError: one cannot be deleted.
    """
    for pattern in (STEP, BEST):
        for later, path in by_step(run_folder, pattern):
            if later > step:
                remove(path)
