"""Queries of an evaluation set with what each matcher returns, for people to look at."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lavis_dcd.evaluation.evaluator import Evaluation
from lavis_dcd.evaluation.metrics import match_ranks

PICTURE_SIDE = 160
TOP = 5

Shown = dict[str, str]

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text_to_image", "image_to_text"


def gallery_items(
    evaluations: Mapping[str, Evaluation],
    dataset: Any,
    load_picture: Callable[[int], Image.Image],
    count: int = 12,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """``count`` queries, half of each direction, with the best five of every matcher, in plain containers.

    The queries are drawn in turn from those that all matchers answer right, that only one of them does, and
    that none does, so that the cases stand side by side as far as they exist.

    Args:
        evaluations: by matcher's name, in the order of the columns.
        dataset: the evaluation set (``text``, ``txt2img``, ``img2txt``).
        load_picture: the picture of an image row, as a person should see it.

    Returns:
        items ``{"direction", "query": SHOWN, "ranks": {name: 1-based rank of the best match},
        "results": {name: [SHOWN + {"right": bool, "score": float}, ...]}}``; SHOWN is ``{"text": str}`` or
        ``{"picture": str}``, a JPEG data address.
    """
    pictures = _Pictures(load_picture)

    def captions(row: int) -> Shown:
        return {"text": dataset.text[row]}

    asked_in_words = {name: found.scores_t2i for name, found in evaluations.items()}
    asked_in_pictures = {name: found.scores_i2t for name, found in evaluations.items()}
    first, second = count - count // 2, count // 2
    return [
        *_items(TEXT_TO_IMAGE, asked_in_words, dataset.txt2img, captions, pictures, first, seed),
        *_items(IMAGE_TO_TEXT, asked_in_pictures, dataset.img2txt, pictures, captions, second, seed + 1),
    ]


def _items(
    direction: str,
    scores: Mapping[str, Any],
    matches: Mapping[int, int | Sequence[int]],
    show_query: Callable[[int], Shown],
    show_result: Callable[[int], Shown],
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    ranks = {name: match_ranks(table, matches) for name, table in scores.items()}
    items = []
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
    """Up to ``count`` queries, taken in turn from every case of who is right."""
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


def _top(scores: Any, right: set[int], show: Callable[[int], Shown]) -> list[dict[str, Any]]:
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
