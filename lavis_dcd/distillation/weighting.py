"""Weights of the queries in the distillation term and in the contrastive term.

Every weighting returns two vectors ``[Q]`` that are non-negative and sum to 1 over the rows that have a match
(all zeros when none has), so ``uniform`` is 1/Q and one weighting can replace another at the same alpha and
learning rate. No gradient flows through them: the published WSL detaches its weights too (``wsl_grad`` of the
golden values agrees with nothing else).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lavis_dcd.distillation.losses import masked_log_softmax, match_cross_entropy, prepare


@dataclass(frozen=True)
class RowWeights:
    """Float ``[Q]`` each: the rows' weights in the distillation and in the contrastive term."""

    distill: Tensor
    contrastive: Tensor


class Weighting(Protocol):
    """The weights of a batch's queries; ``needs_teacher`` is False where the teacher's scores may be None.

    One that compares the match with the rest says so by ``needs_match = True``, see :func:`needs_match`.
    """

    needs_teacher: ClassVar[bool]

    def __call__(self, teacher_scores: Tensor | None, student_scores: Tensor, valid: Tensor) -> RowWeights:
        """Return the weights of the queries, without gradients.

        Args:
            teacher_scores: float ``[Q, 1+K]``, the match in column 0; None unless needed.
            student_scores: float ``[Q, 1+K]``.
            valid: bool ``[Q, 1+K]``.

        Raises:
            ValueError: where the shapes differ, or the teacher's scores are needed and None.
        """


@dataclass(frozen=True)
class EntropyShare(Weighting):
    """The paper's: contrastive share_q = H_q / sum_j H_j, distillation softmax_q((1 - share_q)^gamma)."""

    gamma: float = 2.0
    needs_teacher: ClassVar[bool] = True

    @override
    @torch.no_grad()
    def __call__(self, teacher_scores: Tensor | None, student_scores: Tensor, valid: Tensor) -> RowWeights:
        teacher, valid = prepare(valid, known(teacher_scores))
        share = normalise(row_entropy(teacher, valid), valid)
        sureness = ((1 - share) ** self.gamma).masked_fill(~valid[:, 0], float("-inf"))
        # nan_to_num: a batch without a single match has no row to share the weight
        return RowWeights(torch.softmax(sureness, dim=0).nan_to_num(0.0), share)


@dataclass(frozen=True)
class EntropyNormalised(Weighting):
    """h_q = H_q / log(valid candidates) in [0, 1]: distillation ~ (1 - h)^gamma, contrastive ~ max(h, floor).

    Unlike the share, h does not depend on the batch's other queries and does not shrink as the batch grows.
    """

    gamma: float = 2.0
    entropy_floor: float = 0.0
    needs_teacher: ClassVar[bool] = True

    @override
    @torch.no_grad()
    def __call__(self, teacher_scores: Tensor | None, student_scores: Tensor, valid: Tensor) -> RowWeights:
        teacher, valid = prepare(valid, known(teacher_scores))
        most = valid.sum(dim=1).clamp_min(2).to(teacher.dtype).log()
        doubt = (row_entropy(teacher, valid) / most).clamp(0, 1)
        return _by_doubt(doubt, self.gamma, self.entropy_floor, valid)


@dataclass(frozen=True)
class ConfidenceGap(Weighting):
    """g_q = sigmoid(t_match - hardest negative's t): distillation ~ g^gamma, contrastive ~ max(1 - g, floor).

    Entropy cannot tell a teacher that is sure and right from one that is sure and wrong; the gap can.
    """

    gamma: float = 2.0
    entropy_floor: float = 0.0
    needs_teacher: ClassVar[bool] = True
    needs_match: ClassVar[bool] = True

    @override
    @torch.no_grad()
    def __call__(self, teacher_scores: Tensor | None, student_scores: Tensor, valid: Tensor) -> RowWeights:
        teacher, valid = prepare(valid, known(teacher_scores))
        rivals = teacher.masked_fill(~valid, float("-inf"))
        rivals[:, 0] = float("-inf")
        doubt = torch.sigmoid(rivals.amax(dim=1) - teacher[:, 0])  # no negative at all: no doubt
        return _by_doubt(doubt, self.gamma, self.entropy_floor, valid)


@dataclass(frozen=True)
class WeightedSoftLabels(Weighting):
    """WSL: distillation ~ 1 - exp(-CE_student / CE_teacher), here scaled to sum 1; contrastive uniform.

    The published code leaves the mean of the weights in, so that distillation fades as the student improves:
    ``reference: release`` has that.
    """

    needs_teacher: ClassVar[bool] = True
    needs_match: ClassVar[bool] = True

    @override
    @torch.no_grad()
    def __call__(self, teacher_scores: Tensor | None, student_scores: Tensor, valid: Tensor) -> RowWeights:
        raw = soft_label_weights(known(teacher_scores), student_scores, valid)
        return RowWeights(normalise(raw, valid), normalise(torch.ones_like(raw), valid))


@dataclass(frozen=True)
class Uniform(Weighting):
    """1/Q for every row of both terms."""

    needs_teacher: ClassVar[bool] = False

    @override
    @torch.no_grad()
    def __call__(self, teacher_scores: Tensor | None, student_scores: Tensor, valid: Tensor) -> RowWeights:
        student, valid = prepare(valid, student_scores)
        share = normalise(torch.ones_like(student[:, 0]), valid)
        return RowWeights(share, share)


# Classes, built with the fields of ``objective.LossConfig`` that they declare.
WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "entropy_share": EntropyShare,
    "entropy_normalised": EntropyNormalised,
    "confidence_gap": ConfidenceGap,
    "wsl": WeightedSoftLabels,
    "uniform": Uniform,
}


def needs_match(weighting: Any) -> bool:
    """Return whether a registered weighting (a class, or one built) reads which candidate truly is the match."""
    return bool(getattr(weighting, "needs_match", False))


def known(teacher_scores: Tensor | None) -> Tensor:
    """Return the scores.

    Raises:
        ValueError: they are None.
    """
    if teacher_scores is None:
        raise ValueError("this weighting needs teacher_scores, got None")
    return teacher_scores


@torch.no_grad()
def soft_label_weights(teacher_scores: Tensor, student_scores: Tensor, valid: Tensor) -> Tensor:
    """Return WSL's unnormalised weights ``[Q]`` in [0, 1]: 1 - exp(-CE_student / CE_teacher); 0 without a match."""
    teacher, student, valid = prepare(valid, teacher_scores, student_scores)
    ratio = match_cross_entropy(student, valid) / (match_cross_entropy(teacher, valid) + 1e-7)
    return -torch.expm1(-ratio)


def row_entropy(scores: Tensor, valid: Tensor) -> Tensor:
    """Return the entropy ``[Q]``, in nats, of the softmax over each row's valid entries."""
    log_p = masked_log_softmax(scores, valid)
    return -(log_p.exp() * log_p).sum(dim=1)


def normalise(raw: Tensor, valid: Tensor) -> Tensor:
    """Return ``raw [Q]``, 0 or more, scaled to sum 1 over the rows with a match; uniform over those if all are 0."""
    alive = valid[:, 0].to(raw.dtype)
    raw = raw * alive
    total = raw.sum()
    even = alive / alive.sum().clamp_min(1)
    # compared with 0 so that a nan score stays visible
    return torch.where(total == 0, even, raw / total.clamp_min(torch.finfo(raw.dtype).tiny))


def _by_doubt(doubt: Tensor, gamma: float, floor: float, valid: Tensor) -> RowWeights:
    return RowWeights(normalise((1 - doubt) ** gamma, valid), normalise(doubt.clamp_min(floor), valid))
