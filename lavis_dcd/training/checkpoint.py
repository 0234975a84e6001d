"""Checkpoints of a running job: whole or absent, with checksums, and nothing in them is unpickled.

A checkpoint is the folder `checkpoints/step-<optimizer step>` of a run folder, the best weights so far are
`checkpoints/best-<optimizer step>`. Such a folder has two files, tensors in safetensors and all else in JSON, which
holds the checksums of both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import sha256_of, sync, umask

log = logging.getLogger(__name__)

FORMAT = 2  # 1 was a file of torch.save
FOLDER = "checkpoints"
TENSORS, STATE = "tensors.safetensors", "state.json"
TEMPORARY = ".tmp"  # the end of the name of what is being written or deleted; the name begins with a dot
_STEP, _BEST = re.compile(r"step-(\d+)"), re.compile(r"best-(\d+)")
_OLD = re.compile(r"step-(\d+)\.pth")
_FIELDS = {
    *("format", "model", "optimizer", "scheduler", "scaler", "health", "rng", "position", "best", "window"),
    *("config", "teacher_fingerprint", "data"),
}
_HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})",')
# Values that JSON lacks are written as a dictionary with one of these as its only key.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


class DamagedError(Exception):
    """A folder differs from what was written; the message says how."""


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that `path` is the whole folder or does not exist.

    The files are on the disk before the folder gets its name. A folder that is there is replaced.

    Args:
        content: dictionaries, lists and tuples of tensors, numbers, strings, booleans and None, nested.

    Raises:
        TypeError: anything else is in it.
        OSError, SafetensorError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY))
    try:
        _write_files(temporary, content)
        os.chmod(temporary, 0o777 & ~umask())
        sync(temporary)
        remove(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def _write_files(folder: Path, content: Mapping[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = _plain(content, "", tensors, {})
    save_file(tensors, str(folder / TENSORS))
    sync(folder / TENSORS)
    written = {"bytes": (folder / TENSORS).stat().st_size, "sha256": sha256_of(folder / TENSORS)}
    body = json.dumps({"tensors": written, "state": state})[1:].encode() + b"\n"
    # The first line is the checksum of the bytes after it; together they are one JSON object.
    head = f'{{"sha256": "{hashlib.sha256(body).hexdigest()}",\n'.encode()
    (folder / STATE).write_bytes(head + body)
    for name in (TENSORS, STATE):
        os.chmod(folder / name, 0o666 & ~umask())
    sync(folder / STATE)


def read(path: Path) -> dict[str, Any]:
    """Return what `write` was given, tensors on the CPU.

    Raises:
        DamagedError: a file is missing, cut short, changed, or cannot be read.
    """
    try:
        state = _checked_state(path)
        return _nested(state["state"], load_file(str(path / TENSORS)))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) and error.filename
        raise DamagedError(
            f"{Path(error.filename).name} is missing" if missing else error.strerror or str(error)
        ) from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{STATE} does not fit {TENSORS} ({type(error).__name__}: {error})") from error


def read_plain(path: Path) -> dict[str, Any]:
    """Return the state without its tensors, whose file is not read: quick for folders of any size.

    Raises:
        DamagedError: as :func:`read`.
    """
    try:
        state: dict[str, Any] = json.loads(_checked_json(path))["state"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(str(error)) from error
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


def _checked_json(path: Path) -> bytes:
    raw = (path / STATE).read_bytes()
    if not raw:
        raise DamagedError(f"{STATE} is empty")
    head, _, body = raw.partition(b"\n")
    if not raw.endswith(b"}\n"):
        raise DamagedError(f"{STATE} is cut short")
    match = _HEAD.fullmatch(head)
    if match is None or match[1].decode() != hashlib.sha256(body).hexdigest():
        raise DamagedError(f"the checksum of {STATE} does not fit it")
    return raw


def _checked_state(path: Path) -> dict[str, Any]:
    state = json.loads(_checked_json(path))
    file, written = path / TENSORS, state["tensors"]
    size = file.stat().st_size
    if size < written["bytes"]:
        raise DamagedError(f"{TENSORS} is cut short ({size:,} of {written['bytes']:,} bytes)")
    if sha256_of(file) != written["sha256"]:
        raise DamagedError(f"the checksum of {TENSORS} does not fit it")
    return state


def _plain(value: Any, name: str, tensors: dict[str, torch.Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    """Return `value` as JSON has it; its tensors go to `tensors`, one that stands in two places only once."""
    if isinstance(value, torch.Tensor):
        return {_TENSOR: _put(value, name, tensors, seen)}
    if isinstance(value, Mapping):
        items = [(key, _plain(item, f"{name}/{key}", tensors, seen)) for key, item in value.items()]
        ambiguous = len(value) == 1 and next(iter(value)) in (_TENSOR, _TUPLE, _ITEMS)
        if all(isinstance(key, str) for key in value) and not ambiguous:
            return dict(items)
        return {_ITEMS: [[_plain(key, name, tensors, seen), item] for key, item in items]}
    if isinstance(value, (list, tuple)):
        row = [_plain(item, f"{name}/{number}", tensors, seen) for number, item in enumerate(value)]
        return row if isinstance(value, list) else {_TUPLE: row}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint: {name or 'the content'} is a {type(value).__name__}; only tensors and plain values")


def _put(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor], seen: dict[tuple[Any, ...], str]) -> str:
    tensor = value.detach()
    key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if tensor.numel() and key in seen:
        return seen[key]
    name = name.lstrip("/") or "tensor"
    while name in tensors:
        name += "'"
    # A copy where the tensor is a part of a storage: safetensors refuses two that overlap.
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    tensor = tensor.cpu().contiguous()
    tensors[name] = tensor if whole else tensor.clone()
    seen[key] = name
    return name


def _nested(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_nested(item, tensors) for item in value[_TUPLE])
        if _ITEMS in value:
            return {_nested(key, tensors): _nested(item, tensors) for key, item in value[_ITEMS]}
    return {key: _nested(item, tensors) for key, item in value.items()}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` is the whole checkpoint or does not exist.

    Raises:
        UserError: it cannot be written (no space, no permission); what was there before is untouched.
    """
    try:
        write(path, content)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"run.output_dir: the checkpoint {path} cannot be written ({why}); the ones before it are untouched: "
            "put that right, then run.resume=auto"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: it is absent, damaged, of another format, or not a checkpoint of a running job.
    """
    content = _read(path)
    if "format" not in content:
        raise UserError(
            f"run.resume: {path} holds no state of a running job; name a folder <run folder>/{FOLDER}/step-*"
        )
    if content["format"] != FORMAT:
        raise UserError(f"run.resume: {path} has format {content['format']}, this version reads {FORMAT}")
    if lacking := sorted(_FIELDS - set(content)):
        raise UserError(f"run.resume: {path} lacks {', '.join(lacking)}")
    return content


def _read(path: Path) -> dict[str, Any]:
    if _OLD.fullmatch(path.name):
        raise UserError(f"run.resume: {path} has format 1 (of an earlier version), this version reads {FORMAT}")
    if not os.path.lexists(path):
        raise UserError(f"run.resume: {path} does not exist")
    if path.is_file():
        raise UserError(f"run.resume: {path} is a file, not a checkpoint; name a folder <run folder>/{FOLDER}/step-*")
    try:
        return read(path)
    except DamagedError as error:
        raise UserError(f"run.resume: {path} is not whole: {error}") from error


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors in a checkpoint, or in a folder of best weights.

    Raises:
        UserError: it is absent, damaged, or holds no "model".
    """
    content = _read(path)
    if "model" not in content:
        raise UserError(f'run.resume: {path} holds no weights of a run (no entry "model")')
    weights: dict[str, torch.Tensor] = content["model"]
    return weights


def best_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the best model's tensors in the job whose checkpoint is `path`; those of `path` if there is none."""
    content = load(path)
    best = content["best"] and best_file(path.absolute().parent.parent, content["best"]["step"])
    weights: dict[str, torch.Tensor] = load_weights(best) if best and best.exists() else content["model"]
    return weights


def has_best(run_folder: Path, step: int) -> bool:
    """Return whether the best weights of `step` are there and whole; a line in the log says why not."""
    try:
        load_weights(best_file(run_folder, step))
    except UserError as error:
        log.warning("%s; the best is chosen anew", error)
        return False
    return True


def step_file(run_folder: Path, step: int) -> Path:
    """Return the path of the checkpoint written after optimizer step `step`."""
    return run_folder / FOLDER / f"step-{step:08d}"


def best_file(run_folder: Path, step: int) -> Path:
    """Return the path of the weights that were best, as of optimizer step `step`."""
    return run_folder / FOLDER / f"best-{step:08d}"


def _by_step(run_folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
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


def newest_valid(folders: list[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint in any of the run folders, and its content; None where there is none.

    The folder with the newest checkpoint comes first, and in each folder the latest step. Each one passed over
    gets a line in the log, with the reason.

    Raises:
        UserError: there are checkpoints of this format, and none is whole: starting anew would hide the loss.
    """
    by_folder = [[path for _, path in _by_step(folder, _STEP)] for folder in folders]
    for old in [path for folder in folders for _, path in _by_step(folder, _OLD)]:
        log.warning("passed over: run.resume: %s has format 1, this version reads %d", old, FORMAT)
    passed: list[str] = []
    for paths in sorted(filter(None, by_folder), key=lambda paths: max(map(_time, paths)), reverse=True):
        for path in reversed(paths):
            try:
                return path, load(path)
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


def find(resume: str, project_folder: Path, job_id: str | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that `run.resume` names.

    Args:
        resume: "auto" (the newest whole checkpoint of the project), a checkpoint, or a run folder.
        project_folder: holds the run folders.
        job_id: with "auto", look in this run folder only.

    Returns:
        The checkpoint and its content; None when "auto" finds nothing.

    Raises:
        UserError: there are checkpoints, and none is whole; a named folder has none.
    """
    if resume == "auto":
        return newest_valid([project_folder / job_id] if job_id else sorted(project_folder.glob("*")))
    path = Path(resume)
    if not path.is_dir() or _STEP.fullmatch(path.name) or (path / STATE).exists():
        return path, load(path)
    newest = newest_valid([path])
    if newest is None:
        raise UserError(f"run.resume: {path} has no readable checkpoint in its folder {FOLDER}/")
    return newest


def prune(run_folder: Path, keep_last: int, keep_best: int = 1) -> None:
    """Delete all but the newest checkpoints, and the best weights that neither count nor belong to one of them.

    A checkpoint speaks of the best weights as of its step; without them a resumed job would choose another best.

    Args:
        keep_last: how many checkpoints stay.
        keep_best: how many of the newest best weights stay in any case.
    """
    steps = [path for _, path in _by_step(run_folder, _STEP)]
    needed = {_best_of(path) for path in steps[-keep_last:]}
    bests = _by_step(run_folder, _BEST)[:-keep_best]
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
        best = read_plain(path)["best"]
        return best["step"] if best else None
    except (DamagedError, LookupError, TypeError):
        return None


def discard_after(run_folder: Path, step: int) -> None:
    """Delete checkpoints and best weights of later steps: the job goes back to `step` and rewrites them.

    Raises:
        OSError: one cannot be deleted.
    """
    for pattern in (_STEP, _BEST):
        for later, path in _by_step(run_folder, pattern):
            if later > step:
                remove(path)
