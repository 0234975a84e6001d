"""Encoded sets against their parts, concatenated and put in order by hand; in memory and on disk."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lavis_dcd.banks.encoding import Storage, encode_captions, encode_pictures
from lavis_dcd.banks.row_store import Spill, StreamedFeatures
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures


class Towers(nn.Module, Matcher):
    """Tokens by the words of a text and the side of a picture; masks and embeds as asked for."""

    def __init__(self, mask: bool = True, embeds: bool = True, alike: bool = False, dtype=torch.float32) -> None:
        super().__init__()
        self.mask, self.embeds, self.alike, self.dtype = mask, embeds, alike, dtype
        self.batches: list[int] = []

    def _features(self, kind: type, lengths: list[int], numbers: Tensor) -> Features:
        longest = 9 if self.alike else max(lengths)
        place = torch.arange(longest)[None, :, None]
        tokens = (numbers[:, None, None].sin() * (place + 1) + torch.tensor([0.1, -0.7, 1.3])).to(self.dtype)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None] if self.mask else None
        return kind(tokens, mask, torch.stack([numbers.cos(), numbers], 1).double() if self.embeds else None)

    def encode_images(self, images: Tensor) -> ImageFeatures:
        self.batches.append(len(images))
        return self._features(ImageFeatures, [images.shape[-1]] * len(images), images[:, 0, 0, 0])

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        self.batches.append(len(texts))
        numbers = torch.tensor([float(sum(map(ord, text)) % 97) for text in texts])
        return self._features(TextFeatures, [len(text.split()) for text in texts], numbers)

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        raise AssertionError


# many short words: the longest in letters is not the longest in words
TEXTS = ["a b c d e f", "word", "two words", "extraordinarily-long-word and-another-one", "x y z", "", "q w e r t y u"]
KINDS = [
    {},
    {"mask": False},
    {"mask": False, "alike": True},
    {"embeds": False},
    {"mask": False, "alike": True, "embeds": False},
    {"dtype": torch.bfloat16},
]


def same(one: Features, other: Features) -> None:
    for name in ("tokens", "mask", "embeds"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


def by_hand(texts: list[str], batch_size: int, encode: Callable[[list[str]], TextFeatures]) -> TextFeatures:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [encode([texts[i] for i in order[s : s + batch_size]]) for s in range(0, len(texts), batch_size)]
    parts = [part.to(dtype=part.tokens.dtype) for part in parts]  # embeds are kept as precisely as tokens
    return TextFeatures.cat(parts)[torch.tensor(order).argsort()]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_their_parts_in_order(kind: dict, batch_size: int, tmp_path: Path) -> None:
    texts = [text or "e" for text in TEXTS]
    matcher = Towers(**kind)
    expected = by_hand(texts, batch_size, matcher.encode_texts)
    batches, matcher.batches = matcher.batches, []
    same(encode_captions(matcher, texts, batch_size), expected)
    assert sorted(matcher.batches) == sorted(batches)  # nothing is encoded twice
    with Spill(tmp_path) as spill:
        found = encode_captions(matcher, texts, batch_size, Storage(spill=spill))
        assert isinstance(found, StreamedFeatures) and len(found) == len(texts)
        same(found[:], expected)
        rows = torch.tensor([4, 0, 6, 4])
        same(found[rows], expected[rows])
        same(found[2:5].trimmed(), expected[2:5].trimmed())
        same(found[[1]], expected[[1]])


@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_size_are_their_parts(kind: dict, count: int | None, tmp_path: Path) -> None:
    matcher = Towers(**kind)
    batches = [torch.full((n, 3, 1, side), float(side + n)) for n, side in ((2, 4), (1, 7), (2, 5))]
    parts = [matcher.encode_images(batch) for batch in batches]
    expected = ImageFeatures.cat([part.to(dtype=part.tokens.dtype) for part in parts])
    same(encode_pictures(matcher, iter(batches), count=count), expected)
    with Spill(tmp_path) as spill:
        found = encode_pictures(matcher, iter(batches), Storage(spill=spill), count=count)
        same(found[:], expected)
        same(found.only([3, 1])[:], expected[[3, 1]])
        assert found.nbytes == expected.nbytes


def test_stored_as_asked(tmp_path: Path) -> None:
    half = encode_captions(Towers(), ["a b", "c"], storage=Storage.half_on_host())
    assert half.tokens.dtype == torch.float16
    with Spill(tmp_path) as spill:
        found = encode_captions(Towers(), ["a b", "c"], storage=Storage(dtype=torch.float16, spill=spill))
        same(found[:], half)


def test_a_count_that_is_wrong_is_noticed() -> None:
    with pytest.raises(ValueError, match="1 of 3 rows have not come"):
        encode_pictures(Towers(), [torch.ones(2, 3, 1, 4)], count=3)


def test_encoding_holds_its_features_once() -> None:
    """Tensors of all sizes that are alive while the last batch is encoded."""

    class Watching(Towers):
        alive: int = 0

        def encode_texts(self, texts: list[str]) -> TextFeatures:
            own = TextFeatures(torch.zeros(len(texts), 8, 37))  # a width that no other test has
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if type(t) is Tensor and t.ndim == 3 and t.shape[-1] == 37
            }
            self.alive = max(self.alive, sum(storages.values()))
            return own

    matcher = Watching()
    rows = 4 * 8 * 37  # bytes of a row
    encode_captions(matcher, ["a"] * 64, batch_size=4)
    assert 64 * rows <= matcher.alive <= (64 + 2 * 4) * rows
