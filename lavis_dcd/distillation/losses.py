"""Losses per query: scores ``[Q, 1+K]`` in, unreduced rows ``[Q]`` out, which ``reduce_rows`` weighs and sums.

Masked entries never contribute, whatever they hold, and a row whose match (column 0) is masked is 0. All of
it is computed in float32 at least, whatever precision the scores arrive in.

The changes of a query's scores that leave its row as it is, on the teacher's side and on the student's (shift: a
constant added; scale: a factor above 0; monotone: any map that keeps the order):

    term         teacher                 student
    mse          -                       -
    kl           shift                   shift
    margin_mse   shift                   shift
    ranknet      shift, scale, monotone  shift
    pearson      shift, scale            shift, scale
    bce                                  -
    listwise_ce                          shift

``objective.loss_defaults`` chooses by that table: across families, terms that compare no scale with another's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor
from typing_extensions import override

# Keeps the direction of a student that scores all candidates alike finite.
_LEAST_NORM = 1e-6

# Fills masked scores before a softmax: finite, so that no inf - inf arises, and far below any score.
_FILL = -1e30


class DistillLoss(Protocol):
    """A term of the teacher's and the student's scores."""

    def __call__(self, teacher_scores: Tensor, student_scores: Tensor, valid: Tensor) -> Tensor:
        """Return the unreduced term of every query, float ``[Q]``.

        Args:
            teacher_scores: float ``[Q, 1+K]``.
            student_scores: float ``[Q, 1+K]``.
            valid: bool ``[Q, 1+K]``.

        Raises:
            ValueError: where the shapes differ.
        """


class ContrastiveLoss(Protocol):
    """A term of the student's scores alone, the match in column 0."""

    def __call__(self, student_scores: Tensor, valid: Tensor) -> Tensor:
        """Return the unreduced term of every query, float ``[Q]``.

        Args:
            student_scores: float ``[Q, 1+K]``.
            valid: bool ``[Q, 1+K]``.

        Raises:
            ValueError: where the shapes differ.
        """


@dataclass(frozen=True)
class MeanSquaredError(DistillLoss):
    """mean_c (t_c - s_c)^2 over the valid candidates: the paper's term, in which a temperature cancels."""

    @override
    def __call__(self, teacher_scores: Tensor, student_scores: Tensor, valid: Tensor) -> Tensor:
        teacher, student, valid = prepare(valid, teacher_scores, student_scores)
        return _row_mean((teacher - student).square(), valid)


@dataclass(frozen=True)
class KullbackLeibler(DistillLoss):
    """T^2 * KL(softmax(t/T) || softmax(s/T)) over the valid candidates: blind to a shift of either side.

    A candidate that stands for n of them counts n times in both sums.

    Raises:
        ValueError: when temperature <= 0.
    """

    temperature: float = 1.0
    reweighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @override
    def __call__(
        self, teacher_scores: Tensor, student_scores: Tensor, valid: Tensor, log_counts: Tensor | None = None
    ) -> Tensor:
        teacher, student, valid = prepare(valid, teacher_scores, student_scores)
        target = masked_log_softmax(_counted(teacher / self.temperature, log_counts), valid)
        output = masked_log_softmax(_counted(student / self.temperature, log_counts), valid)
        return self.temperature**2 * (target.exp() * (target - output) * valid).sum(dim=1)


@dataclass(frozen=True)
class MarginMeanSquaredError(DistillLoss):
    """mean over the valid negatives of ((t_0 - t_c) - (s_0 - s_c))^2: gaps to the match, no common zero.

    Both sides need one scale; ``pearson`` is the squared error that does not.
    """

    @override
    def __call__(self, teacher_scores: Tensor, student_scores: Tensor, valid: Tensor) -> Tensor:
        teacher, student, valid = prepare(valid, teacher_scores, student_scores)
        gaps = (teacher[:, :1] - teacher[:, 1:]) - (student[:, :1] - student[:, 1:])
        return _row_mean(gaps.square(), valid[:, 1:])


@dataclass(frozen=True)
class RankNet(DistillLoss):
    """mean over pairs that the teacher orders (t_i > t_j, both valid) of softplus(s_j - s_i).

    Of the teacher only the order counts; the student's scale decides how sharply. Memory Q x (1+K)^2.
    """

    @override
    def __call__(self, teacher_scores: Tensor, student_scores: Tensor, valid: Tensor) -> Tensor:
        teacher, student, valid = prepare(valid, teacher_scores, student_scores)
        ordered = (teacher[:, :, None] > teacher[:, None, :]) & valid[:, :, None] & valid[:, None, :]
        violation = nnf.softplus(student[:, None, :] - student[:, :, None])
        return _row_mean(violation.flatten(1), ordered.flatten(1))


@dataclass(frozen=True)
class PearsonDistance(DistillLoss):
    """1 - Pearson's correlation of t and s over the valid candidates, in [0, 2]; after DIST (arXiv 2205.10536).

    Half the mean squared error of both sides' standardised scores, so blind to shift and scale of either. Rows with
    one valid entry, or that the teacher scores alike, are 0.
    """

    @override
    def __call__(self, teacher_scores: Tensor, student_scores: Tensor, valid: Tensor) -> Tensor:
        teacher, student, valid = prepare(valid, teacher_scores, student_scores)
        teacher, student = (_direction(item, valid) for item in (teacher, student))
        known = teacher.any(dim=1)
        return torch.where(known, 1 - (teacher * student).sum(dim=1), 0.0)


@dataclass(frozen=True)
class BinaryCrossEntropy(ContrastiveLoss):
    """mean over the valid candidates of BCEWithLogits(s, [1, 0, ..., 0]): the paper's contrastive term.

    It wants logits: 0 is where a match becomes likely.
    """

    @override
    def __call__(self, student_scores: Tensor, valid: Tensor) -> Tensor:
        student, valid = prepare(valid, student_scores)
        target = torch.zeros_like(student)
        target[:, 0] = 1
        return _row_mean(nnf.binary_cross_entropy_with_logits(student, target, reduction="none"), valid)


@dataclass(frozen=True)
class ListwiseCrossEntropy(ContrastiveLoss):
    """-log softmax(s)_0 over the valid candidates: blind to a shift.

    A candidate that stands for n of them counts n times in the sum.
    """

    reweighs: ClassVar[bool] = True

    @override
    def __call__(self, student_scores: Tensor, valid: Tensor, log_counts: Tensor | None = None) -> Tensor:
        student, valid = prepare(valid, student_scores)
        return match_cross_entropy(_counted(student, log_counts), valid)


# Classes, built with the fields of ``objective.LossConfig`` that they declare (a dataclass field ``temperature``
# receives it).
DISTILL_LOSSES: dict[str, Callable[..., DistillLoss]] = {
    "mse": MeanSquaredError,
    "kl": KullbackLeibler,
    "margin_mse": MarginMeanSquaredError,
    "ranknet": RankNet,
    "pearson": PearsonDistance,
}
CONTRASTIVE_LOSSES: dict[str, Callable[..., ContrastiveLoss]] = {
    "bce": BinaryCrossEntropy,
    "listwise_ce": ListwiseCrossEntropy,
}


def reduce_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Return sum_q weights_q * rows_q, 0-dim: the one reduction, without broadcasting, so no weight can cancel.

    Raises:
        ValueError: naming both shapes, unless both are one-dimensional and of one length.
    """
    if rows.dim() != 1 or rows.shape != weights.shape:
        shapes = f"rows {tuple(rows.shape)} and weights {tuple(weights.shape)}"
        raise ValueError(f"rows and weights must both be [Q], got {shapes}")
    return (rows * weights).sum()


def prepare(valid: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
    """Return each of ``scores`` in float32 with masked entries at 0, then ``valid`` with unmatched rows off.

    float64 stays float64, for checks of gradients.

    Raises:
        ValueError: naming the shapes, unless all are ``[Q, 1+K]``.
    """
    shapes = [tuple(item.shape) for item in scores]
    if valid.dim() != 2 or any(shape != tuple(valid.shape) for shape in shapes):
        raise ValueError(f"scores and valid must share one shape [Q, 1+K], got {shapes} and valid {tuple(valid.shape)}")
    valid = valid & valid[:, :1]
    # where, not a product: 0 * nan is nan, and so is its gradient
    return *(torch.where(valid, full_precision(item), 0.0) for item in scores), valid


def full_precision(scores: Tensor) -> Tensor:
    """Return the scores in float32; float64 stays as it is."""
    return scores if scores.dtype == torch.float64 else scores.float()


def masked_log_softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """Return log softmax over the valid entries of each row, 0 at masked ones. Finite for any finite scores."""
    return torch.where(valid, nnf.log_softmax(scores.masked_fill(~valid, _FILL), dim=1), 0.0)


def _counted(scores: Tensor, log_counts: Tensor | None) -> Tensor:
    return scores if log_counts is None else scores + log_counts


def match_cross_entropy(scores: Tensor, valid: Tensor) -> Tensor:
    """-log softmax(scores)_0 per row ``[Q]``; 0 where the match is masked."""
    return -masked_log_softmax(scores, valid)[:, 0]


def _direction(scores: Tensor, valid: Tensor) -> Tensor:
    """Each row's valid scores less their mean, as a unit vector; 0 where they are all equal."""
    # gaps to the match first: equal scores then have a mean of exactly 0
    scores = torch.where(valid, scores - scores[:, :1], 0.0)
    mean = scores.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp_min(1)
    return nnf.normalize(torch.where(valid, scores - mean, 0.0), dim=1, eps=_LEAST_NORM)


def _row_mean(values: Tensor, valid: Tensor) -> Tensor:
    return (values * valid).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
