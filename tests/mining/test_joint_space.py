"""A training set in a teacher's joint space, against vectors that are averaged by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import StubMatcher

from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.mining.joint_space import JointSpace, joint_spaces
from lavis_dcd.mining.pools import Pairing


class Plain(StubMatcher):
    """Vectors as they come; `factor` tells two teachers apart."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def embed_images(self, images: ImageFeatures) -> torch.Tensor:
        return self.factor * images.tokens[:, 0]

    def embed_texts(self, texts: TextFeatures) -> torch.Tensor:
        return self.factor * texts.tokens[:, 0]


class Given:
    """Features of pictures and captions in batches; those of captions in another order than their numbers."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, teachers: int) -> None:
        self.images, self.texts, self.teachers = images, texts, teachers

    def pictures(self) -> Iterator[tuple[torch.Tensor, list[ImageFeatures]]]:
        for some in torch.arange(len(self.images)).split(2):
            yield some, [ImageFeatures(self.images[some][:, None])] * self.teachers

    def captions(self) -> Iterator[tuple[torch.Tensor, list[TextFeatures]]]:
        for some in torch.arange(len(self.texts)).flip(0).split(3):
            yield some, [TextFeatures(self.texts[some][:, None])] * self.teachers


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("abcdef")), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_pictures_captions_are_averaged_whoever_else_has_them(rows):
    """A caption may stand at several pictures, and twice at one, which then counts twice."""
    pairing = Pairing.of([picture for picture, _ in rows], [caption for _, caption in rows])
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, 3, generator=generator) for n in (pairing.images, pairing.texts))
    one, two = joint_spaces([Plain(), Plain(2.0)], Given(images, texts, 2), pairing)
    assert torch.equal(one.images, images) and torch.equal(two.images, 2 * images)
    names = list(dict.fromkeys(caption for _, caption in rows))
    for number, picture in enumerate(dict.fromkeys(picture for picture, _ in rows)):
        own = [texts[names.index(caption)] for shown, caption in rows if shown == picture]
        mean = sum(own) / len(own)
        torch.testing.assert_close(one.captions[number], mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two.captions[number], 2 * mean, rtol=1e-5, atol=1e-6)


def test_scores_of_a_space():
    generator = torch.Generator().manual_seed(1)
    images, captions = torch.randn(7, 4, generator=generator), torch.randn(7, 4, generator=generator)
    space = JointSpace(Plain(), images, captions)
    scores = [[float(image @ caption) for caption in captions] for image in images]
    expected = torch.tensor([[(scores[i][j] + scores[j][i]) / 2 for j in range(7)] for i in range(2, 5)])
    torch.testing.assert_close(space.nearness(slice(2, 5)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(space.own(slice(1, 7)), torch.tensor([scores[i][i] for i in range(1, 7)]))
    others = [scores[i][j] for i in range(7) for j in range(7) if i != j]
    assert abs(space.spread() - statistics.pstdev(others)) < 1e-5
    assert JointSpace(Plain(), images[:1], captions[:1]).spread() == 0.0
