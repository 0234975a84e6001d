"""Matchers from their sections: LAVIS's defaults below, adapters around, faults at the section's own place."""

from __future__ import annotations

import pytest

import lavis_dcd.models.meter  # noqa: F401  it registers itself
from lavis_dcd.common.errors import UserError
from lavis_dcd.models.building import build_matcher, full_section

METER = {"arch": "meter_retrieval", "model_type": "quickstart"}


def test_a_section_stands_over_the_defaults_of_its_type():
    plain, changed = full_section(METER, "model"), full_section({**METER, "fusion": {"layers": 2}}, "model")
    assert changed.fusion.layers == 2 != plain.fusion.layers
    for key in plain:
        if key != "fusion":
            assert changed[key] == plain[key]
    assert {**plain.fusion, "layers": 2} == dict(changed.fusion)
    assert dict(full_section({"arch": "meter_retrieval"}, "model")) == {"arch": "meter_retrieval"}


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({}, r"model\.teacher\.arch: None is not registered; registered: .*meter_retrieval"),
        ({"arch": "metre"}, r"model\.teacher\.arch: 'metre' is not registered"),
        (
            {**METER, "model_type": "huge"},
            r"model\.teacher\.model_type: 'huge' is none of meter_retrieval's types: .*q",
        ),
    ],
)
def test_names_that_are_not_there(section, line):
    for make in (full_section, build_matcher):
        with pytest.raises(UserError, match=line):
            make(section, "model.teacher")


def test_a_models_fault_is_told_at_the_place_of_its_section(monkeypatch):
    from lavis_dcd.models.meter import MeterRetrieval

    def refuse(config):
        raise UserError(["model.width: too narrow", "model: no weights", "run.seed: odd", "model.teacher.x: told"])

    monkeypatch.setattr(MeterRetrieval, "from_config", refuse)
    with pytest.raises(UserError) as caught:
        build_matcher(METER, "model.teacher")
    assert caught.value.faults == [
        "model.teacher.width: too narrow", "model.teacher: no weights", "run.seed: odd", "model.teacher.x: told",
    ]  # fmt: skip
