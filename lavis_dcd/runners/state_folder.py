"""A nested state as a folder of two files: tensors in safetensors, all else in JSON, both with a checksum."""

from __future__ import annotations

import hashlib
import json
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

from lavis_dcd.common.files import sha256_of, sync, umask

TENSORS = "tensors.safetensors"
STATE = "state.json"
TEMPORARY = ".tmp"  # the end of the name of what is being written or deleted; the name begins with a dot
_HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})",')
# What JSON does not know is written as a dictionary with one of these as its only key.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


class DamagedError(Exception):
    """A folder that is not what was written; the message says in what."""


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
    there = {"bytes": (folder / TENSORS).stat().st_size, "sha256": sha256_of(folder / TENSORS)}
    body = json.dumps({"tensors": there, "state": state})[1:].encode() + b"\n"
    # The first line is the checksum of the bytes after it; together they are one JSON object.
    head = f'{{"sha256": "{hashlib.sha256(body).hexdigest()}",\n'.encode()
    (folder / STATE).write_bytes(head + body)
    for name in (TENSORS, STATE):
        os.chmod(folder / name, 0o666 & ~umask())
    sync(folder / STATE)


def read(path: Path) -> dict[str, Any]:
    """What `write` was given, tensors on the CPU. Nothing is unpickled.

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
    """The state without its tensors, whose file is not looked at: quick for folders of any size.

    Raises:
        DamagedError: as :func:`read`.
    """
    try:
        return json.loads(_checked_json(path))["state"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(str(error)) from error


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


def _plain(value: Any, name: str, tensors: dict[str, torch.Tensor], seen: dict[tuple, str]) -> Any:
    """`value` as JSON has it; its tensors go to `tensors`, one that stands in two places only once."""
    if isinstance(value, torch.Tensor):
        return {_TENSOR: _put(value, name, tensors, seen)}
    if isinstance(value, Mapping):
        items = [(key, _plain(item, f"{name}/{key}", tensors, seen)) for key, item in value.items()]
        ambiguous = len(value) == 1 and next(iter(value)) in (_TENSOR, _TUPLE, _ITEMS)
        if all(isinstance(key, str) for key in value) and not ambiguous:
            return dict(items)
        return {_ITEMS: [[_plain(key, name, tensors, seen), item] for key, item in items]}
    if isinstance(value, (list, tuple)):
        found = [_plain(item, f"{name}/{number}", tensors, seen) for number, item in enumerate(value)]
        return found if isinstance(value, list) else {_TUPLE: found}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint: {name or 'the content'} is a {type(value).__name__}; only tensors and plain values")


def _put(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor], seen: dict[tuple, str]) -> str:
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
