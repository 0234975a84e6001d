"""Scores of many pairs by blocks of rows: all of two sets' pairs, or a list of them.

Features may lie on another device, in half precision, or on disk (``encoding.Storage``); blocks of rows move to the
matcher as they are needed, so that a big gallery never stands on the accelerator as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import reported, scoring_mode
from lavis_dcd.banks.row_store import StreamedFeatures
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, gather_rows

# ----------------------------------------------------------------------------------------------------
# Cutting a set of features into blocks that fit into memory.

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


def score_exhaustive(
    matcher: Matcher,
    images: Rows,
    texts: Rows,
    memory_mb: float = 512,
    *,
    amp: str = "off",
    progress: bool = False,
    ranks: ProcessGroup = ALONE,
) -> Tensor:
    """The score of every pair, float32 ``[I, T]`` on the CPU; a dual encoder's by products of whole blocks.

    A dual encoder's products are made in float32 whatever ``amp``: in half precision close candidates would tie.
    Streamed pictures are read once; streamed texts once for every ``block_bytes`` of streamed pictures.

    Args:
        memory_mb: the feature rows gathered for one call of ``match`` take this many MiB at most (a dual encoder's
            ``match_all``: the rows of a block and its scores).
        ranks: processes of which each brings its own ``images``, in the order of the processes, and all ``texts``;
            each gets the scores of all.

    Raises:
        ValueError: a score is not a finite number.
    """
    own = torch.empty(len(images), len(texts))
    if len(images):
        _score_blocks(matcher, images, texts, memory_mb, amp, progress, own)
    return finite(gather_rows(own, ranks))


def _score_blocks(
    matcher: Matcher, images: Rows, texts: Rows, memory_mb: float, amp: str, progress: bool, scores: Tensor
) -> None:
    """Fills ``scores [I, T]``."""
    dual = matcher.family == "dual"
    side_i, side_t = (dual_sides if dual else block_sides)(images, texts, memory_mb)
    held, by_length = held_rows(images, side_i), order_by_length(texts).split(side_t)
    total = -(-len(images) // side_i) * len(by_length)
    steps = reported(range(total), total, "blocks of pairs scored", progress)
    with scoring_mode(matcher, "off" if dual else amp) as device:
        for first in range(0, len(images), held):
            pictures = images[first : first + held]
            for columns in by_length:
                there = ready(texts[columns.to(texts.device)].trimmed(), device)
                for start in range(0, len(pictures), side_i):
                    next(steps)
                    part = slice(start, start + side_i)
                    found = matcher.match_all(ready(pictures[part], device), there).float().cpu()
                    scores[first + start : first + start + len(found), columns] = found
            del pictures  # or they would stand beside the next ones


def match_pairs(
    matcher: Matcher,
    images: Rows,
    texts: Rows,
    keys: Tensor,
    memory_mb: float,
    amp: str = "off",
    progress: bool = False,
) -> Tensor:
    """Scores ``[P]``, float32 on the CPU, of the pairs ``keys = image row * T + text row``, sorted.

    A picture's pairs stand together, so that what it costs once per call of ``match`` is paid seldom.
    """
    chunks = torch.split(keys, max(1, pairs_that_fit(images, texts, memory_mb)))
    scores = []
    with scoring_mode(matcher, amp) as device:
        for chunk in reported(chunks, len(chunks), "blocks of shortlisted pairs scored", progress):
            rows, image_of_pair = torch.unique(chunk // len(texts), return_inverse=True)
            columns, text_of_pair = torch.unique(chunk % len(texts), return_inverse=True)
            here = ready(images[rows.to(images.device)], device)
            there = ready(texts[columns.to(texts.device)].trimmed(), device)
            pairs = torch.stack([image_of_pair, text_of_pair], dim=1).to(device)
            scores.append(matcher.match(here, there, pairs).float().cpu())
            del here, there
    return torch.cat(scores)
