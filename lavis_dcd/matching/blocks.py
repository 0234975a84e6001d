"""Cutting a set of features into blocks that fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.matching.features import Features
from lavis_dcd.matching.streamed import StreamedFeatures

Rows = Features | StreamedFeatures

MAX_BLOCK_SIDE = 256  # captions of like lengths stay together, and progress shows
MAX_DUAL_SIDE = 8192  # an item's embedding is made anew in every block it stands in
SCORES_PER_CHECK = 2**20


def pairs_that_fit(images: Rows, texts: Rows, memory_mb: float) -> int:
    """How many pairs' gathered rows, in float32, stay below ``memory_mb``."""
    per_pair = 4 * sum(f.row_shape[0] * f.row_shape[1] for f in (images, texts))
    return max(1, int(memory_mb * 2**20 // per_pair))


def block_sides(images: Rows, texts: Rows, memory_mb: float) -> tuple[int, int]:
    """Pictures and texts of one block of pairs that stays below ``memory_mb``."""
    fit = pairs_that_fit(images, texts, memory_mb)
    side_i = max(1, min(len(images), MAX_BLOCK_SIDE, int(fit**0.5)))
    return side_i, max(1, min(len(texts), MAX_BLOCK_SIDE, fit // side_i))


def dual_sides(images: Rows, texts: Rows, memory_mb: float) -> tuple[int, int]:
    """Half of the memory for the rows of both sides, in float32, half for the block's scores."""
    half = memory_mb * 2**20 / 8
    widest = max(f.row_shape[0] * f.row_shape[1] for f in (images, texts))
    side = max(1, min(MAX_DUAL_SIDE, int(half / (2 * widest)), int(half**0.5)))
    return min(len(images), side), min(len(texts), side)


def held_rows(images: Rows, side: int) -> int:
    """How many pictures stand in memory at a time, in whole blocks of ``side``; all of those that are there already."""
    if isinstance(images, Features):
        return len(images)
    return max(1, images.block_bytes // (images.row_bytes * side)) * side


def rows_that_fit(features: Rows, memory_mb: float) -> int:
    """How many rows, in float32, stay below ``memory_mb``."""
    fit = memory_mb * 2**20 / (4 * features.row_shape[0] * features.row_shape[1])
    return max(1, int(min(fit, 2**31)))


def order_by_length(texts: Rows) -> Tensor:
    """Text rows from short to long: blocks of like lengths waste no work on padding."""
    if texts.mask is None:
        return torch.arange(len(texts))
    return texts.mask.sum(dim=1).sort(stable=True).indices.cpu()


def ready(features: Features, device: torch.device) -> Features:
    """On the matcher's device; rows stored in half precision come back as float32."""
    return features.to(device, torch.float32)


def finite(scores: Tensor) -> Tensor:
    """``scores``; raises a ``ValueError`` unless every one is a finite number."""
    parts = scores.split(max(1, SCORES_PER_CHECK // max(1, scores[:1].numel())))
    bad = sum(int((~torch.isfinite(part)).sum()) for part in parts)
    if bad:
        raise ValueError(f"{bad} of {scores.numel()} scores are not finite numbers")
    return scores
