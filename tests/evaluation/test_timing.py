"""The measurement of a pair's cost: what is called, how often; never how long it took."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis_dcd.evaluation.evaluator import milliseconds_per_pair
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class Counting(nn.Module, Matcher):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(images.flatten(2))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return TextFeatures(torch.zeros(len(texts), 2, 4))

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        assert pairs[:, 0].max() < len(images) and pairs[:, 1].max() < len(texts)
        self.calls.append(pairs)
        return pairs.sum(1).float()


def test_match_is_called_once_untimed_and_then_for_every_repeat_on_the_same_pairs() -> None:
    matcher = Counting().train()
    images, texts = matcher.encode_images(torch.randn(7, 3, 2, 2)), matcher.encode_texts(["a"] * 5)
    assert milliseconds_per_pair(matcher, images.to(dtype=torch.float16), texts, pairs=16, repeats=3) > 0
    assert len(matcher.calls) == 4 and matcher.calls[0].shape == (16, 2)
    assert all(torch.equal(call, matcher.calls[0]) for call in matcher.calls)
    assert matcher.training


def test_a_dual_encoder_is_timed_on_whole_products() -> None:
    class Dual(Counting):
        family = "dual"

        def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
            self.calls.append(torch.zeros(len(images), len(texts)))
            return self.calls[-1]

    matcher = Dual()
    images, texts = matcher.encode_images(torch.randn(7, 3, 2, 2)), matcher.encode_texts(["a"] * 5)
    assert milliseconds_per_pair(matcher, images, texts, pairs=64, repeats=3) > 0
    assert [call.shape for call in matcher.calls] == [(7, 5)] * 4


def test_one_picture_and_one_caption_suffice() -> None:
    matcher = Counting()
    images, texts = matcher.encode_images(torch.randn(1, 3, 2, 2)), matcher.encode_texts(["a"])
    assert milliseconds_per_pair(matcher, images, texts) > 0
