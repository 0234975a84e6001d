"""Scores of a whole evaluation set: every pair, or only what a cheap joint space puts on the shortlist."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import encode_dataset, scoring_mode
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.evaluation.exhaustive import Rows, finite, match_pairs, ready, rows_that_fit, score_exhaustive
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble, members_of
from lavis_dcd.matching.features import gather_rows

SCORES_PER_SORT = 2**20  # their order and ranks take about ten times their memory


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
        images: Rows,
        texts: Rows,
        memory_mb: float = 512,
        *,
        amp: str = "off",
        progress: bool = False,
        ranks: ProcessGroup = ALONE,
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

    def tables(self, reranked_i2t: Tensor, reranked_t2i: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """Full tables ``[I, T]`` and ``[T, I]``: the reranked, and below them the rest in its cheap order.

        Args:
            in_place: the tables take the memory of the cheap scores, which are lost.
        """
        i2t, t2i = self.cheap_i2t, self.cheap_t2i
        one = i2t.untyped_storage().data_ptr() == t2i.untyped_storage().data_ptr()
        # where one is a view of the other, only the one written last can take its place
        below_t2i = _above_rest(t2i, self.images_of_text, reranked_t2i, t2i if in_place and not one else None)
        return _above_rest(i2t, self.texts_of_image, reranked_i2t, i2t if in_place else None), below_t2i


def score_shortlist(
    matcher: Matcher,
    images: Rows,
    texts: Rows,
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
    matcher: Matcher,
    images: Rows,
    texts: Rows,
    rows: int = 1024,
    amp: str = "off",
    memory_mb: float = math.inf,
) -> Tensor:
    """Scores of the matcher's joint space, float32 ``[I, T]`` on the CPU.

    Args:
        rows: items embedded at a time, and picture vectors multiplied at a time, at most.
        memory_mb: the rows embedded at a time take this many MiB at most.

    Raises:
        UserError: the matcher has no joint space.
    """
    require_joint_space(matcher)
    of_images, of_texts = (
        _embedded(matcher, embed, features, min(rows, rows_that_fit(features, memory_mb)), amp)
        for embed, features in ((matcher.embed_images, images), (matcher.embed_texts, texts))
    )
    vectors = of_images.shape[1] if of_images.ndim == 3 else 1  # a picture may have several
    scores = torch.empty(len(images), len(texts))
    with scoring_mode(matcher) as device:
        of_texts = of_texts.to(device)
        parts = of_images.split(max(1, rows // vectors))
        for part, place in zip(parts, scores.split(len(parts[0])), strict=True):
            place.copy_(matcher.joint_scores(part.to(device), of_texts))
    return finite(scores)


def _embedded(matcher: Matcher, embed: Callable[[Any], Tensor], features: Rows, rows: int, amp: str) -> Tensor:
    """``embed(features)``, float32 on the CPU, ``rows`` items at a time."""
    found = torch.empty(0)
    with scoring_mode(matcher, amp) as device:
        for start in range(0, len(features), rows):
            part = embed(ready(features[start : start + rows], device))
            found = torch.empty(len(features), *part.shape[1:]) if start == 0 else found
            found[start : start + rows] = part
            del part  # it may be a view of its features
    return found


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


def _rows_per_sort(scores: Tensor) -> int:
    return max(1, SCORES_PER_SORT // max(1, scores.shape[1]))


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best columns of every row, int64 ``[R, min(k, C)]``; among ties the lower column first."""
    found = torch.empty(len(scores), min(k, scores.shape[1]), dtype=torch.long)
    at_once = _rows_per_sort(scores)
    # into their place: slices would keep the order of all columns in memory, two tables' worth
    for part, place in zip(scores.split(at_once), found.split(at_once), strict=True):
        place.copy_(part.sort(dim=1, descending=True, stable=True).indices[:, :k])
    return found


def _above_rest(cheap: Tensor, columns: Tensor, reranked: Tensor, out: Tensor | None = None) -> Tensor:
    """``reranked [R, k]`` at ``columns [R, k]``; below, the rest of ``cheap [R, C]`` in its own order.

    Args:
        out: where they are written, by default into new memory; it may be ``cheap``.
    """
    out = torch.empty(cheap.shape) if out is None else out
    at_once = _rows_per_sort(cheap)
    for start in range(0, len(cheap), at_once):
        rows = slice(start, start + at_once)
        values, order = cheap[rows].sort(dim=1, descending=True, stable=True)
        steps = torch.zeros_like(values)
        steps[:, 1:] = (values[:, 1:] != values[:, :-1]).float()
        ranks = torch.empty_like(values).scatter_(1, order, steps.cumsum(dim=1))
        lowest = reranked[rows].min(dim=1, keepdim=True).values
        # A step of at least 2^-20 of the score survives float32's rounding, whatever the scores' scale.
        step = (lowest.abs() * 2.0**-20).clamp_min(1.0)
        out[rows] = (lowest - step * (1 + ranks)).scatter(1, columns[rows], reranked[rows])
    return out
