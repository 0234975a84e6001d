"""Cutting a set of features into blocks that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lavis_dcd.matching.features import Features, TextFeatures

MAX_BLOCK_SIDE = 256  # captions of like lengths stay together, and progress shows
MAX_DUAL_SIDE = 8192  # an item's embedding is made anew in every block it stands in


def pairs_that_fit(images: Features, texts: Features, memory_mb: float) -> int:
    """How many pairs' gathered rows, in float32, stay below ``memory_mb``."""
    per_pair = 4 * sum(f.tokens.shape[1] * f.tokens.shape[2] for f in (images, texts))
    return max(1, int(memory_mb * 2**20 // per_pair))


def block_sides(images: Features, texts: Features, memory_mb: float) -> tuple[int, int]:
    """Pictures and texts of one block of pairs that stays below ``memory_mb``."""
    fit = pairs_that_fit(images, texts, memory_mb)
    side_i = max(1, min(len(images), MAX_BLOCK_SIDE, int(fit**0.5)))
    return side_i, max(1, min(len(texts), MAX_BLOCK_SIDE, fit // side_i))


def dual_sides(images: Features, texts: Features, memory_mb: float) -> tuple[int, int]:
    """Half of the memory for the rows of both sides, in float32, half for the block's scores."""
    half = memory_mb * 2**20 / 8
    widest = max(f.tokens.shape[1] * f.tokens.shape[2] for f in (images, texts))
    side = max(1, min(MAX_DUAL_SIDE, int(half / (2 * widest)), int(half**0.5)))
    return min(len(images), side), min(len(texts), side)


def order_by_length(texts: TextFeatures) -> Tensor:
    """Text rows from short to long: blocks of like lengths waste no work on padding."""
    if texts.mask is None:
        return torch.arange(len(texts))
    return texts.mask.sum(dim=1).sort(stable=True).indices.cpu()


def slices(features: Features, rows: int) -> Iterator[Features]:
    """``features`` in parts of ``rows`` rows."""
    return (features[start : start + rows] for start in range(0, len(features), rows))


def ready(features: Features, device: torch.device) -> Features:
    """On the matcher's device; rows stored in half precision come back as float32."""
    return features.to(device, torch.float32)


def finite(scores: Tensor) -> Tensor:
    """``scores``; raises a ``ValueError`` unless every one is a finite number."""
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ValueError(f"{bad} of {scores.numel()} scores are not finite numbers")
    return scores
