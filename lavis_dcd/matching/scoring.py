"""Scores of a whole evaluation set: every pair, or only what a cheap joint space puts on the shortlist.

Features may lie on another device or in half precision (``encoding.Storage``); blocks of rows move
to the matcher as they are needed, so a big gallery never stands on the accelerator as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.encoding import encode_dataset, reported, scoring_mode
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures

ROWS_PER_SORT = 256
MAX_BLOCK_SIDE = 256  # captions of like lengths stay together, and progress shows


def score_exhaustive(
    matcher: Matcher,
    images: ImageFeatures,
    texts: TextFeatures,
    memory_mb: float = 512,
    *,
    amp: str = "off",
    progress: bool = False,
) -> Tensor:
    """The score of every pair, float32 ``[I, T]`` on the CPU.

    Args:
        memory_mb: the feature rows gathered for one call of ``match`` take this many MiB at most.

    Raises:
        ValueError: a score is not a finite number.
    """
    side_i, side_t = _block_sides(images, texts, memory_mb)
    by_length = _order_by_length(texts)
    scores = torch.empty(len(images), len(texts))
    blocks = [
        (range(i, min(i + side_i, len(images))), by_length[t : t + side_t])
        for t in range(0, len(texts), side_t)
        for i in range(0, len(images), side_i)
    ]
    with scoring_mode(matcher, amp) as device:
        for rows, columns in reported(blocks, len(blocks), "blocks of pairs scored", progress):
            here = _ready(images[rows.start : rows.stop], device)
            there = _ready(texts[columns.to(texts.device)].trimmed(), device)
            pairs = torch.cartesian_prod(torch.arange(len(here)), torch.arange(len(there))).to(device)
            block = matcher.match(here, there, pairs).float().cpu().view(len(here), len(there))
            scores[rows.start : rows.stop, columns] = block
    return _finite(scores)


def score_shortlist(
    matcher: Matcher,
    images: ImageFeatures,
    texts: TextFeatures,
    joint_scores: Tensor,
    k_test: int,
    memory_mb: float = 512,
    *,
    amp: str = "off",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Reranks every picture's ``k_test`` best captions by the cheap scores, and every caption's pictures.

    The rest keeps its cheap order (ties included) strictly below every reranked item, as finite numbers. A
    pair that both directions need is matched once.

    Args:
        joint_scores: ``[I, T]``, the cheap scores.
        k_test: items reranked per query, 1 or more.

    Returns:
        ``scores_i2t [I, T]`` and ``scores_t2i [T, I]``, float32 on the CPU.

    Raises:
        UserError: ``k_test`` is below 1.
        ValueError: ``joint_scores`` has another shape, or a score is not a finite number.
    """
    if k_test < 1:
        raise UserError(f"run.k_test: {k_test} is below 1; leave it empty to score every pair")
    if joint_scores.shape != (len(images), len(texts)):
        shape = tuple(joint_scores.shape)
        raise ValueError(f"joint_scores {shape} for {len(images)} images and {len(texts)} texts")
    joint = _finite(joint_scores.float().cpu())
    texts_of_image = _top_columns(joint, k_test)
    images_of_text = _top_columns(joint.T, k_test)
    keys_i2t = torch.arange(len(images))[:, None] * len(texts) + texts_of_image
    keys_t2i = images_of_text * len(texts) + torch.arange(len(texts))[:, None]
    keys = torch.unique(torch.cat([keys_i2t.flatten(), keys_t2i.flatten()]))
    matched = _match_pairs(matcher, images, texts, keys, memory_mb, amp, progress)
    reranked_i2t = matched[torch.searchsorted(keys, keys_i2t)]
    reranked_t2i = matched[torch.searchsorted(keys, keys_t2i)]
    scores_i2t = _above_rest(joint, texts_of_image, reranked_i2t)
    return scores_i2t, _above_rest(joint.T, images_of_text, reranked_t2i)


def score_joint(
    matcher: Matcher, images: ImageFeatures, texts: TextFeatures, rows: int = 1024, amp: str = "off"
) -> Tensor:
    """Cosines of the matcher's joint space, float32 ``[I, T]`` on the CPU.

    Raises:
        UserError: the matcher has no joint space.
    """
    require_joint_space(matcher)
    with scoring_mode(matcher, amp) as device:
        embeds = [
            torch.cat([embed(_ready(part, device)).float().cpu() for part in _slices(features, rows)])
            for embed, features in ((matcher.embed_images, images), (matcher.embed_texts, texts))
        ]
    return embeds[0] @ embeds[1].T


def require_joint_space(matcher: Matcher) -> None:
    """Raises a ``UserError`` unless ``matcher`` can make a shortlist."""
    if not matcher.has_joint_space:
        raise UserError(
            f"run.shortlist: {type(matcher).__name__} has no joint space to make a shortlist from; name "
            "a matcher that has one (for METER: joint_head), or leave run.k_test empty to score every pair"
        )


def score_dataset(
    matcher: Matcher,
    dataset: Any,
    k_test: int | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Encodes an evaluation set and scores every pair, or the ``k_test`` best of the joint space.

    Args:
        dataset: as for :func:`encode_dataset`.
        device: where the features are kept; the matcher's by default.

    Returns:
        ``scores_i2t [I, T]`` and ``scores_t2i [T, I]``, float32 on the CPU.

    Raises:
        UserError: ``k_test`` for a matcher without a joint space, or an empty set.
    """
    images, texts = encode_dataset(matcher, dataset, batch_size, device)
    if k_test is None:
        scores = score_exhaustive(matcher, images, texts)
        return scores, scores.T
    return score_shortlist(matcher, images, texts, score_joint(matcher, images, texts), k_test)


def _match_pairs(
    matcher: Matcher,
    images: ImageFeatures,
    texts: TextFeatures,
    keys: Tensor,
    memory_mb: float,
    amp: str,
    progress: bool,
) -> Tensor:
    """Scores ``[P]`` of the pairs ``keys = image row * T + text row``, sorted."""
    chunks = torch.split(keys, max(1, _pairs_that_fit(images, texts, memory_mb)))
    scores = []
    with scoring_mode(matcher, amp) as device:
        for chunk in reported(chunks, len(chunks), "blocks of shortlisted pairs scored", progress):
            rows, image_of_pair = torch.unique(chunk // len(texts), return_inverse=True)
            columns, text_of_pair = torch.unique(chunk % len(texts), return_inverse=True)
            here = _ready(images[rows.to(images.device)], device)
            there = _ready(texts[columns.to(texts.device)].trimmed(), device)
            pairs = torch.stack([image_of_pair, text_of_pair], dim=1).to(device)
            scores.append(matcher.match(here, there, pairs).float().cpu())
    return _finite(torch.cat(scores))


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best columns of every row, int64 ``[R, min(k, C)]``; among ties the lower column first."""
    parts = scores.split(ROWS_PER_SORT)
    return torch.cat([part.sort(dim=1, descending=True, stable=True).indices[:, :k] for part in parts])


def _above_rest(cheap: Tensor, columns: Tensor, reranked: Tensor) -> Tensor:
    """``reranked [R, k]`` at ``columns [R, k]``; below, the rest of ``cheap [R, C]`` in its own order."""
    out = torch.empty(cheap.shape)
    for start in range(0, len(cheap), ROWS_PER_SORT):
        rows = slice(start, start + ROWS_PER_SORT)
        values, order = cheap[rows].sort(dim=1, descending=True, stable=True)
        steps = torch.zeros_like(values)
        steps[:, 1:] = (values[:, 1:] != values[:, :-1]).float()
        ranks = torch.empty_like(values).scatter_(1, order, steps.cumsum(dim=1))
        lowest = reranked[rows].min(dim=1, keepdim=True).values
        # A step of at least 2^-20 of the score survives float32's rounding, whatever the scores' scale.
        step = (lowest.abs() * 2.0**-20).clamp_min(1.0)
        out[rows] = (lowest - step * (1 + ranks)).scatter(1, columns[rows], reranked[rows])
    return out


def _pairs_that_fit(images: Features, texts: Features, memory_mb: float) -> int:
    """How many pairs' gathered rows, in float32, stay below ``memory_mb``."""
    per_pair = 4 * sum(f.tokens.shape[1] * f.tokens.shape[2] for f in (images, texts))
    return max(1, int(memory_mb * 2**20 // per_pair))


def _block_sides(images: Features, texts: Features, memory_mb: float) -> tuple[int, int]:
    fit = _pairs_that_fit(images, texts, memory_mb)
    side_i = max(1, min(len(images), MAX_BLOCK_SIDE, int(fit**0.5)))
    return side_i, max(1, min(len(texts), MAX_BLOCK_SIDE, fit // side_i))


def _order_by_length(texts: TextFeatures) -> Tensor:
    """Text rows from short to long: blocks of like lengths waste no work on padding."""
    if texts.mask is None:
        return torch.arange(len(texts))
    return texts.mask.sum(dim=1).sort(stable=True).indices.cpu()


def _slices(features: Features, rows: int) -> Iterator[Features]:
    return (features[start : start + rows] for start in range(0, len(features), rows))


def _ready(features: Features, device: torch.device) -> Features:
    """On the matcher's device; rows stored in half precision come back as float32."""
    return features.to(device, torch.float32)


def _finite(scores: Tensor) -> Tensor:
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ValueError(f"{bad} of {scores.numel()} scores are not finite numbers")
    return scores
