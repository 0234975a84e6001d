"""Safetensors files of banks: where each tensor lies, and faults of any kind as one ``DamagedError``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_path
from lavis_dcd.common.manifest import DamagedError

_FAULTS = (SafetensorError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_HEADER = 8  # bytes of the number that a file begins with: its header's length


@contextmanager
def faults_as_damage(name: str) -> Iterator[None]:
    """Raise a ``DamagedError`` that names the file where reading it, or what it holds, meets an error."""
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror or error})") from error
    except _FAULTS as error:
        raise DamagedError(f"{name} is not of the form that this version writes ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, memory-mapped: their pages come into memory when they are read.

    Raises:
        DamagedError: it is no whole safetensors file.
    """
    with faults_as_damage(path.name):
        if not path.is_file():
            raise DamagedError(f"{path.name} is no file")
        with safe_open(str(path), "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  no mapping


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: its first byte, and the one behind its last."""

    begin: int
    end: int


def places(path: Path) -> dict[str, Place]:
    """Return where the tensors of a file lie; their sizes are not looked at, see :func:`mapped`.

    Raises:
        DamagedError: it has no header of safetensors.
    """
    with faults_as_damage(path.name), path.open("rb") as handle:
        length = int.from_bytes(handle.read(_HEADER), "little")
        if length > path.stat().st_size:
            raise DamagedError(f"{path.name} has no header")
        header = json.loads(handle.read(length))
        first = _HEADER + length
        named = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: Place(first + int(begin), first + int(end)) for name, (begin, end) in named.items()}


def blocks(path: Path, place: Place, like: Tensor, rows: int) -> Iterator[Tensor]:
    """Read a tensor plainly, ``rows`` rows of ``like``'s at a time: mapped pages would count as this process's memory.

    Raises:
        DamagedError: the file is shorter than that.
    """
    width = like[0].numel() if len(like) else 0
    dtype = np.dtype(f"i{like.element_size()}")
    with faults_as_damage(path.name), path.open("rb") as handle:
        handle.seek(place.begin)
        for start in range(0, len(like), rows):
            count = min(rows, len(like) - start) * width
            words = np.fromfile(handle, dtype, count)
            if len(words) < count:
                raise DamagedError(f"{path.name} is cut short")
            yield torch.from_numpy(words).view(like.dtype).view(-1, *like.shape[1:])


@contextmanager
def written(path: Path, fault: Callable[[str], UserError]) -> Iterator[Path]:
    """Do the same as ``atomic_path``; what the writers of files wrap a full disk in comes out as one line.

    Args:
        fault: makes the error, of the reason in words.

    Raises:
        UserError: it cannot be written; the former file is whole.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise fault(why) from error
