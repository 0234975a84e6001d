"""Pools against plain loops: who is compared with whom, and never with itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT, TEXT_TO_IMAGE
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.mining import pools as mining_pools
from lavis_dcd.mining.pools import Pairing, shortlists, with_random

# seven rows of four pictures; the caption "b" stands at two of them, "a" twice at one
IDS = [5, 5, 7, 7, 9, 9, 2]
CAPTIONS = ["a", "b", "b", "c", "d", "e", "f"]


class Joint(nn.Module, Matcher):
    """Only its joint space is asked for."""

    has_joint_space = True

    def encode_images(self, images):
        raise AssertionError

    encode_texts = match = encode_images

    def joint_scores(self, image_embeds, text_embeds):
        if image_embeds.ndim == 3:
            return torch.einsum("ivd,td->itv", image_embeds, text_embeds).amax(dim=2)
        return image_embeds @ text_embeds.T


def matches(direction: str, ids=IDS, captions=CAPTIONS) -> list[set[int]]:
    """Per query the items that belong to it, by plain loops."""
    pictures, texts = list(dict.fromkeys(ids)), list(dict.fromkeys(captions))
    pairs = {(pictures.index(i), texts.index(c)) for i, c in zip(ids, captions, strict=True)}
    if direction == IMAGE_TO_TEXT:
        return [{t for i, t in pairs if i == query} for query in range(len(pictures))]
    return [{i for i, t in pairs if t == query} for query in range(len(texts))]


def test_the_rows_of_a_training_set():
    pairing = Pairing.of(IDS, CAPTIONS)
    assert (pairing.images, pairing.texts) == (4, 6)
    assert pairing.image_of_row.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert pairing.text_of_row.tolist() == [0, 1, 1, 2, 3, 4, 5]
    assert pairing.row_of_image.tolist() == [0, 2, 4, 6]
    assert pairing.row_of_text.tolist() == [0, 1, 3, 4, 5, 6]
    for direction in DIRECTIONS:
        assert [set(own.tolist()) for own in pairing.matches(direction)] == matches(direction)


def random_set(pictures: int = 37, seed: int = 0) -> tuple[Pairing, list[int], list[str]]:
    """Three captions a picture, some of them at several pictures."""
    random = torch.Generator().manual_seed(seed)
    ids = [i for i in range(pictures) for _ in range(3)]
    captions = [f"caption {int(n)}" for n in torch.randint(90, (len(ids),), generator=random)]
    return Pairing.of(ids, captions), ids, captions


@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize("tile_mb", [128, 0.0005])
def test_the_shortlist_is_the_top_of_the_whole_table(monkeypatch, vectors, tile_mb):
    monkeypatch.setattr(mining_pools, "TILE_MB", tile_mb)
    pairing, ids, captions = random_set()
    random = torch.Generator().manual_seed(1)
    shape = (pairing.images, 8) if vectors == 1 else (pairing.images, vectors, 8)
    images, texts = torch.randn(shape, generator=random), torch.randn(pairing.texts, 8, generator=random)
    found = shortlists(pairing, Joint(), images, texts, 5)
    table = Joint().joint_scores(images, texts)
    for direction, scores in ((IMAGE_TO_TEXT, table), (TEXT_TO_IMAGE, table.T)):
        own = matches(direction, ids, captions)
        for query, row in enumerate(scores.tolist()):
            others = [item for item in range(len(row)) if item not in own[query]]
            assert found[direction][query].tolist() == sorted(others, key=lambda item: -row[item])[:5]


def test_a_shortlist_longer_than_what_there_is():
    pairing = Pairing.of(IDS, CAPTIONS)
    found = shortlists(pairing, Joint(), torch.eye(4), torch.eye(6)[:, :4], 50)
    for direction in DIRECTIONS:
        for chosen, own in zip(found[direction].tolist(), matches(direction), strict=True):
            there = [item for item in chosen if item >= 0]
            assert sorted(there) == [i for i in range(pairing.candidates(direction)) if i not in own]
            assert chosen == there + [-1] * (len(chosen) - len(there))


@pytest.mark.parametrize("pictures", [9, 60])
def test_random_candidates_are_new_and_no_matches(pictures):
    pairing, ids, captions = random_set(pictures)
    for direction in DIRECTIONS:
        own = matches(direction, ids, captions)
        chosen = with_random(pairing, direction, torch.empty(len(own), 0, dtype=torch.int32), 3, seed=4)
        pool = with_random(pairing, direction, chosen, 4, seed=5)
        assert pool[:, :3].equal(chosen) and pool.dtype == torch.int32
        for items, of_query in zip(pool.tolist(), own, strict=True):
            there = [item for item in items if item >= 0]
            assert len(set(there)) == len(there) and not of_query & set(there)
            assert len(there) == min(7, pairing.candidates(direction) - len(of_query))
        assert pool.equal(with_random(pairing, direction, chosen, 4, seed=5))
        if pictures > 9:
            assert not pool.equal(with_random(pairing, direction, chosen, 4, seed=6))


def test_all_candidates_where_more_are_asked_for():
    pairing = Pairing.of(IDS, CAPTIONS)
    pool = with_random(pairing, TEXT_TO_IMAGE, torch.empty(6, 0, dtype=torch.int32), 100, seed=0)
    assert pool.shape == (6, 3)  # four pictures, one of them its own
    for items, own in zip(pool.tolist(), matches(TEXT_TO_IMAGE), strict=True):
        assert {item for item in items if item >= 0} == set(range(4)) - own
