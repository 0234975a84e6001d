"""Read a `torch.save` file while every class but tensors and plain containers becomes an inert stand-in.

Nothing of the file runs. A file that calls functions when it is unpickled is refused all the same: no trainer writes
one, and whoever made it wants something to run.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

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


# What trainers leave in their files: of the standard library these names, of other packages classes (which a capital
# letter begins) and the functions that put tensors and arrays together.
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
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype):
                return found
            if name.endswith("Storage"):
                # torch's own reader recognises the storage classes of old files by identity.
                return getattr(torch, name)
        _refuse_code(module, name)
        return _StandIn


def _load(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


def _loads(data: bytes, **options: Any) -> Any:
    return _load(io.BytesIO(data), **options)


_PICKLE = SimpleNamespace(
    Unpickler=_InertUnpickler,
    load=_load,
    loads=_loads,
    __name__="lavis_dcd.common.inert",
    UnpicklingError=pickle.UnpicklingError,
    PickleError=pickle.PickleError,
)


def _prune(value: Any) -> Any:
    """The same value without stand-ins."""
    if isinstance(value, dict):
        return {k: _prune(v) for k, v in value.items() if not (_is_stand_in(k) or _is_stand_in(v))}
    if isinstance(value, (list, tuple)):
        kept = [_prune(v) for v in value if not _is_stand_in(v)]
        return kept if isinstance(value, list) else tuple(kept)
    return value


def _is_stand_in(value: Any) -> bool:
    return isinstance(value, _StandIn) or value is _StandIn


def load_inert(path: Path) -> Any:
    """What the file holds, on the CPU, without the objects that are neither tensors nor plain containers.

    Raises:
        UserError: the file is no PyTorch checkpoint, is cut short, or holds code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except _CodeError as error:
        raise UserError(
            f"checkpoint {path} holds code: it would call {error} when it is unpickled; nothing of it was run. Name a "
            "file from another place, or one of tensors only"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is not a readable PyTorch file: {reason}") from error
    return _prune(content)
