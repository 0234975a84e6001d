"""Scores of a shard: each picture and caption encoded once, the memory bounded, nothing kept that is no number."""

from __future__ import annotations

import pytest
import torch
from stubs import StubMatcher
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.views import View
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.mining.pools import Pairing
from lavis_dcd.mining.scores import MiningResources, PairScorer, Reader, ReadSet, embed_all, pairing_of


class Stub(StubMatcher):
    """A picture is its pixel, a text its length; counts what it encodes and how many pairs come at once."""

    has_joint_space = True

    def __init__(self, seed: float = 1.0, tower: nn.Module | None = None) -> None:
        super().__init__(tower)
        self.seed, self.images_seen, self.texts_seen, self.calls = seed, 0, [], []

    def encode_images(self, images):
        self.images_seen += len(images)
        return ImageFeatures(images.mean(dim=(1, 2, 3))[:, None, None])

    def encode_texts(self, texts):
        self.texts_seen += texts
        return TextFeatures(torch.tensor([float(len(text)) for text in texts])[:, None, None])

    def match(self, images, texts, pairs):
        self.calls.append(len(pairs))
        return self.seed * images.tokens[pairs[:, 0], 0, 0] + texts.tokens[pairs[:, 1], 0, 0]

    def embed_images(self, images):
        return torch.cat([images.tokens[:, 0], torch.ones(len(images), 1)], dim=1)

    def embed_texts(self, texts):
        return torch.cat([torch.ones(len(texts), 1), texts.tokens[:, 0]], dim=1)


class Rows:
    """A training set of five pictures (pixel = number) with two captions each (their lengths differ)."""

    def __init__(self) -> None:
        self.annotation = [{"image": f"{n // 2}", "image_id": n // 2, "caption": "x" * (n + 1)} for n in range(10)]
        self.img_ids = {n: n for n in range(5)}
        self.vis_processor, self.text_processor = Times(1), str
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict:
        self.decoded.append(index)
        return {"image": self.vis_processor(float(index // 2)), "text_input": self.annotation[index]["caption"]}


class Times:
    """A picture processor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, pixel: float) -> torch.Tensor:
        return torch.full((3, 2, 2), self.factor * pixel)


def view(factor: float = 1.0, text=str) -> View:
    return View(vis_eval=Times(factor), text_eval=text)


def scored(readers: list[Reader], resources: MiningResources, rows: Rows) -> tuple[Pairing, list[torch.Tensor]]:
    """Every picture with every caption, in one shard."""
    pairing, read = pairing_of(rows), ReadSet(rows, readers)
    (batch,) = read.batches([pairing.row_of_image.tolist()], 0)
    keys = torch.arange(pairing.images * pairing.texts)
    return pairing, PairScorer(read, readers, pairing, resources).scores(keys, batch)


def expected(seed: float, factor: float = 1.0, more: int = 0) -> torch.Tensor:
    return torch.tensor([[seed * factor * i + n + 1 + more for n in range(10)] for i in range(5)]).flatten()


@pytest.mark.parametrize("memory_mb", [64, 7 * 8 / 2**20])
def test_chunks_within_the_memory_give_the_same(memory_mb):
    matcher, rows = Stub(100), Rows()
    _, (found,) = scored([Reader(matcher, view())], MiningResources(batch_size=2, memory_mb=memory_mb), rows)
    assert found.equal(expected(100))
    assert matcher.images_seen == 5 and sorted(rows.decoded) == [0, 2, 4, 6, 8]
    if memory_mb < 1:
        assert max(matcher.calls) == 7
    # the longest was measured first
    assert sorted(matcher.texts_seen[1:], key=len) == ["x" * (n + 1) for n in range(10)]


def test_teachers_with_shared_encoders_pay_once():
    first = Stub(100)
    second = Stub(10, first.tower)
    _, found = scored([Reader(first, view()), Reader(second, view())], MiningResources(), Rows())
    assert found[0].equal(expected(100)) and found[1].equal(expected(10))
    assert (first.images_seen, second.images_seen, second.texts_seen) == (5, 0, [])


def shouted(caption: str) -> str:
    return f"{caption}!!"


def test_each_teacher_reads_through_its_own_processors():
    rows = Rows()
    readers = [Reader(Stub(100), view(3)), Reader(Stub(10), view(5, shouted))]
    _, found = scored(readers, MiningResources(), rows)
    assert found[0].equal(expected(100, 3)) and found[1].equal(expected(10, 5, 2))
    assert sorted(rows.decoded) == [0, 2, 4, 6, 8]  # once for both


def test_no_number_is_refused():
    with pytest.raises(UserError, match="10 of 50 scores of Stub are not finite numbers"):
        scored([Reader(Stub(), View(vis_eval=NanOnce(), text_eval=str))], MiningResources(), Rows())


class NanOnce:
    """Not a number for one picture."""

    def __call__(self, pixel: float) -> torch.Tensor:
        return torch.full((3, 2, 2), float("nan") if pixel == 2 else 1.0)


def test_embeddings_in_the_order_of_pictures_and_captions():
    rows, reader = Rows(), Reader(Stub(), view())
    pairing = pairing_of(rows)
    images, texts = embed_all(ReadSet(rows, [reader]), reader, pairing, MiningResources(batch_size=2))
    assert images.tolist() == [[float(i), 1.0] for i in range(5)]
    assert texts.tolist() == [[1.0, float(n + 1)] for n in range(10)]
