"""The time of a search: what is called, how often, and how it is counted; never how long it took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stubs import StubMatcher
from torch import Tensor

from lavis_dcd.evaluation import timing
from lavis_dcd.evaluation.timing import milliseconds_to_embed_and_compare, milliseconds_to_match
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class Recording(StubMatcher):
    """Keeps the sizes of its calls, and each caption's own number."""

    has_joint_space = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        self.calls.append((len(images), pairs.tolist(), texts.tokens.flatten().tolist()))
        return torch.zeros(len(pairs))

    def embed_images(self, images: ImageFeatures) -> Tensor:
        self.calls.append(("pictures", len(images)))
        return torch.ones(len(images), 2)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        self.calls.append(("caption", texts.tokens.flatten().tolist()))
        return torch.ones(len(texts), 2)


@pytest.fixture
def features() -> tuple[ImageFeatures, TextFeatures]:
    """Seven pictures, and five captions that are told apart by their token."""
    return ImageFeatures(torch.randn(7, 2, 3)), TextFeatures(torch.arange(5.0)[:, None, None])


@pytest.fixture
def two_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(score: Callable[[], Tensor], device: torch.device) -> float:
        score()
        return 0.002

    monkeypatch.setattr(timing, "_timed", timed)


@pytest.mark.usefixtures("two_milliseconds")
def test_a_fusion_model_matches_one_caption_with_the_pictures_asked_for(features: Any) -> None:
    matcher = Recording().train()
    assert milliseconds_to_match(matcher, *features, pictures=4, repeats=3) == pytest.approx(2.0)
    pairs = [[row, 0] for row in range(4)]
    assert matcher.calls == [(4, pairs, [0.0]), (4, pairs, [1.0]), (4, pairs, [3.0])]
    assert matcher.training


@pytest.mark.usefixtures("two_milliseconds")
def test_more_pictures_than_are_timed_count_in_proportion(features: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert milliseconds_to_match(Recording(), *features, pictures=70) == pytest.approx(20.0)
    monkeypatch.setattr(timing, "MATCHED_AT_MOST", 2)
    matcher = Recording()
    assert milliseconds_to_match(matcher, *features, pictures=6) == pytest.approx(6.0)
    assert {call[0] for call in matcher.calls} == {2}
    assert milliseconds_to_embed_and_compare(Recording(), *features, pictures=21) == pytest.approx(6.0)


@pytest.mark.usefixtures("two_milliseconds")
def test_a_gallery_is_embedded_once_and_every_search_has_another_caption(features: Any) -> None:
    matcher = Recording()
    assert milliseconds_to_embed_and_compare(matcher, *features, pictures=7, repeats=2) == pytest.approx(2.0)
    assert matcher.calls == [("pictures", 7), *(("caption", [row]) for row in (0.0, 1.0, 3.0))]


def test_one_picture_and_one_caption_suffice() -> None:
    images, texts = ImageFeatures(torch.randn(1, 2, 3)), TextFeatures(torch.zeros(1, 1, 1))
    assert milliseconds_to_match(Recording(), images, texts, pictures=1) > 0
    assert milliseconds_to_embed_and_compare(Recording(), images, texts, pictures=1) > 0
