"""Several teachers as one: tables of scores [Q, N] standardised per query, averaged with weights.

Teachers score on scales of their own (a fusion model's logit, a cosine times a learned scale). Standardised per
query, each has an equal say; the common scale given back at the end keeps a softmax over the result usable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import BoolTensor, Tensor

from lavis_dcd.distillation.losses import full_precision


@torch.no_grad()
def standardise(scores: Tensor, valid: BoolTensor) -> Tensor:
    """Mean 0 and (population) standard deviation 1 over each query's valid entries.

    Args:
        scores: Float [Q, N], finite where valid; whatever masked entries hold is ignored.
        valid: Bool [Q, N].

    Returns:
        float32 [Q, N], 0 at masked entries. Rows whose valid entries are all equal, single or none are 0.

    Raises:
        ValueError: when the shapes differ.
    """
    mean, deviation = _moments(scores, valid)
    apart = valid & (deviation > 0)
    return torch.where(apart, (full_precision(scores) - mean) / deviation, 0.0)


@torch.no_grad()
def combine(tables: Sequence[Tensor], valid: BoolTensor, weights: Sequence[float]) -> Tensor:
    """The scores of an ensemble: sum_k w_k z_k, with z_k the standardised scores of teacher k, on a common scale.

    The sum is multiplied by the weighted mean of the teachers' standard deviations of that query, and the weighted
    mean of their means is added: the order of candidates is that of the sum, and a softmax over the result is
    about as sharp as the teachers' own. Where they disagree the z_k cancel, so the result is flatter than any of
    them: the dynamic weighting sees doubt. A teacher that scores all of a query's candidates alike has no say in
    their order. A single teacher (or the only one of weight above 0) is returned as it is.

    Args:
        tables: Float [Q, N] per teacher, of the same candidates.
        valid: Bool [Q, N].
        weights: one per teacher, not negative, not all 0; only their ratios matter.

    Returns:
        float32 [Q, N], 0 at masked entries.

    Raises:
        ValueError: on no table, shapes that differ, or weights that do not fit.
    """
    if len(tables) != len(weights) or any(not 0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise ValueError(
            f"an ensemble needs one weight per table, none negative and not all 0; "
            f"got {len(tables)} tables and weights {list(weights)}"
        )
    total = sum(weights)
    shares = [(table, weight / total) for table, weight in zip(tables, weights, strict=True) if weight > 0]
    for table, _ in shares:
        _check(table, valid)
    if len(shares) == 1:
        return torch.where(valid, full_precision(shares[0][0]), 0.0)
    average, mean, deviation = 0.0, 0.0, 0.0
    for table, share in shares:
        moments = _moments(table, valid)
        average = average + share * standardise(table, valid)
        mean, deviation = mean + share * moments[0], deviation + share * moments[1]
    return torch.where(valid, average * deviation + mean, 0.0)


def _moments(scores: Tensor, valid: BoolTensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [Q, 1] over valid entries; the deviation of equal ones is exactly 0."""
    _check(scores, valid)
    scores = full_precision(scores)
    low = scores.masked_fill(~valid, float("inf")).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~valid, float("-inf")).amax(dim=1, keepdim=True)
    some = valid.any(dim=1, keepdim=True)
    low = torch.where(some, low, 0.0)
    span = torch.where(some, high - low, 0.0)
    # in units of the span above the lowest: neither a large offset nor a tiny scale costs digits
    unit = torch.where(valid & (span > 0), (scores - low) / span, 0.0)
    count = valid.sum(dim=1, keepdim=True).clamp_min(1)
    mean = unit.sum(dim=1, keepdim=True) / count
    variance = torch.where(valid, (unit - mean).square(), 0.0).sum(dim=1, keepdim=True) / count
    return low + span * mean, span * variance.sqrt()


def _check(scores: Tensor, valid: BoolTensor) -> None:
    if valid.dim() != 2 or scores.shape != valid.shape:
        shapes = f"{tuple(scores.shape)} and {tuple(valid.shape)}"
        raise ValueError(f"scores and valid must have one shape [Q, N], got {shapes}")
