"""Variants of one job: what each run is given, and the names and seeds that are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.variants import expand, refuse_incomparable, split_off

JOB = OmegaConf.create(
    {
        "model": {"arch": "dcd"},
        "run": {"seed": 3},
        "variants": {"student": {}, "ground truth alone": {"model": {"loss": {"alpha": 0.0}}, "run": {"seed": 99}}},
        "seeds": [0, 1],
    }
)


def runs_of(tmp_path, *names, **sections):
    return expand(OmegaConf.create({"variants": {name: {} for name in names}, **sections}), {}, tmp_path / "p" / "home")


def test_every_variant_runs_with_every_seed_in_a_folder_of_its_own(tmp_path):
    own, comparison = split_off(JOB)
    assert set(own) == {"model", "run"}
    runs = expand(comparison, own.run, tmp_path / "p" / "job")
    assert [(v.name, v.seed) for v in runs] == [
        ("student", 0), ("ground truth alone", 0), ("student", 1), ("ground truth alone", 1)
    ]  # fmt: skip
    assert [v.folder for v in runs] == [
        "student-seed0", "ground-truth-alone-seed0", "student-seed1", "ground-truth-alone-seed1"
    ]  # fmt: skip
    assert runs[1].settings.model.loss.alpha == 0.0 and runs[1].settings.run.seed == 0
    assert all(v.settings.run.output_dir == str(tmp_path / "p") and v.settings.run.project == "job" for v in runs)
    # what all share is evaluated once
    assert "evaluate_teacher" not in runs[0].settings.run
    assert all(v.settings.run.evaluate_teacher is False for v in runs[1:])


def test_no_seeds_means_the_job_s_own(tmp_path, caplog):
    own, comparison = split_off(OmegaConf.masked_copy(JOB, ["model", "run", "variants"]))
    assert [v.seed for v in expand(comparison, own.run, tmp_path)] == [3, 3]
    # the variant's own has no effect, which is told
    assert "variants.ground truth alone.run.seed: has no effect" in caplog.text


@pytest.mark.parametrize(
    "section, message",
    [
        ({"variants": []}, "variants: expected names"),
        ({"variants": "???"}, "variants: expected names"),
        ({"variants": {"a": 3}}, r"variants\.a: expected sections"),
        ({"variants": {"a": "${model}"}}, r"variants\.a: expected sections"),
        ({"variants": {"a": {"run": 3}}}, r"variants\.a\.run: 3 is not a section"),
        ({"variants": {"a": {"model": [1]}}}, r"variants\.a\.model: \[1\] is not a section"),
        ({"variants": {"a": {}}, "seeds": ["x"]}, r"seeds: \['x'\]"),
        ({"variants": {"a": {}}, "seeds": 3}, "seeds: 3 must be a list"),
        ({"variants": {"a": {}}, "seeds": {"a": 1}}, "seeds: .* must be a list"),
        ({"variants": {"a": {}}, "seeds": [True]}, r"seeds: \[True\]"),
        ({"variants": {"a": {}}, "seeds": [-1]}, r"seeds: \[-1\]"),
        ({"variants": {"a": {}}, "seeds": "${run.seed}"}, "seeds: '.*' must be a list"),
        # the second run with seed 1 would be "done before", and count as another in the means
        ({"variants": {"a": {}}, "seeds": [1, 2, 1]}, "seeds: 1 stands there twice"),
        ({"seeds": [1]}, "variants: expected names"),
    ],
)
def test_sections_of_another_form_are_told(section, message, tmp_path):
    with pytest.raises(UserError, match=message):
        expand(OmegaConf.create(section), {}, tmp_path)


@pytest.mark.parametrize("names", [("margin 1", "margin -1"), ("K+", "K-"), ("a b", "a-b"), ("K", "k"), ("ä", "ö")])
def test_two_names_get_two_folders(names, tmp_path):
    folders = [variant.folder for variant in runs_of(tmp_path, *names, seeds=[1, 11])]
    assert len(set(folders)) == 4
    assert all(folder == folder.lower() for folder in folders)  # also where disks take K and k for the same


@given(st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=6, unique=True))
def test_names_are_refused_or_told_apart(names):
    try:
        runs = expand(OmegaConf.create({"variants": {name: {} for name in names}, "seeds": [0, 1]}), {}, Path("p/home"))
    except UserError as error:
        assert all(line.startswith("variants") and line.isprintable() for line in error.faults)
        return
    assert len({run.folder for run in runs}) == 2 * len(names)
    titles = {run.title for run in runs}
    assert len(titles) == len(names) and all(title.isprintable() for title in titles)
    assert all(run.folder.isascii() and "/" not in run.folder and len(run.folder) < 120 for run in runs)


@pytest.mark.parametrize(
    "text", ["{1: {}}", "{1: {}, '2': {}}", "{true: {}}", "{1.0: {}, 1: {}}", "{1: {}, true: {}}", "{off: {}}"]
)
def test_names_that_yaml_makes_something_else_of_are_a_fault(text, tmp_path):
    # of 1, 1.0 and true, YAML keeps one
    with pytest.raises(UserError, match=r"variants\..*: this name is a \w+ to YAML, expected text; put it in quotes"):
        expand(OmegaConf.create(f"variants: {text}"), {}, tmp_path)


def test_quoted_numbers_are_names(tmp_path):
    own = OmegaConf.create("variants: {'1': {}, '1.0': {}, 'true': {}}")
    assert [v.title for v in expand(own, {}, tmp_path)] == ["1", "1.0", "true"]


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a "),  # white space at the end
        ("a b", "a\N{NO-BREAK SPACE}b"),
        ("ab", "a\N{RIGHT-TO-LEFT OVERRIDE}b"),
        ("ab", "a\N{ZERO WIDTH SPACE}b"),
        ("\u00e9", "e\u0301"),  # one letter, encoded in two ways
        ("a\N{COMBINING ACUTE ACCENT}\u202a", "\u00e1"),
        ("a\\x07", "a\x07"),  # one is the way in which the other is shown
    ],
)
def test_two_names_that_look_the_same_are_a_fault(names, tmp_path):
    with pytest.raises(UserError, match="look the same"):
        runs_of(tmp_path, *names)


@pytest.mark.parametrize("name", ["", "  ", "\N{RIGHT-TO-LEFT OVERRIDE}", "\n"])
def test_a_name_without_anything_to_see_is_a_fault(name, tmp_path):
    with pytest.raises(UserError, match="nothing that can be seen") as error:
        runs_of(tmp_path, name)
    assert all(line.isprintable() for line in error.value.faults)


@pytest.mark.parametrize("name", ["x" * 201, "\N{GRINNING FACE}" * 51, "x" * 100_000])
def test_a_name_that_is_too_long_is_a_fault_and_a_short_line(name, tmp_path):
    with pytest.raises(UserError, match="more than 200 bytes") as error:
        runs_of(tmp_path, name)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["teacher", "student before training"])
def test_names_of_other_rows_are_a_fault(name, tmp_path):
    with pytest.raises(UserError, match="has a row of that name"):
        runs_of(tmp_path, "student", name)


def test_names_with_marks_of_direction_are_shown_escaped(tmp_path):
    (run,) = runs_of(tmp_path, "a\N{RIGHT-TO-LEFT OVERRIDE}b\x1b[31m\nc")
    assert run.title == r"a\u202eb\x1b[31m\nc"
    assert run.words == r"variant 'a\\u202eb\\x1b[31m\\nc', seed 42"


def test_what_a_variant_takes_from_elsewhere_stays_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    settings = {"model": {"alpha": "${oc.env:TOKEN}", "beta": "${run.seed}"}}
    (run,) = expand(OmegaConf.create({"variants": {"a": settings}}), {"seed": 5}, tmp_path)
    assert "secret" not in str(OmegaConf.to_container(run.settings))
    assert run.settings.model.alpha == "secret" and run.settings.model.beta == 5


def job(**run):
    return SimpleNamespace(run=RunConfig(**{"test_splits": ["test"], **run}), run_cfg=OmegaConf.create({}))


@pytest.mark.parametrize(
    "run, message",
    [
        ({"evaluate": True}, "run.evaluate: variants are trained"),
        # every variant would be written to that one's folder
        ({"resume": "output/x/y"}, "run.resume: 'output/x/y' is one run's; set run.resume=auto"),
        ({"test_splits": [], "valid_splits": []}, "run.test_splits: is empty, so there is nothing to compare"),
        ({"test_splits": ["val"]}, "run.test_splits: 'val' comes first, and 'test' in the first variant"),
        ({"test_splits": [], "valid_splits": ["val"]}, "run.test_splits: 'val' comes first"),
        ({"picture_content": "all"}, "run.picture_content: another one"),
    ],
)
def test_variants_that_make_no_table_are_refused_before_any_is_trained(run, message, tmp_path):
    runs = runs_of(tmp_path, "a", "b", seeds=[0, 1])
    refuse_incomparable(runs, [job()] * 4)
    with pytest.raises(UserError, match="^variants.b: " + message) as error:
        refuse_incomparable(runs, [job(), job(**run)] * 2)
    assert len(error.value.faults) == 1


def test_a_runner_with_settings_of_its_own_is_refused(tmp_path):
    foreign = SimpleNamespace(run=SimpleNamespace(), run_cfg=OmegaConf.create({"runner": "mine"}))
    with pytest.raises(UserError, match=r"variants\.a: run.runner: mine has settings of its own"):
        refuse_incomparable(runs_of(tmp_path, "a"), [foreign])
