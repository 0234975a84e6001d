"""Hashes of weights, the same wherever the tensors lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def update_with_tensors(digest: hashlib._Hash, named: Iterable[tuple[str, Tensor]]) -> None:
    """Feed names, shapes, types and contents to ``digest``, in the order given."""
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
