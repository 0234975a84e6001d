"""Scores of a whole set against plain loops over single pairs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from lavis_dcd.banks.encoding import Storage, device_of, encode_captions, encode_dataset, scoring_mode
from lavis_dcd.banks.row_store import RowSource, Spill, StreamedFeatures
from lavis_dcd.common.errors import UserError
from lavis_dcd.evaluation.shortlist import Shortlist, score_dataset, score_exhaustive, score_joint, score_shortlist
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures

F = TypeVar("F", bound=Features)


class Toy(nn.Module, Matcher):
    """Scores the masked mean of the text's tokens against the mean of the picture's."""

    has_joint_space = True

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.matched: list[tuple[float, float]] = []

    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(images.flatten(2).transpose(1, 2)[:, :, :1].repeat(1, 1, 4) * torch.arange(1, 5))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        length = max(len(t) for t in texts)
        codes = torch.tensor([[ord(c) % 7 for c in t.ljust(length, "~")] for t in texts]).float()
        mask = torch.tensor([[i < len(t) for i in range(length)] for t in texts])
        return TextFeatures(self.dropout(codes[:, :, None] * torch.tensor([1.0, -1.0, 0.5, 0.1])), mask)

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        i, t = images[pairs[:, 0]], texts[pairs[:, 1]]
        self.matched += list(zip(i.tokens.sum((1, 2)).tolist(), t.tokens.sum((1, 2)).tolist(), strict=True))
        weights = t.mask.float() / t.mask.sum(1, keepdim=True)
        mean = (t.tokens * weights[:, :, None]).sum(1)
        return (self.project(i.tokens.mean(1)) * mean).sum(1) + mean[:, 0] ** 2

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return nn.functional.normalize(images.tokens.mean(1), dim=1)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return nn.functional.normalize(texts.tokens.mean(1), dim=1)


def features(images: int = 7, texts: int = 11, seed: int = 0) -> tuple[ImageFeatures, TextFeatures]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (texts,), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    return (
        ImageFeatures(torch.randn(images, 3, 4, generator=generator)),
        TextFeatures(torch.randn(texts, 5, 4, generator=generator), mask),
    )


@torch.no_grad()
def one_by_one(matcher: Toy, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    rows = [
        [float(matcher.match(images[[i]], texts[[t]], torch.tensor([[0, 0]]))) for t in range(len(texts))]
        for i in range(len(images))
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("memory_mb", [0.0, 0.0005, 512])
def test_exhaustive_equals_one_pair_at_a_time(memory_mb: float) -> None:
    matcher, (images, texts) = Toy(), features()
    expected = one_by_one(matcher, images, texts)
    matcher.matched.clear()
    got = score_exhaustive(matcher, images, texts, memory_mb)
    assert torch.allclose(got, expected, atol=1e-6)
    assert not got.requires_grad and len(matcher.matched) == 7 * 11


def test_exhaustive_takes_texts_without_a_mask_and_half_precision_rows() -> None:
    matcher, (images, texts) = Toy(), features()
    full = TextFeatures(texts.tokens, torch.ones_like(texts.mask))
    halved = score_exhaustive(matcher, images.to(dtype=torch.float16), full.to(dtype=torch.float16))
    assert halved.dtype == torch.float32
    assert torch.allclose(halved, score_exhaustive(matcher, images, full), atol=2e-2)


@pytest.mark.parametrize("k_test", [11, 100])
def test_a_shortlist_of_everything_is_the_exhaustive_matrix(k_test: int) -> None:
    matcher, (images, texts) = Toy(), features()
    scores_i2t, scores_t2i = score_shortlist(matcher, images, texts, torch.randn(7, 11), k_test)
    expected = score_exhaustive(matcher, images, texts)
    assert torch.allclose(scores_i2t, expected, atol=1e-6)
    assert torch.equal(scores_t2i, scores_i2t.T)


@pytest.mark.parametrize("memory_mb", [0.0005, 512])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_shortlist_is_reranked_and_the_rest_stays_below_in_its_cheap_order(memory_mb: float, scale: float) -> None:
    matcher, (images, texts) = Toy(), features(6, 40)
    matcher.project.weight.data *= scale
    joint = score_joint(matcher, images, texts)
    joint[:, 5] = joint[:, 6]  # a tie must stay a tie
    exact = score_exhaustive(matcher, images, texts)
    both = score_shortlist(matcher, images, texts, joint, 4, memory_mb)
    for scores, cheap, truth in ((both[0], joint, exact), (both[1], joint.T, exact.T)):
        assert torch.isfinite(scores).all()
        for row, cheap_row, true_row in zip(scores, cheap, truth, strict=True):
            order = sorted(range(len(row)), key=lambda c: (-float(cheap_row[c]), c))
            top, rest = order[:4], order[4:]
            assert torch.allclose(row[top], true_row[top], rtol=1e-4, atol=1e-5)
            if not rest:
                continue
            assert row[rest].max() < row[top].min()
            for better, worse in pairwise(rest):
                if cheap_row[better] == cheap_row[worse]:
                    assert row[better] == row[worse]
                else:
                    assert row[better] > row[worse]


@pytest.mark.parametrize("memory_mb", [0.001, 512])
def test_a_pair_that_both_directions_want_is_matched_once(memory_mb: float) -> None:
    matcher, (images, texts) = Toy(), features(8, 9)
    score_shortlist(matcher, images, texts, torch.randn(8, 9), 5, memory_mb)
    assert len(matcher.matched) == len(set(matcher.matched)) < 8 * 5 + 9 * 5


def test_faults_of_a_shortlist() -> None:
    matcher, (images, texts) = Toy(), features()
    with pytest.raises(UserError, match=r"run\.k_test: 0"):
        score_shortlist(matcher, images, texts, torch.zeros(7, 11), 0)
    with pytest.raises(ValueError, match=r"\(11, 7\)"):
        score_shortlist(matcher, images, texts, torch.zeros(11, 7), 3)
    matcher.has_joint_space = False
    with pytest.raises(UserError, match="no joint space"):
        score_joint(matcher, images, texts)


def test_scores_that_are_no_numbers_are_refused() -> None:
    matcher, (images, texts) = Toy(), features()
    matcher.project.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="77 of 77 scores"):
        score_exhaustive(matcher, images, texts)


class Dual(Toy):
    """Ten times the cosine of the joint space; counts the items that it embeds."""

    family = "dual"

    def __init__(self) -> None:
        super().__init__()
        self.embedded = 0

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        here, there = self.embed_images(images)[pairs[:, 0]], self.embed_texts(texts)[pairs[:, 1]]
        return 10 * (self.project.weight[0, 0].abs() + 1) * (here * there).sum(1)

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        self.embedded += len(images) + len(texts)
        return 10 * (self.project.weight[0, 0].abs() + 1) * self.embed_images(images) @ self.embed_texts(texts).T

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return nn.functional.normalize((texts.tokens * texts.full_mask()[..., None]).sum(1), dim=1)


@pytest.mark.parametrize("memory_mb", [0.0, 0.001, 512])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_dual_encoder_scores_blocks_by_products_in_full_precision(memory_mb: float, amp: str) -> None:
    matcher, (images, texts) = Dual(), features()
    expected = one_by_one(matcher, images, texts)
    got = score_exhaustive(matcher, images, texts, memory_mb, amp=amp)
    assert torch.allclose(got, expected, atol=1e-5) and not got.requires_grad
    if memory_mb == 512:
        assert matcher.embedded == 7 + 11


def test_a_dual_encoder_is_reranked_by_products_too() -> None:
    matcher, (images, texts) = Dual(), features()
    exact, cheap = one_by_one(matcher, images, texts), torch.randn(7, 11)
    shortlist = Shortlist.of(cheap, cheap.T, 3)
    matcher.match = None  # type: ignore[assignment]
    i2t, t2i = shortlist.rerank(matcher, images, texts)
    for row in range(7):
        best = cheap[row].topk(3).indices
        assert shortlist.texts_of_image[row].tolist() == best.tolist()
        assert torch.allclose(i2t[row], exact[row, best], atol=1e-5)
    for column in range(11):
        best = cheap[:, column].topk(3).indices
        assert torch.allclose(t2i[column], exact[best, column], atol=1e-5)


def test_each_direction_may_have_cheap_scores_of_its_own() -> None:
    matcher, (images, texts) = Toy(), features()
    exact = one_by_one(matcher, images, texts)
    generator = torch.Generator().manual_seed(3)
    for_pictures, for_texts = torch.randn(7, 11, generator=generator), torch.randn(11, 7, generator=generator)
    shortlist = Shortlist.of(for_pictures, for_texts, 2)
    tables = shortlist.tables(*shortlist.rerank(matcher, images, texts))
    for scores, cheap, truth in zip(tables, (for_pictures, for_texts), (exact, exact.T), strict=True):
        for row, cheap_row, true_row in zip(scores, cheap, truth, strict=True):
            order = cheap_row.argsort(descending=True)
            assert torch.allclose(row[order[:2]], true_row[order[:2]], atol=1e-5)
            assert row[order[2:]].max() < row[order[:2]].min()
            assert row[order[2:]].argsort(descending=True).tolist() == list(range(len(order) - 2))


@pytest.mark.parametrize("one", [True, False])
def test_tables_may_take_the_place_of_the_cheap_scores(one: bool) -> None:
    matcher, (images, texts) = Toy(), features()
    cheap = torch.randn(7, 11)
    kept = Shortlist.of(cheap, cheap.T, 2)
    reranked = kept.rerank(matcher, images, texts)
    expected = kept.tables(*reranked)
    assert torch.equal(kept.cheap_i2t, cheap)
    own = cheap.clone()
    lost = Shortlist.of(own, own.T if one else own.T.clone(), 2)
    found = lost.tables(*reranked, in_place=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert found[0].data_ptr() == own.data_ptr()
    assert (found[1].data_ptr() == lost.cheap_t2i.data_ptr()) is not one


def streamed(features: F, folder: Path, block_bytes: int) -> StreamedFeatures[F]:
    rows = Spill(folder, block_bytes).rows(len(features))
    rows.put(torch.arange(len(features)), features)
    return rows.all()


@pytest.mark.parametrize("which", ["images", "texts", "both"])
@pytest.mark.parametrize("memory_mb", [0.0005, 512])
@pytest.mark.parametrize("dual", [True, False])
def test_features_on_disk_give_the_same_scores_to_the_bit(
    which: str, memory_mb: float, dual: bool, tmp_path: Path
) -> None:
    matcher, (images, texts) = Dual() if dual else Toy(), features(13, 17)
    block = 3 * images.nbytes // 13  # three pictures
    here = images if which == "texts" else streamed(images, tmp_path, block)
    there = texts if which == "images" else streamed(texts, tmp_path, block)
    expected = score_exhaustive(matcher, images, texts, memory_mb)
    assert torch.equal(score_exhaustive(matcher, here, there, memory_mb), expected)
    joint = score_joint(matcher, images, texts, memory_mb=memory_mb)
    assert torch.equal(score_joint(matcher, here, there, memory_mb=memory_mb), joint)
    in_memory = score_shortlist(matcher, images, texts, joint, 4, memory_mb)
    on_disk = score_shortlist(matcher, here, there, joint, 4, memory_mb)
    assert all(torch.equal(one, other) for one, other in zip(in_memory, on_disk, strict=True))


def test_the_disk_is_read_few_times(tmp_path: Path) -> None:
    """Pictures once; texts once for every block of pictures that stands in memory."""
    images, texts = features(13, 17)
    read: list[int] = []

    class Counted:
        def __init__(self, source: RowSource) -> None:
            self.source = source

        def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
            read.append(len(rows))
            self.source.read(rows, tokens, embeds)

    block = 6 * images.nbytes // 13
    here, there = (
        replace(found, source=Counted(found.source))
        for found in (streamed(images, tmp_path, block), streamed(texts, tmp_path, block))
    )
    score_exhaustive(Toy(), here, texts, 0.0005)  # blocks of one picture or two
    assert sum(read) == 13 and len(read) <= 4
    read.clear()
    score_exhaustive(Toy(), images, there, 0.0005)
    assert sum(read) == 17
    read.clear()
    score_exhaustive(Toy(), here, there, 0.0005)
    assert sum(read) <= 13 + 4 * 17


def test_pictures_with_several_vectors_are_multiplied_a_few_at_a_time() -> None:
    class Queries(Toy):
        rows_at_once = 0

        def embed_images(self, images: ImageFeatures) -> Tensor:
            return nn.functional.normalize(images.tokens, dim=2)

        def joint_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
            assert not torch.is_autocast_enabled("cpu")
            self.rows_at_once = max(self.rows_at_once, len(image_embeds))
            return torch.einsum("ind,td->int", image_embeds, text_embeds).amax(1)

    matcher, (images, texts) = Queries(), features()
    got = score_joint(matcher, images, texts, rows=6, amp="bf16")
    assert matcher.rows_at_once == 2  # of three vectors each
    expected = [[max(float(v @ t) for v in image) for t in matcher.embed_texts(texts)]
                for image in matcher.embed_images(images)]  # fmt: skip
    assert torch.allclose(got, torch.tensor(expected), atol=1e-5)


def test_joint_scores_are_cosines() -> None:
    matcher, (images, texts) = Toy(), features()
    means = images.tokens.mean(1), texts.tokens.mean(1)
    cosine = nn.functional.cosine_similarity(means[0][:, None], means[1][None], dim=2)
    assert torch.allclose(score_joint(matcher, images, texts, rows=3), cosine, atol=1e-6)


class Scenes(torch.utils.data.Dataset):
    """Two pictures with two captions each."""

    def __init__(self) -> None:
        self.text = ["a red ball", "ball", "two boxes on the grass", "boxes"]
        self.pictures = torch.randn(2, 3, 2, 2)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": self.pictures[index], "index": index}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_data_set_is_encoded_in_its_own_order_in_eval_mode(batch_size: int) -> None:
    matcher, scenes = Toy(), Scenes()
    images, texts = encode_dataset(matcher, scenes, batch_size)
    matcher.eval()
    assert torch.equal(images.tokens, matcher.encode_images(scenes.pictures).tokens)
    expected = matcher.encode_texts(scenes.text)
    assert torch.equal(texts.mask, expected.mask)
    assert torch.equal(texts.tokens * texts.mask[..., None], expected.tokens * expected.mask[..., None])
    halved = encode_dataset(matcher, scenes, storage=Storage.half_on_host())[0]
    assert halved.tokens.dtype == torch.float16 and halved.device.type == "cpu"


def test_a_data_set_scored_as_a_whole() -> None:
    matcher, scenes = Toy().eval(), Scenes()
    expected = score_exhaustive(matcher, *encode_dataset(matcher, scenes))
    for k_test in (None, 4):
        scores_i2t, scores_t2i = score_dataset(matcher, scenes, k_test=k_test, batch_size=1)
        assert torch.allclose(scores_i2t, expected, atol=1e-6)
        assert torch.allclose(scores_t2i, expected.T, atol=1e-6)


def test_a_dual_encoder_scores_a_whole_set_whatever_the_shortlist() -> None:
    matcher, scenes = Dual().eval(), Scenes()
    scores_i2t, scores_t2i = score_dataset(matcher, scenes, k_test=1)
    assert torch.equal(scores_i2t, score_exhaustive(matcher, *encode_dataset(matcher, scenes)))
    assert torch.equal(scores_t2i, scores_i2t.T)


def test_an_empty_data_set_is_the_users_fault() -> None:
    scenes = Scenes()
    scenes.text = []
    with pytest.raises(UserError, match="Scenes has no pictures or no captions"):
        encode_dataset(Toy(), scenes)


def test_training_flags_come_back_one_by_one_even_after_an_error() -> None:
    matcher = Toy().train()
    matcher.dropout.eval()
    with pytest.raises(RuntimeError, match="in the middle"), scoring_mode(matcher):
        assert not matcher.training and not torch.is_grad_enabled()
        raise RuntimeError("in the middle")
    assert matcher.training and not matcher.dropout.training and matcher.project.training
    assert torch.is_grad_enabled()


def test_autocast_by_name() -> None:
    matcher = Toy()
    with scoring_mode(matcher, "bf16"):
        assert matcher.project(torch.ones(1, 4)).dtype == torch.bfloat16
    with pytest.raises(UserError, match="int8"), scoring_mode(matcher, "int8"):
        pass
    assert device_of(nn.Identity()) == torch.device("cpu")


def test_features_made_for_scoring_can_serve_training() -> None:
    matcher = Toy()
    texts = encode_captions(matcher, ["ball", "a box"])
    images, _ = features(2)
    matcher.match(images, texts, torch.tensor([[0, 0], [1, 1]])).sum().backward()
    assert matcher.project.weight.grad is not None
