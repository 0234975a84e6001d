"""The values of ``run.batches``; with a model, in ``test_job_file.py``."""

from __future__ import annotations

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.config.batches_section import BatchesConfig
from lavis_dcd.config.run_section import RunConfig


@pytest.mark.parametrize(
    "section",
    [{}, {"by": "bank"}, {"size": 2}, {"size": 64}, {"share": 1}, {"share": 0.04}, {"margin": -0.1}, {"by": "family"}],
)
def test_sound_sections(section):
    batches = parse(RunConfig, {"batches": section}, "run").batches
    assert batches.faults(64) == []


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"by": " "}, "run.batches.by: is empty; it is teacher, bank or a key of the annotation's rows"),
        ({"share": 0}, "run.batches.share: 0 is no share of a batch"),
        ({"share": 1.5}, "run.batches.share: 1.5 is no share of a batch; it is above 0 and at most 1"),
        ({"share": 0.01}, "run.batches.share: 0.01 of a batch of 64 is less than 2 pictures"),
        ({"size": 1}, "run.batches.size: 1 pictures are no neighbourhood within a batch of 64; it is from 2 to 64"),
        ({"size": 65}, "run.batches.size: 65 pictures are no neighbourhood within a batch of 64"),
        ({"neighbours": 0}, "run.batches.neighbours: 0 must be greater than 0"),
        ({"by": "bank", "margin": 0.0}, "run.batches.margin: has no effect with by: bank"),
        ({"by": "family", "size": 8}, "run.batches.size: has no effect with by: family, a key of the annotation's"),
        ({"by": "family", "share": 0.5}, "run.batches.share: has no effect with by: family"),
        ({"by": "family", "guard": False}, "run.batches.guard: has no effect with by: family"),
    ],
)
def test_each_fault_is_a_line(section, line):
    (fault,) = BatchesConfig(**section).faults(64)
    assert fault.startswith(line)


def test_the_former_key_and_the_section_do_not_go_together():
    with pytest.raises(UserError, match=r"run\.batch_by: .*family.* stands beside run\.batches"):
        RunConfig(batch_by="family", batches=BatchesConfig(by="family"))


def test_the_key_is_that_of_either():
    assert RunConfig().batch_key is None
    assert RunConfig(batch_by="family").batch_key == "family"
    assert RunConfig(batches=BatchesConfig(by="family")).batch_key == "family"
    assert RunConfig(batches=BatchesConfig()).batch_key is None


def test_an_evaluation_has_no_neighbourhoods():
    assert RunConfig(batches=BatchesConfig(), evaluate=True).neighbourhoods is None
    assert RunConfig(batches=BatchesConfig(by="family")).neighbourhoods is None
    assert RunConfig(batches=BatchesConfig()).neighbourhoods == BatchesConfig()


def test_true_is_all_defaults():
    assert parse(RunConfig, {"batches": True}, "run").batches == BatchesConfig()
