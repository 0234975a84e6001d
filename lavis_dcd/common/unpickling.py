"""Read a `torch.save` file without running anything in it.

torch's `weights_only` reader goes first. Trainers also leave objects of their own in their files (Lightning's
hyper-parameters, callbacks), which it refuses; then the file is read again by an unpickler for which every class but
tensors and plain containers is an inert stand-in. torch's own dispatcher, which would run a TorchScript archive, never
sees the file. A file that calls functions when it is unpickled is refused all the same: no trainer writes one, and
whoever made it wants something to run.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch.storage import TypedStorage

from lavis_dcd.common.errors import UserError


class _StandIn:
    """In the place of an unknown class: accepts any construction and state, keeps nothing, runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}
# the types of stored numbers, by the names of torch's former storage classes, under which files name them
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}

# Harmless things that trainers leave in files: of the standard library these names, of other packages classes (which a
# capital letter begins) and the functions that put tensors and arrays together.
_HARMLESS = {
    "argparse": {"Namespace"},
    "builtins": {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "slice", "str", "tuple",
    },
    "_codecs": {"encode"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "enum": {"Enum"},
    "functools": {"partial"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "types": {"SimpleNamespace"},
    "typing": {"Any"},
    "uuid": {"UUID"},
}  # fmt: skip
_ASSEMBLING = {"_reconstruct", "scalar", "dtype", "ndarray", "_get_layout"}


class _CodeError(Exception):
    """The file would call a function; the message is its name."""


def _refuse_code(module: str, name: str) -> None:
    known = "builtins" if module == "__builtin__" else module  # Python 2's name
    if known.partition(".")[0] in sys.stdlib_module_names:
        harmless = name in _HARMLESS.get(known, ())
    else:
        last = name.rpartition(".")[2]
        harmless = last.lstrip("_")[:1].isupper() or last.startswith("_rebuild_") or last in _ASSEMBLING
    if not harmless:
        raise _CodeError(f"{known}.{name}")


class _InertUnpickler(pickle.Unpickler):
    """Unpickles `data.pkl` of an archive; numbers of tensors come from its records `data/<key>`."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root
        self._storages: dict[str, TypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        _refuse_code(module, name)
        return _StandIn

    def persistent_load(self, pid: Any) -> TypedStorage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind!r} is no storage of numbers")
        if key not in self._storages:
            record = self._archive.getinfo(f"{self._root}data/{key}")
            # torch.save never compresses; a compressed record may be any number of times larger than the file
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"the record data/{key} is not {count} numbers of {dtype}")
            data = bytearray(self._archive.read(record))
            raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            raw_bytes = raw.untyped_storage()
            storage = TypedStorage(wrap_storage=raw_bytes, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
            self._storages[key] = storage
        return self._storages[key]


def _prune(value: Any) -> Any:
    """Return the same value without stand-ins."""
    if isinstance(value, dict):
        return {k: _prune(v) for k, v in value.items() if not (_is_stand_in(k) or _is_stand_in(v))}
    if isinstance(value, (list, tuple)):
        kept = [_prune(v) for v in value if not _is_stand_in(v)]
        return kept if isinstance(value, list) else tuple(kept)
    return value


def _is_stand_in(value: Any) -> bool:
    return isinstance(value, _StandIn) or value is _StandIn


def check_archive(path: Path) -> None:
    """Refuse what is no plain archive of `torch.save` before any reader of torch sees it.

    TorchScript archives (`code/`, `constants.pkl`) run when they are read. Names are compared without regard to case,
    as torch's own reader finds them.

    Raises:
        UserError: no zip archive with `data.pkl`, or a TorchScript archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"checkpoint {path} is not a readable PyTorch file: it is no whole zip archive, as torch.save has written "
            "since torch 1.6; load an older file with a current torch and save it again, or name a .safetensors file"
        ) from error
    parts = [name.lower().replace("\\", "/").split("/") for name in names]
    if any("code" in part[:-1] or part[-1] == "constants.pkl" for part in parts):
        raise UserError(
            f"checkpoint {path} holds code: it is a TorchScript archive, which runs when it is read; nothing of it was "
            "run. Name a file from another place, or one of tensors only"
        )
    if not any(part[-1] == "data.pkl" for part in parts):
        raise UserError(f"checkpoint {path} is not a readable PyTorch file: it is a zip archive without data.pkl")


def load_inert(path: Path) -> Any:
    """Return what the file holds, on the CPU, without the objects that are neither tensors nor plain containers.

    Raises:
        UserError: the file is no PyTorch checkpoint, is cut short, or holds code.
    """
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch has no class of its own for a file that it refuses
        return _load_with_stand_ins(path)


def _load_with_stand_ins(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            root = name.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != sys.byteorder.encode():
                raise pickle.UnpicklingError("its numbers are in the byte order of another kind of machine")
            with archive.open(name) as file:
                content = _InertUnpickler(file, archive, root).load()
    except _CodeError as error:
        raise UserError(
            f"checkpoint {path} holds code: it would call {error} when it is unpickled; nothing of it was run. Name a "
            "file from another place, or one of tensors only"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is not a readable PyTorch file: {reason}") from error
    return _prune(content)
