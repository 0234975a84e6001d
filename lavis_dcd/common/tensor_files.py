"""Files of weights: the one reader of them, which runs nothing, and the checks of tensors against a model's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor

from lavis_dcd.common.archives import Archive, opened_file
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line
from lavis_dcd.common.unpickling import CodeError, unpickled

_LARGEST_HEADER = 32 << 20  # bytes of a safetensors file's names and shapes
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# buffers whose numbers are rows of something, by the ends of their names
INDEXES = ("position_ids", "token_type_ids", "relative_position_index")


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds: tensors and plain containers.

    Args:
        content: as stored (a Lightning file keeps its tensors under "state_dict").
        metadata: of a safetensors file, texts by name.
    """

    content: dict[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code that it may contain.

    Args:
        path: a `.safetensors` file, or one written by `torch.save`.

    Returns:
        The dictionary in the file, as stored (a Lightning file keeps its tensors under "state_dict").

    Raises:
        UserError: the file is absent, is no checkpoint, or holds no dictionary.
    """
    return read_tensor_file(path).content


def read_tensor_file(path: str | os.PathLike[str]) -> TensorFile:
    """Read a checkpoint as :func:`load_tensors`, with the metadata that it has."""
    source = Path(path)
    with opened_file(source) as file:
        if source.suffix == ".safetensors":
            return _safetensors(file, source)
        content = _unpickled(file, source)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"checkpoint {source} holds a {kind}, expected a dictionary of tensors")
    return TensorFile(content)


def _safetensors(file: IO[bytes], path: Path) -> TensorFile:
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    fault = None
    if length > size - 8:
        fault = "it is cut short, or no such file"
    elif length > _LARGEST_HEADER:
        fault = f"its header says {length >> 20} MB of names and shapes"
    if fault:
        raise UserError(f"checkpoint {path} is not a readable safetensors file: {fault}; name a whole file")
    try:
        with safe_open(str(path), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
            return TensorFile(tensors, opened.metadata() or {})
    except Exception as error:  # safetensors and torch name types that they lack in errors of several classes
        raise UserError(
            f"checkpoint {path} is not a readable safetensors file: {_reason(error)}; name a whole file"
        ) from error


def _unpickled(file: IO[bytes], path: Path) -> Any:
    archive = Archive(file, path)
    try:
        return unpickled(archive.pickle(), archive)
    except CodeError as error:
        raise UserError(
            f"checkpoint {path} holds code: it would call {one_line(str(error), 100)} when it is unpickled; nothing of "
            "it was run. Name a file from another place, or one of tensors only"
        ) from error
    except Exception as error:  # a damaged pickle may make pickletools stumble over anything
        raise UserError(
            f"checkpoint {path} is not a readable PyTorch file: {_reason(error)}; name a whole file"
        ) from error


def _reason(error: Exception) -> str:
    return one_line(str(error).splitlines()[0], 200) if str(error) else type(error).__name__


def tensors_of(content: Any) -> dict[str, Tensor]:
    """Return the tensors among the entries of a dictionary, by name; of anything else none."""
    if not isinstance(content, Mapping):
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def tensor_faults(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str], shapes: bool = True
) -> list[str]:
    """Return what is wrong with a file's tensors, one line each with the tensor's name; those of other names pass.

    Args:
        tensors: of the file, by the names of the model.
        expected: the model's own, as its ``state_dict`` gives them.
        path: of the file, for messages.
        shapes: whether they must be the model's; else the model's loading fits or refuses them.
    """
    faults = []
    for name, tensor in tensors.items():
        fault = _fault(tensor, expected[name], name, shapes) if name in expected else None
        if fault:
            faults.append(f"{path}: {one_line(name, 200)} {fault}")
    return faults


def _fault(tensor: Tensor, own: Tensor, name: str, shapes: bool) -> str | None:
    if not _of_one_kind(tensor.dtype, own.dtype):
        wanted = "float32, float16, bfloat16 or float64" if own.is_floating_point() else _word(own.dtype)
        return f"holds numbers of type {_word(tensor.dtype)}, the model takes {wanted}; name a file with such"
    if shapes and tensor.shape != own.shape:
        return f"is {tuple(tensor.shape)} there, {tuple(own.shape)} in the model; make the model's sizes fit"
    if tensor.is_meta:
        return None  # a shape without numbers
    if own.is_floating_point() and not _finite(tensor.to(own.dtype)) and (own.is_meta or _finite(own)):
        return "holds NaN or infinite values; name another file, a training that diverged writes such"
    if name.endswith(INDEXES) and own.numel() and not own.is_meta and not _within(tensor, own):
        return "counts beyond the model's own; leave it out of the file, it is the same in every model"
    return None


def _of_one_kind(stored: torch.dtype, own: torch.dtype) -> bool:
    """Return whether stored numbers may become the model's: both floating-point, both whole, or both the same."""
    return stored == own or any(stored in kind and own in kind for kind in (_FLOATING, _WHOLE))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _within(tensor: Tensor, own: Tensor) -> bool:
    return tensor.numel() == 0 or bool(tensor.min() >= own.min() and tensor.max() <= own.max())


def no_check(content: Any, path: Path) -> Any:
    """Return what a file holds as it is."""
    return content


def no_scripts(path: Path) -> Any:
    """Refuse TorchScript.

    Raises:
        UserError: always.
    """
    raise UserError(f"{path} is read as TorchScript, which runs when it is read; name a file of tensors only")


@contextmanager
def tensors_only(
    checked: Callable[[Any, Path], Any] = no_check, scripts: Callable[[Path], Any] = no_scripts
) -> Iterator[None]:
    """Let the loading of others (LAVIS, ``transformers``, timm) within the ``with`` block read by this reader alone.

    They call ``torch.load``, whose dispatcher also takes tar files, and ``torch.jit.load``, which runs what it reads.

    Args:
        checked: (content of a file, its path) -> what the caller of ``torch.load`` gets.
        scripts: (path of a file) -> what the caller of ``torch.jit.load`` gets.
    """

    def load(f: Any, *_: Any, **__: Any) -> Any:
        path = _path_of(f)
        return checked(load_tensors(path), path)

    def load_script(f: Any, *_: Any, **__: Any) -> Any:
        return scripts(_path_of(f))

    # the only way in: each of them calls torch by these names. It lasts as long as one model's building or loading.
    with mock.patch.object(torch, "load", load), mock.patch.object(torch.jit, "load", load_script):
        yield


def _path_of(source: Any) -> Path:
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise UserError("a model reads weights from memory, which is not supported; name a file of weights")
    return Path(os.fsdecode(source))
