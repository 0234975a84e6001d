"""Scores of a whole evaluation set: every pair, or only what a cheap joint space puts on the shortlist.

Features may lie on another device or in half precision (``encoding.Storage``); blocks of rows move
to the matcher as they are needed, so a big gallery never stands on the accelerator as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.blocks import block_sides, dual_sides, finite, order_by_length, pairs_that_fit, ready, slices
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.encoding import encode_dataset, reported, scoring_mode
from lavis_dcd.matching.ensemble import Ensemble, members_of
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.gather import ALONE, Ranks, gather_rows

ROWS_PER_SORT = 256


def score_exhaustive(
    matcher: Matcher,
    images: ImageFeatures,
    texts: TextFeatures,
    memory_mb: float = 512,
    *,
    amp: str = "off",
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The score of every pair, float32 ``[I, T]`` on the CPU; a dual encoder's by products of whole blocks.

    A dual encoder's products are made in float32 whatever ``amp``: in half precision close candidates would tie.

    Args:
        memory_mb: the feature rows gathered for one call of ``match`` take this many MiB at most (a dual encoder's
            ``match_all``: the rows of a block and its scores).
        ranks: processes of which each brings its own ``images``, in the order of the processes, and all ``texts``;
            each gets the scores of all.

    Raises:
        ValueError: a score is not a finite number.
    """
    own = _score_blocks(matcher, images, texts, memory_mb, amp, progress) if len(images) else torch.empty(0, len(texts))
    return finite(gather_rows(own, ranks))


def _score_blocks(
    matcher: Matcher, images: ImageFeatures, texts: TextFeatures, memory_mb: float, amp: str, progress: bool
) -> Tensor:
    dual = matcher.family == "dual"
    side_i, side_t = (dual_sides if dual else block_sides)(images, texts, memory_mb)
    by_length = order_by_length(texts)
    scores = torch.empty(len(images), len(texts))
    blocks = [
        (range(i, min(i + side_i, len(images))), by_length[t : t + side_t])
        for t in range(0, len(texts), side_t)
        for i in range(0, len(images), side_i)
    ]
    with scoring_mode(matcher, "off" if dual else amp) as device:
        for rows, columns in reported(blocks, len(blocks), "blocks of pairs scored", progress):
            here = ready(images[rows.start : rows.stop], device)
            there = ready(texts[columns.to(texts.device)].trimmed(), device)
            scores[rows.start : rows.stop, columns] = matcher.match_all(here, there).float().cpu()
    return scores


@dataclass(frozen=True)
class Shortlist:
    """Which items are reranked for every query, and in what order the others follow them.

    Args:
        cheap_i2t: float32 ``[I, T]``, the cheap scores of texts for a picture.
        cheap_t2i: float32 ``[T, I]``, of pictures for a text (not always the transpose).
        texts_of_image: int64 ``[I, k]``, the reranked texts.
        images_of_text: int64 ``[T, k]``, the reranked pictures.
    """

    cheap_i2t: Tensor
    cheap_t2i: Tensor
    texts_of_image: Tensor
    images_of_text: Tensor

    @classmethod
    def of(cls, cheap_i2t: Tensor, cheap_t2i: Tensor, k_test: int) -> Shortlist:
        """The ``k_test`` best of every query.

        Raises:
            UserError: ``k_test`` is below 1.
            ValueError: a score is not a finite number.
        """
        if k_test < 1:
            raise UserError(f"run.k_test: {k_test} is below 1; leave it empty to score every pair")
        i2t, t2i = finite(cheap_i2t.float().cpu()), finite(cheap_t2i.float().cpu())
        return cls(i2t, t2i, _top_columns(i2t, k_test), _top_columns(t2i, k_test))

    def rerank(
        self,
        matcher: Matcher,
        images: ImageFeatures,
        texts: TextFeatures,
        memory_mb: float = 512,
        *,
        amp: str = "off",
        progress: bool = False,
        ranks: Ranks = ALONE,
    ) -> tuple[Tensor, Tensor]:
        """``matcher``'s scores at ``texts_of_image`` and ``images_of_text``, float32 ``[I, k]`` and ``[T, k]``.

        A pair that both directions need is matched once; a dual encoder's are read off the product of all.

        Args:
            ranks: processes of which each brings the pictures of ``ranks.share(I)`` and all texts.

        Raises:
            ValueError: features of other counts than the cheap scores', or a score that is not a finite number.
        """
        own = ranks.share(len(self.cheap_i2t))
        if (len(own), self.cheap_i2t.shape[1]) != (len(images), len(texts)):
            shape = tuple(self.cheap_i2t.shape)
            raise ValueError(f"joint_scores {shape} for {len(images)} images and {len(texts)} texts")
        if matcher.family == "dual":
            scores = score_exhaustive(matcher, images, texts, memory_mb, amp=amp, progress=progress, ranks=ranks)
            return scores.gather(1, self.texts_of_image), scores.T.gather(1, self.images_of_text)
        keys_i2t = torch.arange(len(self.cheap_i2t))[:, None] * len(texts) + self.texts_of_image
        keys_t2i = self.images_of_text * len(texts) + torch.arange(len(texts))[:, None]
        keys = torch.unique(torch.cat([keys_i2t.flatten(), keys_t2i.flatten()]))
        # the keys ascend with the pictures, so the processes' scores in their order are those of all keys
        mine = keys[(keys >= own.start * len(texts)) & (keys < own.stop * len(texts))] - own.start * len(texts)
        matched = torch.empty(0)
        if len(mine):
            matched = match_pairs(matcher, images, texts, mine, memory_mb, amp, progress)
        matched = finite(gather_rows(matched, ranks))
        return matched[torch.searchsorted(keys, keys_i2t)], matched[torch.searchsorted(keys, keys_t2i)]

    def tables(self, reranked_i2t: Tensor, reranked_t2i: Tensor) -> tuple[Tensor, Tensor]:
        """Full tables ``[I, T]`` and ``[T, I]``: the reranked, and below them the rest in its cheap order."""
        return (
            _above_rest(self.cheap_i2t, self.texts_of_image, reranked_i2t),
            _above_rest(self.cheap_t2i, self.images_of_text, reranked_t2i),
        )


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
    shortlist = Shortlist.of(joint_scores, joint_scores.T, k_test)
    reranked = shortlist.rerank(matcher, images, texts, memory_mb, amp=amp, progress=progress)
    return shortlist.tables(*reranked)


def score_joint(
    matcher: Matcher, images: ImageFeatures, texts: TextFeatures, rows: int = 1024, amp: str = "off"
) -> Tensor:
    """Scores of the matcher's joint space, float32 ``[I, T]`` on the CPU.

    Args:
        rows: items embedded at a time, and picture vectors multiplied at a time.

    Raises:
        UserError: the matcher has no joint space.
    """
    require_joint_space(matcher)
    with scoring_mode(matcher, amp) as device:
        of_images, of_texts = (
            torch.cat([embed(ready(part, device)).float().cpu() for part in slices(features, rows)])
            for embed, features in ((matcher.embed_images, images), (matcher.embed_texts, texts))
        )
    vectors = of_images.shape[1] if of_images.ndim == 3 else 1  # a picture may have several
    with scoring_mode(matcher) as device:
        of_texts = of_texts.to(device)
        parts = [
            matcher.joint_scores(part.to(device), of_texts).float().cpu()
            for part in of_images.split(max(1, rows // vectors))
        ]
    return finite(torch.cat(parts))


def require_joint_space(matcher: Matcher | Ensemble) -> None:
    """Raises a ``UserError`` unless ``matcher``, or every member of the ensemble, can make a shortlist."""
    lacking = next((member for member in members_of(matcher) if not member.has_joint_space), None)
    if lacking is not None:
        raise UserError(
            f"run.shortlist: {type(lacking).__name__} has no joint space to make a shortlist from; name "
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

    A dual encoder scores every pair anyway: that costs it no more than its joint space does.

    Args:
        dataset: as for :func:`encode_dataset`.
        device: where the features are kept; the matcher's by default.

    Returns:
        ``scores_i2t [I, T]`` and ``scores_t2i [T, I]``, float32 on the CPU.

    Raises:
        UserError: ``k_test`` for a matcher without a joint space, or an empty set.
    """
    images, texts = encode_dataset(matcher, dataset, batch_size, device)
    if k_test is None or matcher.family == "dual":
        scores = score_exhaustive(matcher, images, texts)
        return scores, scores.T
    return score_shortlist(matcher, images, texts, score_joint(matcher, images, texts), k_test)


def match_pairs(
    matcher: Matcher,
    images: ImageFeatures,
    texts: TextFeatures,
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
    return torch.cat(scores)


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
