"""A matcher measured on a small set, and what a pair costs it; without LAVIS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from stubs import NumberMatcher as Reader
from stubs import NumberSet as Numbers
from stubs import StubMatcher
from torch import Tensor, nn

from lavis_dcd.cli import guarded
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation import evaluator as evaluation
from lavis_dcd.evaluation.evaluator import EvaluationCache, Evaluator
from lavis_dcd.evaluation.metrics import coco_1k_five_folds, retrieval_metrics
from lavis_dcd.evaluation.shortlist import ShortlistError
from lavis_dcd.evaluation.timing import milliseconds_per_pair
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


def evaluate(matcher: Any, dataset: Any, maker: Any = None, dataset_of: Any = None, **protocol: Any) -> Any:
    return Evaluator(EvaluationProtocol(**protocol), dataset_of=dataset_of).evaluate(matcher, dataset, maker)


def test_an_evaluation_is_the_mapping_of_its_figures() -> None:
    matcher, numbers = Reader(blind=(2, 5)), Numbers()
    found = evaluate(matcher, numbers)
    assert found.scores_i2t.shape == (8, 16) and found.scores_t2i.shape == (16, 8)
    expected = retrieval_metrics(found.scores_i2t, found.scores_t2i, numbers.txt2img, numbers.img2txt)
    assert expected.items() <= dict(found).items()
    assert found["txt_r1"] == 75.0 and found["how"] == "exhaustive"
    assert found["fusion_parameters"] == 1 and found["ms_per_pair"] > 0 and found["ms_per_search"] > 0
    assert set(found) == {*expected, "fusion_parameters", "ms_per_pair", "ms_per_search", "how"}


def test_a_shortlist_spares_pairs_and_finds_the_same_matches() -> None:
    matcher, numbers = Reader(), Numbers()
    found = evaluate(matcher, numbers, k_test=3)
    assert found["r_sum"] == 600.0 and found["how"] == "shortlist k=3 (joint)"
    assert matcher.matched < 8 * 16 + 6 * 256  # fewer than all pairs, and the measurement's


def test_another_matcher_can_make_the_shortlist() -> None:
    numbers, cheap = Numbers(), Reader(blind=(0, 1, 2, 3, 4, 5, 6))
    own = evaluate(Reader(), numbers, k_test=2)
    misled = evaluate(Reader(), numbers, k_test=2, shortlist="teacher", maker=cheap)
    assert own["txt_r1"] == 100.0 and misled["txt_r1"] < 50.0
    assert misled["how"] == "shortlist k=2 (teacher)" and cheap.matched == 0


def test_a_shortlist_needs_a_joint_space_before_anything_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = Reader()
    matcher.has_joint_space = False
    monkeypatch.setattr(matcher, "encode_images", lambda images: pytest.fail("encoded"))
    with pytest.raises(ShortlistError, match="no joint space"):
        evaluate(matcher, Numbers(), k_test=2)


def test_the_1k_protocol_is_added_under_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers(10)
    monkeypatch.setattr(
        evaluation, "coco_1k_five_folds", lambda *tables: coco_1k_five_folds(*tables, images_per_fold=2)
    )
    # any other number of pictures has no such protocol
    assert "1k_r_sum" not in evaluate(Reader(), numbers, coco_1k_folds=True)
    monkeypatch.setattr(evaluation, "COCO_TEST_IMAGES", 10)
    assert evaluate(Reader(), numbers, coco_1k_folds=True)["1k_r_sum"] == 600.0


class Noisy(StubMatcher):
    """Knows a picture's number up to noise of its own; ``scale`` times it as a logit."""

    has_joint_space = True

    def __init__(self, seed: int, scale: float = 1.0, family: str = "fusion", tower: nn.Module | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        matches = torch.eye(8).repeat_interleave(2, dim=1)
        self.table = nn.Parameter(scale * (torch.randn(8, 16, generator=generator) + 1.5 * matches))
        self.cheap = torch.randn(8, 16, generator=generator) + matches
        self.family, self.tower = family, tower or nn.Linear(1, 1)
        self.encoded, self.matched = 0, set()

    def encode_images(self, images: Tensor) -> ImageFeatures:
        self.encoded += len(images)
        return ImageFeatures(images[:, :1, 0, :1])

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        rows = [2 * int(t.split()[0]) + (t.split()[1] == "here") for t in texts]
        return TextFeatures(torch.tensor(rows).float()[:, None, None])

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        rows, columns = images.tokens[pairs[:, 0], 0, 0].long(), texts.tokens[pairs[:, 1], 0, 0].long()
        self.matched |= set(zip(rows.tolist(), columns.tolist(), strict=True))
        return self.table[rows, columns]

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return self.table[images.tokens[:, 0, 0].long()][:, texts.tokens[:, 0, 0].long()]

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return self.cheap[images.tokens[:, 0, 0].long()]

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return torch.eye(16)[texts.tokens[:, 0, 0].long()]

    def encoder_modules(self) -> list[nn.Module]:
        return [self.tower]


def slow_combination(tables: list[Any], weights: list[float]) -> np.ndarray:
    """Per row: standardised, averaged, on the mean of the scales."""
    out = np.zeros(tables[0].shape)
    shares = [weight / sum(weights) for weight in weights]
    for row in range(len(out)):
        values = [np.asarray(table[row], dtype=float) for table in tables]
        average = sum(s * (v - v.mean()) / v.std() for s, v in zip(shares, values, strict=True))
        scale = sum(s * v.std() for s, v in zip(shares, values, strict=True))
        out[row] = average * scale + sum(s * v.mean() for s, v in zip(shares, values, strict=True))
    return out


def tables_of(*members: Noisy) -> list[np.ndarray]:
    return [member.table.detach().numpy() for member in members]


@pytest.mark.parametrize("families", [("fusion", "fusion"), ("fusion", "dual"), ("dual", "dual")])
def test_an_ensemble_is_the_standardised_mean_of_its_members(families: tuple[str, str]) -> None:
    numbers, weights = Numbers(), [2.0, 1.0]
    one, other = Noisy(0, family=families[0]), Noisy(1, scale=20.0, family=families[1])
    found = evaluate(Ensemble([one, other], weights), numbers)
    i2t = slow_combination(tables_of(one, other), weights)
    t2i = slow_combination([table.T for table in tables_of(one, other)], weights)
    np.testing.assert_allclose(found.scores_i2t, i2t, atol=1e-4)
    np.testing.assert_allclose(found.scores_t2i, t2i, atol=1e-4)
    expected = retrieval_metrics(i2t, t2i, numbers.txt2img, numbers.img2txt)
    assert expected.items() <= dict(found).items()
    assert found["how"] == "ensemble of 2, exhaustive" and found["ms_per_pair"] > 0
    assert found["fusion_parameters"] == 2 * 8 * 16


def test_a_dual_encoder_scores_every_pair_whatever_the_shortlist() -> None:
    matcher = Noisy(0, family="dual")
    matcher.has_joint_space = False
    found = evaluate(matcher, Numbers(), k_test=2)
    assert torch.equal(found.scores_i2t, matcher.table.detach())
    assert found["how"] == "exhaustive" and not matcher.matched
    assert evaluate(Ensemble([matcher]), Numbers(), k_test=2)["how"] == "ensemble of 1, exhaustive"


@pytest.mark.parametrize("other_family", ["fusion", "dual"])
@pytest.mark.parametrize("made_by", ["members", "another", "another ensemble"])
def test_all_members_rerank_one_shortlist(other_family: str, made_by: str) -> None:
    weights = [1.0, 3.0]
    one, other = Noisy(2), Noisy(3, scale=9.0, family=other_family)
    third, fourth = Noisy(4), Noisy(5, scale=0.01)
    fourth.cheap *= 50
    maker = {"members": None, "another": third, "another ensemble": Ensemble([third, fourth])}[made_by]
    found = evaluate(Ensemble([one, other], weights), Numbers(), k_test=3, maker=maker)
    if made_by == "another":
        cheap = [third.cheap.numpy(), third.cheap.numpy().T]
    else:
        makers, shares = ((one, other), weights) if maker is None else ((third, fourth), [1.0, 1.0])
        joint = [member.cheap.numpy() for member in makers]
        cheap = [slow_combination(tables, shares) for tables in (joint, [table.T for table in joint])]
    truth = [tables_of(one, other), [table.T for table in tables_of(one, other)]]
    wanted = set()
    for direction, scores in enumerate((found.scores_i2t.numpy(), found.scores_t2i.numpy())):
        order = np.argsort(-cheap[direction], axis=1, kind="stable")
        top = order[:, :3]
        wanted |= {(q, c) if direction == 0 else (c, q) for q, row in enumerate(top.tolist()) for c in row}
        exact = [np.take_along_axis(table, top, axis=1) for table in truth[direction]]
        reranked = np.take_along_axis(scores, top, axis=1)
        np.testing.assert_allclose(reranked, slow_combination(exact, weights), atol=1e-4)
        rest = np.take_along_axis(scores, order[:, 3:], axis=1)
        assert (np.diff(rest, axis=1) < 0).all() and (rest[:, 0] < reranked.min(1)).all()
    assert found["how"] == "ensemble of 2, shortlist k=3 (joint)"
    assert wanted <= one.matched and third.matched == set()


def test_an_ensemble_makes_the_shortlist_of_a_student() -> None:
    makers, student = [Noisy(4), Noisy(5)], Noisy(6)
    found = evaluate(student, Numbers(), k_test=4, shortlist="teacher", maker=Ensemble(makers))
    cheap = slow_combination([maker.cheap.numpy() for maker in makers], [1.0, 1.0])
    top = np.argsort(-cheap, axis=1)[:, :4]
    reranked = np.take_along_axis(found.scores_i2t.numpy(), top, axis=1)
    np.testing.assert_allclose(reranked, np.take_along_axis(student.table.detach().numpy(), top, axis=1))
    assert found["how"] == "shortlist k=4 (teacher)"


def test_a_member_without_a_joint_space_is_named_before_anything_is_encoded() -> None:
    one, other = Noisy(0), Reader()
    other.has_joint_space = False
    with pytest.raises(ShortlistError, match="NumberMatcher has no joint space"):
        evaluate(Ensemble([one, other]), Numbers(), k_test=2)
    assert one.encoded == 0
    found = evaluate(Ensemble([one, other]), Numbers(), k_test=2, maker=Noisy(1))
    assert found["how"].startswith("ensemble of 2, shortlist k=2")


@pytest.mark.parametrize("k_test", [None, 3])
def test_members_that_share_encoders_are_encoded_once(k_test: int | None) -> None:
    tower = nn.Linear(1, 1)
    one, other, apart = Noisy(0, tower=tower), Noisy(1, tower=tower), Noisy(2)
    evaluate(Ensemble([one, apart, other]), Numbers(), k_test=k_test)
    size_probe = 1  # the storage is chosen by a sample
    assert (one.encoded, other.encoded, apart.encoded) == (8 + size_probe, 0, 8 + size_probe)


class Shifted(Numbers):
    """The same pictures as a matcher sees them that counts from seven down."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((3, 2, 2), float(7 - index)), "index": index}


def test_every_matcher_reads_the_set_through_its_own_view() -> None:
    tower = nn.Linear(1, 1)
    upright, turned, cheap = Noisy(0, tower=tower), Noisy(1, tower=tower), Noisy(2, tower=tower)
    views = {id(upright): Numbers(), id(turned): Shifted(), id(cheap): Shifted()}

    def dataset_of(matcher: Matcher, dataset: Numbers) -> Numbers:
        return views[id(matcher)]

    both = evaluate(Ensemble([upright, turned]), Numbers(), dataset_of=dataset_of)
    tables = [upright.table.detach().numpy(), turned.table.detach().numpy()[::-1]]
    np.testing.assert_allclose(both.scores_i2t, slow_combination(tables, [1.0, 1.0]), atol=1e-4)
    # equal encoders, but other pictures: each is encoded for itself, the shortlist's maker too
    found = evaluate(upright, Numbers(), k_test=2, maker=cheap, dataset_of=dataset_of)
    top = cheap.cheap.flip(0).topk(2, dim=1).indices
    torch.testing.assert_close(found.scores_i2t.gather(1, top), upright.table.detach().gather(1, top))


def test_the_protocol_of_a_run_section() -> None:
    @dataclass
    class Run:
        k_test: int | None = None
        batch_size_eval: int = 7
        amp: str = "bf16"
        match_memory_mb: float = 5
        eval_memory_mb: float = 6

    assert EvaluationProtocol.of_run(Run()) == EvaluationProtocol(
        batch_size=7, amp="bf16", memory_mb=5, eval_memory_mb=6
    )
    assert EvaluationProtocol.of_run({"k_test": 4, "amp": False, "other": 1}) == EvaluationProtocol(k_test=4)
    assert EvaluationProtocol.of_run(None) == EvaluationProtocol()


def test_the_scores_alone_are_those_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher, numbers = Noisy(0), Numbers()
    for protocol in (EvaluationProtocol(), EvaluationProtocol(k_test=3)):
        expected = Evaluator(protocol).evaluate(matcher, numbers)
        with monkeypatch.context() as patch:
            for name in ("milliseconds_per_pair", "milliseconds_to_match", "milliseconds_to_embed_and_compare"):
                patch.setattr(evaluation, name, lambda *_: pytest.fail("timed"))
            scores = Evaluator(protocol).scores(matcher, numbers)
        assert torch.equal(scores[0], expected.scores_i2t) and torch.equal(scores[1], expected.scores_t2i)


def test_an_evaluation_serves_until_the_weights_or_the_set_change() -> None:
    matcher, numbers, cache = Reader(), Numbers(), EvaluationCache()
    result = evaluate(matcher, numbers)
    cache.put(matcher, numbers, result)
    assert cache.get(matcher, numbers) is result
    assert cache.get(matcher, Numbers()) is None and cache.get(Reader(), numbers) is None
    with torch.no_grad():
        matcher.weight.mul_(2)
    assert cache.get(matcher, numbers) is None
    cache.put(matcher, numbers, result)
    cache.drop(matcher)
    assert cache.get(matcher, numbers) is None


# -- the measurement of a pair's cost: what is called, how often; never how long it took


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


@pytest.mark.parametrize("k_test", [None, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_one_line(
    k_test: int | None, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose training has diverged: its scores are no bug of the program."""

    class Diverged(Reader):
        def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
            return super().match(images, texts, pairs) * value

    assert guarded(lambda: evaluate(Diverged(), Numbers(), k_test=k_test) and None) == 2
    line = capsys.readouterr().err
    assert "scores are not finite numbers; the weights hold NaN" in line and line.count("\n") == 1
