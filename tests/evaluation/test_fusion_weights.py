"""Recalls by the weight of a fusion: as an evaluation with each weight gives them."""

import pytest
from stubs import NumberMatcher, NumberSet
from torch import Tensor
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.evaluation.fusion_weights import recalls_by_weight
from lavis_dcd.matching.features import ImageFeatures, TextFeatures

FIGURES = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_sum")


class Weighing(NumberMatcher):
    """A sure cosine that is right, and a fusion that misleads it for some pictures."""

    fusion_weight = 0.7

    @override
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        cosine = (self.embed_images(images)[pairs[:, 0]] * self.embed_texts(texts)[pairs[:, 1]]).sum(dim=-1)
        wrong = -(images.tokens[pairs[:, 0], 0, 0] + 1.2 - texts.tokens[pairs[:, 1], 0, 0]).abs()
        return cosine + self.fusion_weight * wrong if self.fusion_weight else cosine


@pytest.mark.parametrize("k_test", [2, 4])
def test_each_weight_s_recalls_are_those_of_an_evaluation_with_it(k_test: int) -> None:
    matcher, numbers = Weighing(), NumberSet()
    evaluator = Evaluator(EvaluationProtocol(k_test=k_test))
    weights = [0.0, 0.05, 0.3, 1.0, 4.0]
    found = recalls_by_weight(matcher, numbers, evaluator, k_test, weights)
    assert matcher.fusion_weight == 0.7 and list(found) == weights
    assert found[0.0]["r_sum"] > found[4.0]["r_sum"]  # or nothing would be compared
    for weight in weights:
        matcher.fusion_weight = weight
        expected = evaluator.evaluate(matcher, numbers)
        assert {name: found[weight][name] for name in FIGURES} == pytest.approx({n: expected[n] for n in FIGURES})


def test_a_failed_evaluation_leaves_the_weight_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = Weighing()
    monkeypatch.setattr(matcher, "match", None)
    with pytest.raises(TypeError):
        recalls_by_weight(matcher, NumberSet(), Evaluator(EvaluationProtocol(k_test=2)), 2, [1.0])
    assert matcher.fusion_weight == 0.7


def test_a_matcher_without_such_a_weight_is_refused() -> None:
    with pytest.raises(UserError, match="NumberMatcher has no joint space beside its fusion"):
        recalls_by_weight(NumberMatcher(), NumberSet(), Evaluator(EvaluationProtocol(k_test=2)), 2, [1.0])
