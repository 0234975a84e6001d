"""A shortlist: the best items of every query by a cheap joint space, reranked by a matcher's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import ImageRows, TextRows, scoring_mode
from lavis_dcd.banks.row_store import StreamedFeatures
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.evaluation.exhaustive import (
    DEFAULTS,
    UNBOUNDED,
    ScoringSettings,
    finite,
    match_pairs,
    ready,
    rows_that_fit,
    score_exhaustive,
)
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble, members_of
from lavis_dcd.matching.features import Features, gather_rows

F = TypeVar("F", bound=Features)

SCORES_PER_SORT = 2**20  # their order and ranks take about ten times their memory


class ShortlistError(ValueError):
    """No shortlist can be made: too small a ``k_test``, or a matcher without a joint space."""


@dataclass(frozen=True)
class Shortlist:
    """The items that are reranked for every query, and the order in which the others follow them.

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
        """Make the shortlist of the ``k_test`` best of every query.

        Args:
            cheap_i2t: floating point ``[I, T]``.
            cheap_t2i: floating point ``[T, I]``.

        Raises:
            ShortlistError: ``k_test`` is below 1.
            ValueError: a score is not a finite number.
        """
        if k_test < 1:
            raise ShortlistError(f"{k_test} is below 1")
        i2t, t2i = finite(cheap_i2t.float().cpu()), finite(cheap_t2i.float().cpu())
        return cls(i2t, t2i, _top_columns(i2t, k_test), _top_columns(t2i, k_test))

    def rerank(
        self,
        matcher: Matcher,
        images: ImageRows,
        texts: TextRows,
        settings: ScoringSettings = DEFAULTS,
        ranks: ProcessGroup = ALONE,
    ) -> tuple[Tensor, Tensor]:
        """Return ``matcher``'s scores at ``texts_of_image`` and ``images_of_text``, float32 ``[I, k]`` and ``[T, k]``.

        A pair that both directions need is matched once; a dual encoder's are read off the product of all.

        Args:
            ranks: processes of which each brings the pictures of ``ranks.share(I)`` and all texts.

        Raises:
            ValueError: features of other counts than the cheap scores', or a score that is not a finite number.
        """
        share = ranks.share(len(self.cheap_i2t))
        if (len(share), self.cheap_i2t.shape[1]) != (len(images), len(texts)):
            shape = tuple(self.cheap_i2t.shape)
            raise ValueError(f"joint_scores {shape} for {len(images)} images and {len(texts)} texts")
        if matcher.family == "dual":
            scores = score_exhaustive(matcher, images, texts, settings, ranks)
            return scores.gather(1, self.texts_of_image), scores.T.gather(1, self.images_of_text)
        keys_i2t = torch.arange(len(self.cheap_i2t))[:, None] * len(texts) + self.texts_of_image
        keys_t2i = self.images_of_text * len(texts) + torch.arange(len(texts))[:, None]
        keys = torch.unique(torch.cat([keys_i2t.flatten(), keys_t2i.flatten()]))
        # the keys ascend with the pictures, so the processes' scores in their order are those of all keys
        first, end = share.start * len(texts), share.stop * len(texts)
        keys_of_share = keys[(keys >= first) & (keys < end)] - first
        scores = torch.empty(0)
        if len(keys_of_share):
            scores = match_pairs(matcher, images, texts, keys_of_share, settings)
        scores = finite(gather_rows(scores, ranks))
        return scores[torch.searchsorted(keys, keys_i2t)], scores[torch.searchsorted(keys, keys_t2i)]

    def tables(self, reranked_i2t: Tensor, reranked_t2i: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """Return full tables ``[I, T]`` and ``[T, I]``: the reranked items, and below them the rest.

        The rest keeps its cheap order (ties included) strictly below every reranked item, as finite numbers.

        Args:
            reranked_i2t: float32 ``[I, k]``, the scores at ``texts_of_image``.
            reranked_t2i: float32 ``[T, k]``, the scores at ``images_of_text``.
            in_place: the tables take the memory of the cheap scores, which are lost.
        """
        i2t, t2i = self.cheap_i2t, self.cheap_t2i
        views = i2t.untyped_storage().data_ptr() == t2i.untyped_storage().data_ptr()
        # where one is a view of the other, only the one written last can take its place
        full_t2i = _above_rest(t2i, self.images_of_text, reranked_t2i, t2i if in_place and not views else None)
        return _above_rest(i2t, self.texts_of_image, reranked_i2t, i2t if in_place else None), full_t2i


def score_joint(
    matcher: Matcher,
    images: ImageRows,
    texts: TextRows,
    settings: ScoringSettings = UNBOUNDED,
    rows: int = 1024,
) -> Tensor:
    """Return the scores of the matcher's joint space, float32 ``[I, T]`` on the CPU.

    Args:
        settings: the rows embedded at a time take ``memory_mb`` at most; vectors are multiplied in float32.
        rows: items embedded at a time, and picture vectors multiplied at a time, at most.

    Raises:
        ShortlistError: the matcher has no joint space.
        ValueError: a score is not a finite number.
    """
    require_joint_space(matcher)
    of_images = _embedded(matcher, matcher.embed_images, images, rows, settings)
    of_texts = _embedded(matcher, matcher.embed_texts, texts, rows, settings)
    vectors = of_images.shape[1] if of_images.ndim == 3 else 1  # a picture may have several
    scores = torch.empty(len(images), len(texts))
    with scoring_mode(matcher) as device:
        of_texts = of_texts.to(device)
        blocks = of_images.split(max(1, rows // vectors))
        for block, place in zip(blocks, scores.split(len(blocks[0])), strict=True):
            place.copy_(matcher.joint_scores(block.to(device), of_texts))
    return finite(scores)


def _embedded(
    matcher: Matcher,
    embed: Callable[[F], Tensor],
    features: F | StreamedFeatures[F],
    rows: int,
    settings: ScoringSettings,
) -> Tensor:
    """Return ``embed(features)``, float32 ``[B, E]`` or ``[B, N, E]`` on the CPU, up to ``rows`` items at a time."""
    at_once = min(rows, rows_that_fit(features, settings.memory_mb))
    embeds = torch.empty(0)
    with scoring_mode(matcher, settings.amp) as device:
        for start in range(0, len(features), at_once):
            block = embed(ready(features[start : start + at_once], device))
            embeds = torch.empty(len(features), *block.shape[1:]) if start == 0 else embeds
            embeds[start : start + at_once] = block
            del block  # it may be a view of its features
    return embeds


def require_joint_space(matcher: Matcher | Ensemble) -> None:
    """Check that ``matcher``, or every member of the ensemble, can make a shortlist.

    Raises:
        ShortlistError: one has no joint space.
    """
    lacking = next((member for member in members_of(matcher) if not member.has_joint_space), None)
    if lacking is not None:
        raise ShortlistError(f"{type(lacking).__name__} has no joint space to make a shortlist from")


def _rows_per_sort(scores: Tensor) -> int:
    return max(1, SCORES_PER_SORT // max(1, scores.shape[1]))


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """Return the ``k`` best columns of every row, int64 ``[R, min(k, C)]``; among ties the lower column first."""
    columns = torch.empty(len(scores), min(k, scores.shape[1]), dtype=torch.long)
    at_once = _rows_per_sort(scores)
    # into their place: slices would keep the order of all columns in memory, two tables' worth
    for block, place in zip(scores.split(at_once), columns.split(at_once), strict=True):
        place.copy_(block.sort(dim=1, descending=True, stable=True).indices[:, :k])
    return columns


def _above_rest(cheap: Tensor, columns: Tensor, reranked: Tensor, out: Tensor | None = None) -> Tensor:
    """Return float32 ``[R, C]``: ``reranked [R, k]`` at ``columns [R, k]``, below them the rest of ``cheap [R, C]``.

    Args:
        out: where the table is written, by default into new memory; it may be ``cheap``.
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
