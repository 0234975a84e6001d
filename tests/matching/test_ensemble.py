"""An ensemble's own answers; its scores are tested with the evaluation."""

from __future__ import annotations

import pytest
import torch
from stubs import StubMatcher
from torch import nn

from lavis_dcd.matching.ensemble import Ensemble, members_of, weights_of


class Stub(StubMatcher):
    """A matcher of so many parameters per pair."""

    def __init__(self, parameters: int, family: str = "fusion", joint: bool = True, tower: nn.Module | None = None):
        super().__init__(tower or nn.Linear(2, 2))
        self.weight = nn.Parameter(torch.zeros(parameters))
        self.family, self.has_joint_space = family, joint


def test_an_ensemble_answers_for_all_its_members():
    tower = nn.Linear(2, 2)
    fusion, dual = Stub(3, tower=tower), Stub(5, family="dual", tower=tower)
    both = Ensemble([fusion, dual], [3, 1])
    assert both.weights == [3.0, 1.0] and weights_of(both) == [3.0, 1.0]
    assert members_of(both) == [fusion, dual] and both.fusion_parameters() == 8
    assert both.has_joint_space and both.family == "fusion" and Ensemble([dual]).family == "dual"
    assert both.shares_encoders_with(fusion) and not both.shares_encoders_with(Stub(1))
    assert not both.encoders_frozen()
    tower.requires_grad_(False)
    assert both.encoders_frozen()
    assert not Ensemble([fusion, Stub(2, joint=False)]).has_joint_space
    assert not both.eval().members[0].training and len(both.state_dict()) == 2 * 3


def test_a_matcher_is_its_own_only_member():
    alone = Stub(1)
    assert members_of(alone) == [alone] and weights_of(alone) == [1.0]
    assert Ensemble([alone, Stub(1)]).weights == [1.0, 1.0]


@pytest.mark.parametrize(
    ("count", "weights", "line"),
    [
        (0, None, "the list is empty"),
        (2, [1.0], "1 weights for 2 teachers"),
        (2, [1.0, -0.5], "weight -0.5 is no number of 0 or more"),
        (2, [1.0, float("nan")], "weight nan is no number of 0 or more"),
        (2, [0.0, 0.0], "all weights are 0"),
    ],
)
def test_ensembles_that_cannot_be(count, weights, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        Ensemble([Stub(1) for _ in range(count)], weights)
