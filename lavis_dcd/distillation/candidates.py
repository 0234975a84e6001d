"""Candidate pools: which captions (or images) each query of a batch is compared with.

A pool names pairs by row only; nothing is scored here. Column 0 of every row is the match, columns 1..C are
candidates, and ``valid`` is False where an entry must not be used: it shares the query's ``image_id`` (so it is
no negative), or repeats another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

IMAGE_TO_TEXT = "image_to_text"
TEXT_TO_IMAGE = "text_to_image"
DIRECTIONS = (IMAGE_TO_TEXT, TEXT_TO_IMAGE)


@dataclass
class BatchContext:
    """All of a batch that a pool reads: identities and matches, no features and no scores.

    Args:
        image_ids: int64 ``[I]``, the image id of each distinct image row.
        text_image_ids: int64 ``[T]``, the image id that each distinct text row belongs to.
        match_pairs: int64 ``[Q, 2]``, (image row, text row) of each sample: one query per sample.
        extra_texts: int64 ``[Q, C]`` or None, text rows of captions that come with each sample: drawn at random for its
            image, or out of a score bank.
        extra_images: int64 ``[Q, C]`` or None, image rows of pictures that come with each sample, out of a score bank.

    Raises:
        ValueError: where a tensor has another shape, or an extra_ tensor another number of rows than match_pairs.
    """

    image_ids: Tensor
    text_image_ids: Tensor
    match_pairs: Tensor
    extra_texts: Tensor | None = None
    extra_images: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("image_ids", "text_image_ids"):
            if getattr(self, name).dim() != 1:
                raise ValueError(f"{name} must be one-dimensional, got shape {tuple(getattr(self, name).shape)}")
        if self.match_pairs.dim() != 2 or self.match_pairs.shape[1] != 2:
            raise ValueError(f"match_pairs must be [Q, 2], got shape {tuple(self.match_pairs.shape)}")
        for name in ("extra_texts", "extra_images"):
            extra = getattr(self, name)
            if extra is not None and (extra.dim() != 2 or len(extra) != len(self.match_pairs)):
                raise ValueError(
                    f"{name} must be [Q, C] with match_pairs' Q = {len(self.match_pairs)}, "
                    f"got shape {tuple(extra.shape)}"
                )


@dataclass
class CandidatePool:
    """The candidates of Q queries: three tensors of one shape ``[Q, 1+C]``, the match in column 0.

    Args:
        image_rows: int64 ``[Q, 1+C]``, rows into the batch's distinct images (constant along a row for
            image_to_text).
        text_rows: int64 ``[Q, 1+C]``, rows into the batch's distinct texts (constant along a row for
            text_to_image).
        valid: bool ``[Q, 1+C]``, False for entries that must not be used.
        direction: "image_to_text" or "text_to_image".

    Raises:
        ValueError: on shapes that differ, a missing match column, or an unknown direction.
    """

    image_rows: Tensor
    text_rows: Tensor
    valid: Tensor
    direction: str

    def __post_init__(self) -> None:
        check_direction(self.direction)
        shapes = {name: tuple(getattr(self, name).shape) for name in ("image_rows", "text_rows", "valid")}
        if len(set(shapes.values())) != 1 or self.valid.dim() != 2 or self.valid.shape[1] < 1:
            raise ValueError(f"a candidate pool needs three tensors of one shape [Q, 1+C], got {shapes}")


class PoolStrategy(Protocol):
    """The way to build the pool of one direction from the identities of a batch."""

    direction: str

    def build(self, context: BatchContext) -> CandidatePool:
        """Return the candidates of the batch's queries.

        Raises:
            ValueError: where the context lacks what the pool is made of.
        """


PoolClass = TypeVar("PoolClass", bound=Callable[..., PoolStrategy])
POOLS: dict[str, Callable[..., PoolStrategy]] = {}


def register_pool(name: str) -> Callable[[PoolClass], PoolClass]:
    """Class decorator: makes a pool strategy available as ``candidates: {source: <name>}``.

    Raises:
        ValueError: when the name is taken by another class.
    """

    def register(pool: PoolClass) -> PoolClass:
        if POOLS.get(name, pool) is not pool:
            raise ValueError(f"candidate pool '{name}' is already registered by {POOLS[name]!r}")
        POOLS[name] = pool
        return pool

    return register


def build_pool(name: str, direction: str = IMAGE_TO_TEXT) -> PoolStrategy:
    """Return the registered pool strategy ``name`` for one direction.

    Raises:
        ValueError: for an unknown name or a direction that the pool does not serve.
    """
    if name not in POOLS:
        raise ValueError(f"unknown candidate pool '{name}'; registered: {', '.join(sorted(POOLS))}")
    return POOLS[name](direction=direction)


def check_direction(direction: str) -> None:
    """Raise ``ValueError`` unless ``direction`` is one of DIRECTIONS."""
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction '{direction}'; expected one of {', '.join(DIRECTIONS)}")


@register_pool("in_batch")
class InBatch(PoolStrategy):
    """All other images (or texts) of the batch's own samples, without extra captions: C = distinct - 1."""

    def __init__(self, direction: str = IMAGE_TO_TEXT) -> None:
        check_direction(direction)
        self.direction = direction

    def build(self, context: BatchContext) -> CandidatePool:
        """Return a pool ``[Q, 1+C]`` in ascending order of rows; two samples of one image are masked for each other."""
        matches = context.match_pairs[:, 1 if self.direction == IMAGE_TO_TEXT else 0]
        distinct = torch.unique(matches)  # sorted
        place = torch.searchsorted(distinct, matches.contiguous())
        others = torch.arange(len(distinct) - 1, device=distinct.device).expand(len(matches), -1)
        return assemble(context, distinct[others + (others >= place[:, None])], self.direction)


@register_pool("random")
class RandomFromDataset(PoolStrategy):
    """The release's pool: C captions per image, drawn at random from the data set (``extra_texts``)."""

    def __init__(self, direction: str = IMAGE_TO_TEXT) -> None:
        check_direction(direction)
        if direction != IMAGE_TO_TEXT:
            raise ValueError("the 'random' pool draws captions, so it serves image_to_text only; use 'in_batch'")
        self.direction = direction

    def build(self, context: BatchContext) -> CandidatePool:
        """Return a pool ``[Q, 1+C]`` in the order drawn; captions of the query's own image and repeats are masked.

        Raises:
            ValueError: when the context has no extra_texts.
        """
        if context.extra_texts is None:
            raise ValueError("the 'random' pool needs extra_texts: captions drawn at random for each image")
        return assemble(context, context.extra_texts, self.direction)


@register_pool("bank")
class FromBank(PoolStrategy):
    """The candidates that come with each sample out of a score bank (``extra_texts``, ``extra_images``)."""

    def __init__(self, direction: str = IMAGE_TO_TEXT) -> None:
        check_direction(direction)
        self.direction = direction

    def build(self, context: BatchContext) -> CandidatePool:
        """Return a pool ``[Q, 1+C]`` in the bank's order; what shows the query's own image, and repeats, are masked.

        Raises:
            ValueError: when the context has no candidates of this direction.
        """
        to_text = self.direction == IMAGE_TO_TEXT
        extra = context.extra_texts if to_text else context.extra_images
        if extra is None:
            name = "extra_texts" if to_text else "extra_images"
            raise ValueError(f"the 'bank' pool needs {name}: candidates out of a score bank for each sample")
        return assemble(context, extra, self.direction)


def assemble(context: BatchContext, candidates: Tensor, direction: str) -> CandidatePool:
    """Put the match in front of ``candidates`` and masks whatever is no negative.

    Args:
        context: the batch.
        candidates: int64 ``[Q, C]``, text rows (image_to_text) or image rows (text_to_image), in any order.
        direction: which of the two.

    Returns:
        CandidatePool ``[Q, 1+C]``. A candidate is valid when its image id differs from the query's and no earlier
        column holds it (a caption drawn twice would otherwise count twice).
    """
    image, text = context.match_pairs.unbind(1)
    to_text = direction == IMAGE_TO_TEXT
    answers = torch.cat([(text if to_text else image)[:, None], candidates], dim=1)
    ids = (context.text_image_ids if to_text else context.image_ids)[answers]
    query_ids = (context.image_ids[image] if to_text else context.text_image_ids[text])[:, None]
    valid = (ids != query_ids) & ~_repeated(answers)
    valid[:, 0] = True
    queries = (image if to_text else text)[:, None].expand_as(answers)
    images, texts = (queries, answers) if to_text else (answers, queries)
    return CandidatePool(images, texts, valid, direction)


def _repeated(rows: Tensor) -> Tensor:
    """bool ``[Q, C]``: the entry stands in an earlier column too. Sorting keeps the memory at Q x C."""
    order = torch.sort(rows, dim=1, stable=True)
    same = torch.zeros_like(rows, dtype=torch.bool)
    same[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    return torch.zeros_like(same).scatter_(1, order.indices, same)
