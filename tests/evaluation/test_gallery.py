"""Queries with what each matcher returns: which are drawn, and what is shown of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from lavis_dcd.evaluation.evaluator import Evaluation
from lavis_dcd.evaluation.gallery import LONGEST_CAPTION, gallery_items
from lavis_dcd.evaluation.metrics import match_ranks


def numbers_of(count: int) -> Any:
    """Pictures of numbers, with two captions each."""
    return SimpleNamespace(
        text=[f"{i} {word}" for i in range(count) for word in ("shown", "here")],
        img2txt={i: [2 * i, 2 * i + 1] for i in range(count)},
        txt2img={t: t // 2 for t in range(2 * count)},
    )


def scored(count: int, blind: tuple[int, ...] = ()) -> Evaluation:
    """Scores of a matcher that takes the pictures in ``blind`` for the next ones."""
    seen = torch.tensor([float(i + 1 if i in blind else i) for i in range(count)])
    scores = -(seen[:, None] - torch.arange(count).repeat_interleave(2)).abs()
    return Evaluation({}, scores, scores.T)


def test_the_gallery_mixes_the_cases_and_marks_the_matches() -> None:
    numbers = numbers_of(8)
    found = {"teacher": scored(8, (1, 2)), "student": scored(8, (2, 3))}
    drawn: list[int] = []

    def load(row: int) -> Image.Image:
        drawn.append(row)
        return Image.new("L", (400, 200), row)

    items = gallery_items(found, numbers, load, count=8, seed=3)
    json.dumps(items)
    assert [item["direction"] for item in items] == ["text_to_image"] * 4 + ["image_to_text"] * 4
    for item in items[4:]:
        assert item["query"]["picture"].startswith("data:image/jpeg;base64,")
        assert [len(answers) for answers in item["results"].values()] == [5, 5]
    cases = {tuple(rank == 1 for rank in item["ranks"].values()) for item in items[4:]}
    assert cases == {(True, True), (True, False), (False, True), (False, False)}
    assert len(drawn) == len(set(drawn))
    for item in items[:4]:
        query = numbers.text.index(item["query"]["text"])
        for name, answers in item["results"].items():
            ranks = match_ranks(found[name].scores_t2i, numbers.txt2img)
            assert item["ranks"][name] == ranks[query]
            assert [a["score"] for a in answers] == sorted((a["score"] for a in answers), reverse=True)
            assert sum(a["right"] for a in answers) <= 1


def test_the_gallery_is_the_same_for_the_same_seed_and_takes_what_there_is() -> None:
    numbers, found = numbers_of(2), {"model": scored(2)}

    def items(seed: int) -> list[dict[str, Any]]:
        return gallery_items(found, numbers, lambda row: Image.new("RGB", (8, 8)), count=12, seed=seed)

    assert items(0) == items(0)
    assert len(items(0)) == 4 + 2  # every query there is


def test_captions_are_cut_and_lose_their_marks_of_direction() -> None:
    numbers, found = numbers_of(2), {"model": scored(2)}
    numbers.text = ["\u202e0 here", "0 " + "x" * 1_000_000, "\u2066" * 600 + "1 shown", "1 here"]
    items = gallery_items(found, numbers, lambda row: Image.new("RGB", (8, 8)))
    told = {item["query"]["text"] for item in items if "text" in item["query"]}
    told |= {answer["text"] for item in items for answer in item["results"]["model"] if "text" in answer}
    assert told == {"0 here", "0 " + "x" * (LONGEST_CAPTION - 3) + "…", "1 shown", "1 here"}
    assert len(json.dumps(items)) < 30_000
