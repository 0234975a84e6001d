"""Which registered classes say something of their section: told by their methods, not by their bases."""

from __future__ import annotations

import pytest
from torch import nn

from lavis_dcd.config.contracts import ChecksItself, HasSchema, HoldsModels, tells

CONTRACTS = (HasSchema, ChecksItself, HoldsModels)


class WithSchema(nn.Module):
    @classmethod
    def config_schema(cls) -> type:
        return dict


class Holder(WithSchema):
    @classmethod
    def inner_models(cls, section):
        return {}

    @classmethod
    def inner_faults(cls, section, path):
        return []

    @classmethod
    def matcher_names(cls, section):
        return []


class Half(nn.Module):
    """One of the methods of a contract is no contract."""

    @classmethod
    def inner_models(cls, section):
        return {}


class Checked:
    @classmethod
    def config_faults(cls, section, path):
        return []


@pytest.mark.parametrize(
    ("registered", "told"),
    [
        (None, ()),
        (nn.Linear, ()),
        (WithSchema, (HasSchema,)),
        (Holder, (HasSchema, HoldsModels)),
        (Half, ()),
        (Checked, (ChecksItself,)),
    ],
)
def test_a_contract_is_met_by_all_of_its_methods(registered, told):
    assert tuple(contract for contract in CONTRACTS if tells(registered, contract)) == told


def test_the_packages_classes_meet_what_they_are_used_for():
    import lavis_dcd.plugins  # noqa: F401
    from lavis_dcd.models.dcd import DynamicContrastiveDistillation
    from lavis_dcd.models.meter import MeterRetrieval

    assert tells(DynamicContrastiveDistillation, HoldsModels) and tells(DynamicContrastiveDistillation, HasSchema)
    assert tells(MeterRetrieval, HasSchema) and not tells(MeterRetrieval, HoldsModels)
