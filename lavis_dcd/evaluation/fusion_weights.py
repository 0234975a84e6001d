"""Recalls of a matcher by the weight of its fusion beside its cosine, from two evaluations whatever the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from lavis_dcd.banks.encoding import EvaluationSet
from lavis_dcd.common.errors import UserError
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.evaluation.metrics import retrieval_metrics
from lavis_dcd.evaluation.shortlist import Shortlist
from lavis_dcd.matching.contract import Matcher


@runtime_checkable
class WeighsFusion(Protocol):
    """A matcher whose score is a joint space's + ``fusion_weight`` * a fusion's."""

    fusion_weight: float


def recalls_by_weight(
    matcher: Matcher, dataset: EvaluationSet, evaluator: Evaluator, k_test: int, weights: Sequence[float]
) -> dict[float, dict[str, float]]:
    """Return ``retrieval_metrics`` for each weight, with the ``k_test`` best of the joint space reranked.

    The scores are linear in the weight, so those at 0 and at 1 give all. The matcher's own weight is as before
    afterwards.

    Args:
        evaluator: of a protocol with the same ``k_test``.

    Raises:
        UserError: a matcher without such a weight.
    """
    if not isinstance(matcher, WeighsFusion) or not matcher.has_joint_space:
        raise UserError(f"{type(matcher).__name__} has no joint space beside its fusion, so no weight between them")
    own = matcher.fusion_weight
    try:
        matcher.fusion_weight = 0.0
        without = evaluator.scores(matcher, dataset)
        matcher.fusion_weight = 1.0
        whole = evaluator.scores(matcher, dataset)
    finally:
        matcher.fusion_weight = own
    shortlist = Shortlist.of(*without, k_test)
    columns = (shortlist.texts_of_image, shortlist.images_of_text)
    cheap = [table.gather(1, chosen) for table, chosen in zip(without, columns, strict=True)]
    fusion = [table.gather(1, chosen) - joint for table, chosen, joint in zip(whole, columns, cheap, strict=True)]
    found = {}
    for weight in weights:
        reranked: list[Tensor] = [joint + weight * of_fusion for joint, of_fusion in zip(cheap, fusion, strict=True)]
        tables = shortlist.tables(reranked[0], reranked[1])
        found[weight] = retrieval_metrics(*tables, dataset.txt2img, dataset.img2txt)
    return found
