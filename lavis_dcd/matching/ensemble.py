"""Several matchers that evaluate as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from torch import nn

from lavis_dcd.matching.contract import Matcher


class Ensemble(nn.Module):
    """Matchers with weights; ``distillation.ensemble.combine`` says how their scores become one.

    No ``Matcher``: its members' scores are standardised over a query's candidates, so the score of a pair depends
    on the other candidates, and there is no ``match``. Callers take each member's scores.

    Args:
        members: at least one.
        weights: one per member, not negative, not all 0; only their ratios matter. ``None``: all alike.

    Raises:
        ValueError: on no member or weights that do not fit.
    """

    def __init__(self, members: Sequence[Matcher], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
        _check(len(members), weights)
        self.members = nn.ModuleList(members)  # type: ignore[arg-type]  # each matcher is a module, too
        self.weights = weights

    @property
    def family(self) -> str:
        """``dual`` when every member is, else ``fusion``: what all pairs of a batch cost."""
        return "dual" if all(member.family == "dual" for member in members_of(self)) else "fusion"

    @property
    def has_joint_space(self) -> bool:
        """Return whether every member can make a shortlist."""
        return all(member.has_joint_space for member in members_of(self))

    def fusion_parameters(self) -> int:
        """Return the number of parameters that work once per pair, all members together."""
        return sum(member.fusion_parameters() for member in members_of(self))

    def shares_encoders_with(self, other: Matcher) -> bool:
        """Return whether features made by ``other`` serve every member."""
        return all(member is other or member.shares_encoders_with(other) for member in members_of(self))

    def encoders_frozen(self) -> bool:
        """Return whether no member's encoders learn."""
        return all(member.encoders_frozen() for member in members_of(self))


def members_of(matcher: Matcher | Ensemble) -> list[Matcher]:
    """Return the members of an ensemble; a matcher is its own only one."""
    return cast("list[Matcher]", list(matcher.members)) if isinstance(matcher, Ensemble) else [matcher]


def weights_of(matcher: Matcher | Ensemble) -> list[float]:
    """Return the members' weights, ``[1.0]`` for a matcher."""
    return matcher.weights if isinstance(matcher, Ensemble) else [1.0]


def _check(members: int, weights: Sequence[float]) -> None:
    if not members:
        raise ValueError("the list is empty; name at least one teacher")
    if len(weights) != members:
        raise ValueError(f"{len(weights)} weights for {members} teachers; give one per teacher")
    bad = next((weight for weight in weights if weight < 0 or not math.isfinite(weight)), None)
    if bad is not None:
        raise ValueError(f"weight {bad} is no number of 0 or more; give finite weights, none negative")
    if not sum(weights):
        raise ValueError("all weights are 0; give at least one teacher a weight above 0")
