"""Several teachers as one: tables of scores ``[Q, N]`` standardised per query, averaged with weights.

Teachers score on scales of their own (a fusion model's logit, a cosine times a learned scale). Standardised per
query, each has an equal say; the common scale given back at the end keeps a softmax over the result usable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavis_dcd.distillation.losses import full_precision

SCORES_PER_BLOCK = 2**20


@torch.no_grad()
def standardise(scores: Tensor, valid: Tensor) -> Tensor:
    """Scale to mean 0 and (population) standard deviation 1 over each query's valid entries.

    Args:
        scores: float ``[Q, N]``, finite where valid; whatever masked entries hold is ignored.
        valid: bool ``[Q, N]``.

    Returns:
        float32 ``[Q, N]``, 0 at masked entries. Rows whose valid entries are all equal, single or none are 0.

    Raises:
        ValueError: when the shapes differ.
    """
    return _standardised(scores, valid, *_moments(scores, valid))


@torch.no_grad()
def combine(tables: Sequence[Tensor], valid: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the scores of an ensemble: sum_k w_k z_k on a common scale, z_k the standardised scores of teacher k.

    The sum is multiplied by the weighted mean of the teachers' standard deviations of that query, and the weighted
    mean of their means is added: the order of candidates is that of the sum, and a softmax over the result is
    about as sharp as the teachers' own. Where they disagree the z_k cancel, so the result is flatter than any of
    them: the dynamic weighting sees doubt. A teacher that scores all of a query's candidates alike has no say in
    their order. A single teacher (or the only one of weight above 0) is returned as it is.

    Args:
        tables: float ``[Q, N]`` per teacher, of the same candidates.
        valid: bool ``[Q, N]``.
        weights: one per teacher, not negative, not all 0; only their ratios matter.

    Returns:
        float32 ``[Q, N]``, 0 at masked entries.

    Raises:
        ValueError: on no table, shapes that differ, or weights that do not fit.
    """
    shares = [(table, share) for table, share in zip(tables, _shares(weights, len(tables)), strict=True) if share > 0]
    for table, _ in shares:
        _check(table, valid)
    if len(shares) == 1:
        return torch.where(valid, full_precision(shares[0][0]), 0.0)
    average = mean = deviation = torch.zeros((), device=valid.device)
    for table, share in shares:
        moments = _moments(table, valid)
        average = average + share * _standardised(table, valid, *moments)
        mean, deviation = mean + share * moments[0], deviation + share * moments[1]
    return torch.where(valid, average * deviation + mean, 0.0)


class Combination:
    """``combine`` of tables that come one after another, every entry valid: no more than their sum is kept.

    Args:
        weights: as those of ``combine``, in the order in which the tables will come.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._shares = _shares(weights, len(weights))
        self._come = 0
        self._sum: Tensor | None = None
        self._mean = self._deviation = torch.empty(0)

    @torch.no_grad()
    def add(self, table: Tensor) -> None:
        """Add the next table, float ``[Q, N]``, on the CPU. Where it alone has a weight above 0, it stays as it is."""
        share, self._come = self._shares[self._come], self._come + 1
        if share == 0:
            return
        if sum(other > 0 for other in self._shares) == 1:
            self._sum = full_precision(table)
            return
        if self._sum is None:
            self._sum = torch.zeros(table.shape)
            self._mean, self._deviation = torch.zeros(len(table), 1), torch.zeros(len(table), 1)
        # by rows: the temporaries of a whole COCO matrix would take gigabytes
        rows = max(1, SCORES_PER_BLOCK // max(1, table.shape[1]))
        parts = (torch.split(t, rows) for t in (table, self._sum, self._mean, self._deviation))
        for scores, total, mean, deviation in zip(*parts, strict=True):
            valid = torch.ones_like(scores, dtype=torch.bool)
            moments = _moments(scores, valid)
            total += share * _standardised(scores, valid, *moments)
            mean += share * moments[0]
            deviation += share * moments[1]

    @torch.no_grad()
    def result(self) -> Tensor:
        """Return ``combine`` of all tables, float32 ``[Q, N]``; no other may come.

        Raises:
            ValueError: fewer tables came than there are weights.
        """
        if self._come < len(self._shares) or self._sum is None:
            raise ValueError(f"{self._come} tables for {len(self._shares)} weights")
        return self._sum.mul_(self._deviation).add_(self._mean) if len(self._mean) else self._sum


def _shares(weights: Sequence[float], tables: int) -> list[float]:
    """The weights with a sum of 1."""
    if tables != len(weights) or any(not 0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise ValueError(
            f"an ensemble needs one weight per table, none negative and not all 0; "
            f"got {tables} tables and weights {list(weights)}"
        )
    return [weight / sum(weights) for weight in weights]


def _standardised(scores: Tensor, valid: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return torch.where(valid & (deviation > 0), (full_precision(scores) - mean) / deviation, 0.0)


def _moments(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[Q, 1]`` over valid entries; the deviation of equal ones is exactly 0."""
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


def _check(scores: Tensor, valid: Tensor) -> None:
    if valid.dim() != 2 or scores.shape != valid.shape:
        shapes = f"{tuple(scores.shape)} and {tuple(valid.shape)}"
        raise ValueError(f"scores and valid must have one shape [Q, N], got {shapes}")
