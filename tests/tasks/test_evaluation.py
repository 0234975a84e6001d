"""A matcher measured on a small set, and the gallery made of its scores; without LAVIS."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.tasks import evaluation
from lavis_dcd.tasks.evaluation import Evaluation, Protocol, evaluate
from lavis_dcd.tasks.gallery import gallery_items
from lavis_dcd.tasks.metrics import coco_1k_five_folds, match_ranks, retrieval_metrics


class Numbers(torch.utils.data.Dataset):
    """Pictures that show a number, captions that name it; two captions a picture."""

    def __init__(self, count: int = 8) -> None:
        self.count = count
        self.text = [f"{i} {word}" for i in range(count) for word in ("shown", "here")]
        self.img2txt = {i: [2 * i, 2 * i + 1] for i in range(count)}
        self.txt2img = {t: t // 2 for t in range(2 * count)}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((3, 2, 2), float(index)), "index": index}


class Reader(nn.Module, Matcher):
    """Right but for the pictures in ``blind``, which it takes for the next one."""

    has_joint_space = True

    def __init__(self, blind: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.blind, self.matched = blind, 0

    def encode_images(self, images: Tensor) -> ImageFeatures:
        seen = [n + 1 if n in self.blind else n for n in images[:, 0, 0, 0].tolist()]
        return ImageFeatures(torch.tensor(seen)[:, None, None])

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return TextFeatures(torch.tensor([float(t.split()[0]) for t in texts])[:, None, None])

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        self.matched += len(pairs)
        return -(images.tokens[pairs[:, 0], 0, 0] - texts.tokens[pairs[:, 1], 0, 0]).abs() * self.weight

    def embed_images(self, images: ImageFeatures) -> Tensor:
        angle = images.tokens[:, 0, 0] / 10
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        angle = texts.tokens[:, 0, 0] / 10
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_an_evaluation_is_the_mapping_of_its_figures() -> None:
    matcher, numbers = Reader(blind=(2, 5)), Numbers()
    found = evaluate(matcher, numbers, Protocol())
    assert found.scores_i2t.shape == (8, 16) and found.scores_t2i.shape == (16, 8)
    expected = retrieval_metrics(found.scores_i2t, found.scores_t2i, numbers.txt2img, numbers.img2txt)
    assert expected.items() <= dict(found).items()
    assert found["txt_r1"] == 75.0 and found["how"] == "exhaustive"
    assert found["fusion_parameters"] == 1 and found["ms_per_pair"] > 0
    assert set(found) == {*expected, "fusion_parameters", "ms_per_pair", "how"}


def test_a_shortlist_spares_pairs_and_finds_the_same_matches() -> None:
    matcher, numbers = Reader(), Numbers()
    found = evaluate(matcher, numbers, Protocol(k_test=3))
    assert found["r_sum"] == 600.0 and found["how"] == "shortlist k=3 (joint)"
    assert matcher.matched < 8 * 16 + 6 * 256  # fewer than all pairs, and the measurement's


def test_another_matcher_can_make_the_shortlist() -> None:
    numbers, cheap = Numbers(), Reader(blind=(0, 1, 2, 3, 4, 5, 6))
    own = evaluate(Reader(), numbers, Protocol(k_test=2))
    misled = evaluate(Reader(), numbers, Protocol(k_test=2, shortlist="teacher"), shortlist=cheap)
    assert own["txt_r1"] == 100.0 and misled["txt_r1"] < 50.0
    assert misled["how"] == "shortlist k=2 (teacher)" and cheap.matched == 0


def test_a_shortlist_needs_a_joint_space_before_anything_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = Reader()
    matcher.has_joint_space = False
    monkeypatch.setattr(matcher, "encode_images", lambda images: pytest.fail("encoded"))
    with pytest.raises(UserError, match="no joint space"):
        evaluate(matcher, Numbers(), Protocol(k_test=2))


def test_big_sets_wait_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, seen = Numbers(), []
    exact = evaluate(Reader(), numbers, Protocol())
    monkeypatch.setattr(evaluation, "HALF_ABOVE_BYTES", 10)
    monkeypatch.setattr(
        evaluation, "score_exhaustive",
        lambda matcher, images, texts, **_: seen.append(images.tokens.dtype) or exact.scores_i2t,
    )  # fmt: skip
    evaluate(Reader(), numbers, Protocol())
    assert seen == [torch.float16]


def test_the_1k_protocol_is_added_under_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers(10)
    monkeypatch.setattr(
        evaluation, "coco_1k_five_folds", lambda *tables: coco_1k_five_folds(*tables, images_per_fold=2)
    )
    # any other number of pictures has no such protocol
    assert "1k_r_sum" not in evaluate(Reader(), numbers, Protocol(coco_1k_folds=True))
    monkeypatch.setattr(evaluation, "COCO_TEST_IMAGES", 10)
    assert evaluate(Reader(), numbers, Protocol(coco_1k_folds=True))["1k_r_sum"] == 600.0


def test_the_protocol_of_a_run_section() -> None:
    @dataclass
    class Run:
        k_test: int | None = None
        batch_size_eval: int = 7
        amp: str = "bf16"
        match_memory_mb: float = 5

    assert Protocol.of_run(Run()) == Protocol(batch_size=7, amp="bf16", memory_mb=5)
    assert Protocol.of_run({"k_test": 4, "amp": False, "other": 1}) == Protocol(k_test=4)
    assert Protocol.of_run(None) == Protocol()


def evaluations(numbers: Numbers) -> dict[str, Evaluation]:
    blind = {"teacher": (1, 2), "student": (2, 3)}
    return {name: evaluate(Reader(who), numbers, Protocol()) for name, who in blind.items()}


def test_the_gallery_mixes_the_cases_and_marks_the_matches() -> None:
    numbers = Numbers()
    found = evaluations(numbers)
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
    numbers = Numbers(2)
    found = {"model": evaluate(Reader(), numbers, Protocol())}

    def items(seed: int) -> list[dict[str, Any]]:
        return gallery_items(found, numbers, lambda row: Image.new("RGB", (8, 8)), count=12, seed=seed)

    assert items(0) == items(0)
    assert len(items(0)) == 4 + 2  # every query there is
