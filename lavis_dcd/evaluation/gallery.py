"""Queries of an evaluation set with what each matcher returns, for people to look at."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np
from PIL import Image
from torch import Tensor

from lavis_dcd.banks.encoding import EvaluationSet
from lavis_dcd.common.texts import cut, visible
from lavis_dcd.evaluation.evaluator import Evaluation
from lavis_dcd.evaluation.metrics import Matches, match_ranks

PICTURE_SIDE = 160
TOP = 5
LONGEST_CAPTION = 500  # characters that are shown
_LOOKED_AT = 10_000  # characters that are searched for them

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text_to_image", "image_to_text"


class Shown(TypedDict, total=False):
    """A caption as ``text``, cut to ``LONGEST_CAPTION``, or a picture as ``picture``, a JPEG data address."""

    text: str
    picture: str


class Result(Shown):
    """An item that a matcher returned, and whether it matches the query."""

    right: bool
    score: float


class GalleryItem(TypedDict):
    """A query with what every matcher returns, best first; ``ranks`` are the best match's, 1-based."""

    direction: str
    query: Shown
    ranks: dict[str, int]
    results: dict[str, list[Result]]


def gallery_items(
    evaluations: Mapping[str, Evaluation],
    dataset: EvaluationSet,
    load_picture: Callable[[int], Image.Image],
    count: int = 12,
    seed: int = 0,
) -> list[GalleryItem]:
    """Return ``count`` queries, half of each direction, with the best five of every matcher, in plain containers.

    The queries are drawn in turn from those that all matchers answer right, that only one of them does, and
    that none does, so that the cases stand side by side as far as they exist.

    Args:
        evaluations: by matcher's name, in the order of the columns.
        load_picture: the picture of an image row, as a person should see it.
    """
    pictures = _Pictures(load_picture)

    def captions(row: int) -> Shown:
        # visible characters alone, so that its marks of writing direction turn nothing else on the page
        return {"text": cut(visible(dataset.text[row][:_LOOKED_AT]), LONGEST_CAPTION)}

    scores_t2i = {name: evaluation.scores_t2i for name, evaluation in evaluations.items()}
    scores_i2t = {name: evaluation.scores_i2t for name, evaluation in evaluations.items()}
    first, second = count - count // 2, count // 2
    return [
        *_items(TEXT_TO_IMAGE, scores_t2i, dataset.txt2img, captions, pictures, first, seed),
        *_items(IMAGE_TO_TEXT, scores_i2t, dataset.img2txt, pictures, captions, second, seed + 1),
    ]


def _items(
    direction: str,
    scores: Mapping[str, Tensor],
    matches: Matches,
    show_query: Callable[[int], Shown],
    show_result: Callable[[int], Shown],
    count: int,
    seed: int,
) -> list[GalleryItem]:
    """Return queries of one direction, from each matcher's ``scores [Q, N]``."""
    ranks = {name: match_ranks(table, matches) for name, table in scores.items()}
    items: list[GalleryItem] = []
    for query in _mixed(ranks, count, seed):
        match = matches[query]
        right = {match} if isinstance(match, int) else set(match)
        items.append(
            {
                "direction": direction,
                "query": show_query(query),
                "ranks": {name: int(of_matcher[query]) for name, of_matcher in ranks.items()},
                "results": {name: _top(table[query], right, show_result) for name, table in scores.items()},
            }
        )
    return items


def _mixed(ranks: Mapping[str, np.ndarray], count: int, seed: int) -> list[int]:
    """Return up to ``count`` queries, taken in turn from every combination of matchers that are right."""
    answered = np.stack([of_matcher == 1 for of_matcher in ranks.values()], axis=1)
    rng = random.Random(seed)
    cases: dict[tuple[bool, ...], list[int]] = {}
    for query in rng.sample(range(len(answered)), len(answered)):
        cases.setdefault(tuple(answered[query].tolist()), []).append(query)
    # All right first, then the cases in which the matchers differ, none right last.
    ordered = [cases[case] for case in sorted(cases, key=lambda case: (-sum(case), case))]
    chosen: list[int] = []
    while ordered and len(chosen) < count:
        ordered = [queries for queries in ordered if queries]
        chosen += [queries.pop() for queries in ordered[: count - len(chosen)]]
    return chosen


def _top(scores: Tensor, right: set[int], show: Callable[[int], Shown]) -> list[Result]:
    """Return the best items of one query's ``scores [N]``."""
    best = scores.topk(min(TOP, len(scores)))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{**show(row), "right": row in right, "score": round(score, 4)} for row, score in rows]


class _Pictures:
    """Small JPEG data addresses of the set's pictures, each made once."""

    def __init__(self, load: Callable[[int], Image.Image]) -> None:
        self._load = load
        self._made: dict[int, str] = {}

    def __call__(self, row: int) -> Shown:
        if row not in self._made:
            picture = self._load(row).convert("RGB")
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=82)
            self._made[row] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        return {"picture": self._made[row]}
