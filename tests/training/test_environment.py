"""Settings from the environment in a checkpoint: compared, not kept."""

from __future__ import annotations

import pytest

from lavis_dcd.training.environment import KEY, comparable, digests


def stored(written: dict, resolved: dict) -> dict:
    found = digests(written, resolved)
    return {**written, KEY: found} if found else written


def sections(root: object, seed: object) -> dict:
    return {"model": {"arch": "x"}, "datasets": {"d": {"root": root, "list": [1, root]}}, "run": {"seed": seed}}


ENV = sections("${oc.env:ROOT}", "${oc.env:SEED,3}")


def without_digests(config: dict) -> dict:
    return {name: section for name, section in config.items() if name != KEY}


def test_a_digest_tells_no_value():
    found = digests(ENV, sections("/secret/root", 3))
    assert sorted(found) == ["datasets.d.list.1", "datasets.d.root", "run.seed"]
    assert "secret" not in str(found) and len(set(found.values())) == 3


@pytest.mark.parametrize("before", ["written", "literal"])
@pytest.mark.parametrize("now", ["written", "literal"])
def test_the_same_values_however_written_are_the_same_job(before, now):
    values = sections("/data", 3)
    forms = {"written": stored(ENV, values), "literal": values}
    assert without_digests(comparable(forms[before], forms[now])) == without_digests(forms[before])


@pytest.mark.parametrize("before", ["written", "literal"])
@pytest.mark.parametrize("now", ["written", "literal"])
def test_other_values_are_another_job_however_written(before, now):
    first = {"written": stored(ENV, sections("/data", 3)), "literal": sections("/data", 3)}
    second = {"written": stored(ENV, sections("/other", 4)), "literal": sections("/other", 4)}
    compared = comparable(first[before], second[now])
    assert compared["run"]["seed"] != first[before]["run"]["seed"]
    assert compared["datasets"]["d"]["root"] != first[before]["datasets"]["d"]["root"]
    assert compared["model"] == first[before]["model"]


def test_what_is_compared_is_left_alone():
    now = stored(ENV, sections("/data", 3))
    comparable({**sections("/x", 1)}, now)
    assert now["datasets"]["d"]["root"] == "${oc.env:ROOT}"
