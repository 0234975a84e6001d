"""Read a `torch.save` file while every class but tensors and plain containers becomes an inert stand-in."""

from __future__ import annotations

import io
import pickle
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
        UserError: the file is no PyTorch checkpoint, or is cut short.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is not a readable PyTorch file: {reason}") from error
    return _prune(content)
