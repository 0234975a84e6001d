"""The pairs that a teacher scores when a bank is mined: per query the most promising candidates, and random ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lavis_dcd.banks.encoding import reported, scoring_mode
from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT
from lavis_dcd.evaluation.exhaustive import finite
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.batch import distinct

TILE_MB = 128  # of one block of cheap scores


@dataclass(frozen=True)
class Pairing:
    """The matches of a training set: R rows, I distinct pictures, T distinct captions.

    A caption that stands at several pictures is one caption, and a match of each of them.

    Args:
        image_of_row, text_of_row: int64 ``[R]``.
        row_of_image: int64 ``[I]``, the first row of each picture.
        row_of_text: int64 ``[T]``, the first row of each caption.
    """

    image_of_row: Tensor
    text_of_row: Tensor
    row_of_image: Tensor
    row_of_text: Tensor

    @classmethod
    def of(cls, image_ids: Sequence[int], captions: Sequence[str]) -> Pairing:
        """Pair the rows' picture ids and captions; both are numbered as they first appear."""
        images, image_of_row = distinct(list(image_ids))
        texts, text_of_row = distinct(list(captions))
        return cls(*(torch.tensor(rows, dtype=torch.int64) for rows in (image_of_row, text_of_row, images, texts)))

    @property
    def images(self) -> int:
        """The number of distinct pictures."""
        return len(self.row_of_image)

    @property
    def texts(self) -> int:
        """The number of distinct captions."""
        return len(self.row_of_text)

    def keys(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return one number per pair, int64; in order of the pictures, then of the captions."""
        return images * self.texts + texts

    def match_keys(self) -> Tensor:
        """Return the keys of all distinct matches, sorted."""
        return torch.unique(self.keys(self.image_of_row, self.text_of_row))

    def queries(self, direction: str) -> int:
        """Return the number of distinct queries: pictures for image_to_text, captions for text_to_image."""
        return self.images if direction == IMAGE_TO_TEXT else self.texts

    def candidates(self, direction: str) -> int:
        """Return the number of distinct items that a query of this direction is compared with."""
        return self.texts if direction == IMAGE_TO_TEXT else self.images

    def matches(self, direction: str) -> list[np.ndarray]:
        """Return per query its matches, sorted."""
        keys = self.match_keys()
        images, texts = keys // self.texts, keys % self.texts
        queries, items = (images, texts) if direction == IMAGE_TO_TEXT else (texts, images)
        order = queries.sort(stable=True).indices
        counts = torch.bincount(queries, minlength=self.queries(direction))
        return [of_query.numpy() for of_query in items[order].split(counts.tolist())]


def shortlists(
    pairing: Pairing, matcher: Matcher, image_embeds: Tensor, text_embeds: Tensor, count: int
) -> dict[str, Tensor]:
    """Return by direction the ``count`` candidates with the highest scores of a joint space, matches left out.

    The table of all pairs is made tile by tile, both directions off each, and never stands in memory as a whole.

    Args:
        image_embeds: ``[I, E]``, or ``[I, N, E]`` where a picture has several vectors.
        text_embeds: ``[T, E]``.

    Returns:
        int32 ``[Q, min(count, candidates)]`` each, highest first, -1 where there are no more.

    Raises:
        ValueError: a score that is not a finite number.
    """
    matches = pairing.match_keys()
    tiles = list(_tiles(pairing, image_embeds))
    with scoring_mode(matcher) as device:
        best = {d: _Best(pairing.queries(d), min(count, pairing.candidates(d)), device) for d in DIRECTIONS}
        to_text, to_image = (best[d] for d in DIRECTIONS)
        text_embeds = text_embeds.to(device)
        for images, texts in reported(tiles, len(tiles), "blocks of cheap scores"):
            block = image_embeds[images.start : images.stop].to(device)
            scores = finite(matcher.joint_scores(block, text_embeds[texts.start : texts.stop]).float())
            _hide(scores, matches, images, texts, pairing.texts)
            to_text.add(images, texts, scores)
            to_image.add(texts, images, scores.T.contiguous())
    return {direction: of_direction.items() for direction, of_direction in best.items()}


def with_random(pairing: Pairing, direction: str, chosen: Tensor, count: int, seed: int) -> Tensor:
    """Return ``chosen [Q, S]`` and up to ``count`` random candidates behind, none twice and no match.

    The draw depends on (seed, direction, query) and on the candidates that are chosen already.

    Returns:
        int32 ``[Q, S + count]``, -1 where there are no more; columns that no query uses are cut off.
    """
    total = pairing.candidates(direction)
    pool = np.full((len(chosen), chosen.shape[1] + count), -1, dtype=np.int32)
    pool[:, : chosen.shape[1]] = chosen.numpy()
    code = DIRECTIONS.index(direction)
    matches = pairing.matches(direction) if count else []
    queries = reported(matches, len(matches), f"{direction} queries given random candidates")
    for query, of_query in enumerate(queries):
        before = pool[query, : chosen.shape[1]]
        taken = np.union1d(of_query, before[before >= 0])
        drawn = _draw(taken, total, count, np.random.default_rng([seed, code, query]))
        pool[query, chosen.shape[1] : chosen.shape[1] + len(drawn)] = drawn
    used = (pool >= 0).any(axis=0)
    return torch.from_numpy(np.ascontiguousarray(pool[:, used]))


def _draw(taken: np.ndarray, total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw ``count`` of 0..total-1 that are not ``taken``, or all there are, without repeats."""
    if total - len(taken) <= 4 * count:
        return random.permutation(np.setdiff1d(np.arange(total), taken))[:count]
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:  # few are taken, so one or two rounds do
        more = random.integers(total, size=2 * count)
        drawn = np.concatenate([drawn, more[~np.isin(more, taken)]])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return drawn[:count]


class _Best:
    """The highest scores of every query so far, and whose they are."""

    def __init__(self, queries: int, count: int, device: torch.device) -> None:
        self._scores = torch.full((queries, count), -torch.inf, device=device)
        self._items = torch.full((queries, count), -1, dtype=torch.int32, device=device)

    def add(self, queries: range, items: range, scores: Tensor) -> None:
        """Take in a block of scores, ``[len(queries), len(items)]``; -inf where no candidate is."""
        rows, count = slice(queries.start, queries.stop), self._scores.shape[1]
        values, columns = scores.topk(min(count, len(items)), dim=1)
        values = torch.cat([self._scores[rows], values], dim=1)
        whose = torch.cat([self._items[rows], (columns + items.start).int()], dim=1)
        self._scores[rows], places = values.topk(count, dim=1)
        self._items[rows] = whose.gather(1, places)

    def items(self) -> Tensor:
        """Return the items, highest first, -1 where there are no more."""
        return self._items.masked_fill(self._scores == -torch.inf, -1).cpu()


def _tiles(pairing: Pairing, image_embeds: Tensor) -> Iterator[tuple[range, range]]:
    vectors = image_embeds.shape[1] if image_embeds.ndim == 3 else 1
    side = max(1, int((TILE_MB * 2**20 / 4 / vectors) ** 0.5))
    for images in _ranges(pairing.images, side):
        for texts in _ranges(pairing.texts, side):
            yield images, texts


def _ranges(total: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def _hide(scores: Tensor, matches: Tensor, images: range, texts: range, width: int) -> None:
    first, last = torch.searchsorted(matches, torch.tensor([images.start * width, images.stop * width])).tolist()
    image, text = matches[first:last] // width - images.start, matches[first:last] % width - texts.start
    inside = (text >= 0) & (text < len(texts))
    scores[image[inside].to(scores.device), text[inside].to(scores.device)] = -torch.inf
