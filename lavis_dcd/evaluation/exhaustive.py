"""Scores of pairs by blocks of rows: of every pair of two sets, or of a list of pairs.

Features may lie on another device, in half precision, or on disk (``banks.encoding.Storage``); blocks of rows move to
the matcher as they are needed, so that a big gallery never stands on the accelerator as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import ImageRows, TextRows, reported, scoring_mode
from lavis_dcd.banks.row_store import StreamedFeatures
from lavis_dcd.common.errors import NotFiniteError
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures, gather_rows

F = TypeVar("F", bound=Features)

MAX_BLOCK_SIDE = 256  # captions of like lengths stay together, and progress shows
MAX_DUAL_SIDE = 8192  # an item's embedding is made anew in every block it stands in
SCORES_PER_CHECK = 2**20


@dataclass(frozen=True)
class ScoringSettings:
    """The settings of scoring pairs.

    Args:
        memory_mb: the feature rows gathered for one call of ``match`` take this many MiB at most (a dual encoder's
            ``match_all``: the rows of a block and its scores).
        amp: off, bf16 or fp16.
    """

    memory_mb: float = 512
    amp: str = "off"

    def amp_of(self, matcher: Matcher) -> str:
        """Return the autocast type of ``matcher``: a dual encoder scores in float32 whatever ``amp``.

        In half precision its close candidates would tie.
        """
        return "off" if matcher.family == "dual" else self.amp


DEFAULTS = ScoringSettings()
UNBOUNDED = ScoringSettings(memory_mb=math.inf)  # of what makes no blocks of pairs

# -- how many rows and pairs make a block


def pairs_that_fit(images: ImageRows, texts: TextRows, memory_mb: float) -> int:
    """Return how many pairs' gathered rows, in float32, stay below ``memory_mb`` MiB."""
    per_pair = 4 * sum(rows.row_shape[0] * rows.row_shape[1] for rows in (images, texts))
    return max(1, int(memory_mb * 2**20 // per_pair))


def rows_that_fit(rows: Features | StreamedFeatures[Any], memory_mb: float) -> int:
    """Return how many rows, in float32, stay below ``memory_mb`` MiB."""
    fit = memory_mb * 2**20 / (4 * rows.row_shape[0] * rows.row_shape[1])
    return max(1, int(min(fit, 2**31)))


def block_sides(matcher: Matcher, images: ImageRows, texts: TextRows, memory_mb: float) -> tuple[int, int]:
    """Return how many pictures and texts make a block of pairs that stays below ``memory_mb`` MiB.

    A fusion model's memory goes to the gathered rows of its pairs; a dual encoder's half to the rows of both sides,
    in float32, and half to the block's scores.
    """
    if matcher.family == "dual":
        half = memory_mb * 2**20 / 8
        widest = max(rows.row_shape[0] * rows.row_shape[1] for rows in (images, texts))
        side = max(1, min(MAX_DUAL_SIDE, int(half / (2 * widest)), int(half**0.5)))
        return min(len(images), side), min(len(texts), side)
    fit = pairs_that_fit(images, texts, memory_mb)
    image_side = max(1, min(len(images), MAX_BLOCK_SIDE, int(fit**0.5)))
    return image_side, max(1, min(len(texts), MAX_BLOCK_SIDE, fit // image_side))


def held_rows(images: ImageRows, side: int) -> int:
    """Return how many pictures stand in memory at a time, in whole blocks of ``side``: all that are there already."""
    if isinstance(images, Features):
        return len(images)
    return max(1, images.block_bytes // (images.row_bytes * side)) * side


def order_by_length(texts: TextRows) -> Tensor:
    """Return the text rows from short to long, int64 ``[T]``: blocks of like lengths waste no work on padding."""
    if texts.mask is None:
        return torch.arange(len(texts))
    return texts.mask.sum(dim=1).sort(stable=True).indices.cpu()


# -- blocks on the matcher's device


def ready(features: F, device: torch.device) -> F:
    """Return ``features`` on the matcher's device; rows stored in half precision come back as float32."""
    return features.to(device, torch.float32)


def image_block(images: ImageRows, rows: Tensor, device: torch.device) -> ImageFeatures:
    """Return the pictures ``rows``, int64 ``[B]``, ready for the matcher."""
    return ready(images[rows.to(images.device)], device)


def text_block(texts: TextRows, rows: Tensor, device: torch.device) -> TextFeatures:
    """Return the texts ``rows``, int64 ``[B]``, without the padding of longer ones, ready for the matcher."""
    return ready(texts[rows.to(texts.device)].trimmed(), device)


def finite(scores: Tensor) -> Tensor:
    """Return ``scores``, of any shape.

    Raises:
        NotFiniteError: a score is not a finite number.
    """
    blocks = scores.split(max(1, SCORES_PER_CHECK // max(1, scores[:1].numel())))
    bad = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
    if bad:
        raise NotFiniteError(
            f"{bad} of {scores.numel()} scores are not finite numbers; the weights hold NaN or infinite values, or "
            "their training has diverged: try run.amp=off, a lower run.init_lr, run.grad_clip=1, or other weights"
        )
    return scores


# -- every pair


def score_exhaustive(
    matcher: Matcher,
    images: ImageRows,
    texts: TextRows,
    settings: ScoringSettings = DEFAULTS,
    ranks: ProcessGroup = ALONE,
) -> Tensor:
    """Return the score of every pair, float32 ``[I, T]`` on the CPU; a dual encoder's by products of whole blocks.

    Streamed pictures are read once; streamed texts once for every ``block_bytes`` of streamed pictures.

    Args:
        ranks: processes of which each brings its own ``images``, in the order of the processes, and all ``texts``;
            each gets the scores of all.

    Raises:
        ValueError: a score is not a finite number.
    """
    scores = torch.empty(len(images), len(texts))
    if len(images):
        _fill_by_blocks(scores, matcher, images, texts, settings)
    return finite(gather_rows(scores, ranks))


def _fill_by_blocks(
    scores: Tensor, matcher: Matcher, images: ImageRows, texts: TextRows, settings: ScoringSettings
) -> None:
    """Write every pair's score into ``scores [I, T]``."""
    image_side, text_side = block_sides(matcher, images, texts, settings.memory_mb)
    held, by_length = held_rows(images, image_side), order_by_length(texts).split(text_side)
    total = -(-len(images) // image_side) * len(by_length)
    steps = reported(range(total), total, "blocks of pairs scored")
    with scoring_mode(matcher, settings.amp_of(matcher)) as device:
        for first in range(0, len(images), held):
            pictures = images[first : first + held]
            for columns in by_length:
                captions = text_block(texts, columns, device)
                for start in range(0, len(pictures), image_side):
                    next(steps)
                    block = ready(pictures[start : start + image_side], device)
                    rows = slice(first + start, first + start + len(block))
                    scores[rows, columns] = matcher.match_all(block, captions).float().cpu()
            del pictures  # or they would stand beside the next ones


# -- a list of pairs


def match_pairs(
    matcher: Matcher,
    images: ImageRows,
    texts: TextRows,
    keys: Tensor,
    settings: ScoringSettings = DEFAULTS,
) -> Tensor:
    """Return the scores of pairs, float32 ``[P]`` on the CPU.

    A picture's pairs stand together, so that its costs once per call of ``match`` are paid seldom.

    Args:
        keys: int64 ``[P]``, ``image row * T + text row`` of every pair, sorted.
    """
    blocks = keys.split(pairs_that_fit(images, texts, settings.memory_mb))
    scores = []
    with scoring_mode(matcher, settings.amp_of(matcher)) as device:
        for block in reported(blocks, len(blocks), "blocks of pairs scored"):
            rows, image_of_pair = torch.unique(block // len(texts), return_inverse=True)
            columns, text_of_pair = torch.unique(block % len(texts), return_inverse=True)
            pictures, captions = image_block(images, rows, device), text_block(texts, columns, device)
            pairs = torch.stack([image_of_pair, text_of_pair], dim=1).to(device)
            scores.append(matcher.match(pictures, captions, pairs).float().cpu())
            del pictures, captions
    return torch.cat(scores)
