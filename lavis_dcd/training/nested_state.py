"""The codec of a checkpoint's state: nested containers as JSON has them, and their tensors apart, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Values that JSON lacks are written as a dictionary with one of these as its only key.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def flatten(content: Mapping[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return `content` as plain JSON values, and its tensors on the CPU; one that stands in two places only once.

    Args:
        content: dictionaries, lists and tuples of tensors, numbers, strings, booleans and None, nested.

    Raises:
        TypeError: anything else is in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _flat(content, "", tensors, {}), tensors


def unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `flatten` was given.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, RecursionError: `value` is not of that form.
    """
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(unflatten(item, tensors) for item in value[_TUPLE])
        if _ITEMS in value:
            return {unflatten(key, tensors): unflatten(item, tensors) for key, item in value[_ITEMS]}
    return {key: unflatten(item, tensors) for key, item in value.items()}


def _flat(value: Any, name: str, tensors: dict[str, torch.Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(value, torch.Tensor):
        return {_TENSOR: _put(value, name, tensors, seen)}
    if isinstance(value, Mapping):
        items = [(key, _flat(item, f"{name}/{key}", tensors, seen)) for key, item in value.items()]
        ambiguous = len(value) == 1 and next(iter(value)) in (_TENSOR, _TUPLE, _ITEMS)
        if all(isinstance(key, str) for key in value) and not ambiguous:
            return dict(items)
        return {_ITEMS: [[_flat(key, name, tensors, seen), item] for key, item in items]}
    if isinstance(value, (list, tuple)):
        row = [_flat(item, f"{name}/{number}", tensors, seen) for number, item in enumerate(value)]
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
