"""The one table of a comparison: of runs that are done, on one test set, with every figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lavis_dcd.common import secrets
from lavis_dcd.common.manifest import Manifest


def changed(comparison, folder, change):
    """The comparison's training in which ``change`` works on what one run writes; for all, with ``None``."""
    comparison.training.results = lambda name, content: change(content) if folder in (None, name) else content


def test_the_table_has_means_and_spreads(comparison):
    comparison.sections["seeds"] = [0, 4]
    assert comparison.train() == (0, [])
    table = comparison.table()
    assert list(table) == ["teacher", "student before training", "student", "low"]
    assert table["student"]["r_sum"] == 6 * 52.0 and table["student"]["seeds"] == 2
    assert table["student"]["txt_r1_std"] == pytest.approx(8**0.5)
    assert table["low"]["fusion_parameters"] == 5 and "fusion_parameters_std" not in table["low"]
    assert "312.0" in (comparison.home / "report.html").read_text(encoding="utf-8")
    assert set(yaml.safe_load((comparison.home / "config.yaml").read_text())["variants"]) == {"student", "low"}


def test_a_comparison_that_is_done_has_a_manifest_of_its_runs(comparison):
    assert comparison.train() == (0, [])
    manifest = Manifest.read(comparison.home, "comparison", 1)
    manifest.check_files(comparison.home)
    assert set(manifest.files) == {"config.yaml", "results.json", "report.html"}
    assert manifest.identity.settings == {
        name: Manifest.read(comparison.home / name, "run", 1).identity.key for name in ("student-seed42", "low-seed42")
    }


def test_names_with_marks_of_direction_are_shown_escaped(comparison, caplog):
    comparison.sections["variants"] = {"stu\u202edent": {}, "l\x1b[31mow\u2028": {}}
    assert comparison.train() == (0, [])
    report = (comparison.home / "report.html").read_text(encoding="utf-8")
    for text in (report, caplog.text, json.dumps(comparison.table(), ensure_ascii=False)):
        assert not {"\u202e", "\x1b", "\u2028"} & set(text)
    assert r"stu\u202edent" in report


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: {**c, "rows": []}, "expected one row of the model that learned; rows: none"),
        (lambda c: {**c, "rows": c["rows"] * 2}, "expected one row of the model that learned"),
        (lambda c: {**c, "rows": [{"name": "teacher"}]}, "expected one row of the model that learned; rows: teacher"),
        (lambda c: {**c, "rows": [{**c["rows"][-1], "r_sum": float("nan")}]}, "r_sum of 'student' is nan"),
        (lambda c: {**c, "rows": [{**c["rows"][-1], "r_sum": float("inf")}]}, "r_sum of 'student' is inf"),
        (lambda c: {**c, "rows": [{**c["rows"][-1], "r_sum": "high"}]}, "r_sum of 'student' is no number"),
        (lambda c: {**c, "rows": [{**c["rows"][-1], "r_sum": None}]}, "r_sum of 'student' is missing"),
        (lambda c: {**c, "rows": [3]}, "row 1 has no name"),
        (lambda c: {**c, "rows": {"a": 1}}, "rows is not a list"),
        (lambda c: {**c, "machine": []}, "machine is not a section"),
        (lambda c: [c], "holds no results"),
        (lambda c: {**c, "split": "val"}, "results of different splits do not make one table"),
    ],
)
def test_results_that_make_no_table_are_a_line(comparison, change, words):
    comparison.sections |= {"variants": {"student": {}}, "seeds": [0, 1]}
    changed(comparison, "student-seed1", change)
    status, lines = comparison.train()
    assert status == 2 and len(lines) == 1, lines
    assert words in lines[0] and "student-seed1/results.json" in lines[0]
    assert not {"results.json", "report.html", "manifest.json"} & set(comparison.files())


def test_the_row_of_a_plain_model_before_training_is_no_learner_s(comparison):
    def plain_model(content):
        return {
            **content,
            "rows": [{**row, "name": row["name"].replace("student", "model")} for row in content["rows"]],
        }

    changed(comparison, None, plain_model)
    assert comparison.train() == (0, [])
    table = comparison.table()
    assert list(table) == ["teacher", "model before training", "student", "low"]
    assert table["student"]["seeds"] == 1 and table["student"]["r_sum"] == table["low"]["r_sum"]


def test_runs_on_different_test_pictures_are_refused_before_the_next_is_trained(comparison):
    comparison.sections["variants"]["third"] = {}

    def replace(name):
        if name == "student-seed42":
            Image.new("RGB", (6, 4), "black").save(Path("photos") / "grey_stripe.png")

    comparison.training.after = replace
    status, lines = comparison.train()
    assert status == 2 and len(lines) == 1
    assert "variant 'student', seed 42 and variant 'low', seed 42 were evaluated on different data" in lines[0]
    assert "(the pictures of test)" in lines[0] and "do not make one table" in lines[0]
    assert comparison.training.ran == ["student-seed42", "low-seed42"]
    assert not (comparison.home / "results.json").exists()


def test_other_training_rows_make_one_table(comparison):
    captions = Path("captions.csv").read_text()
    build = {"datasets": {"image_text_retrieval": {"build_info": {"csv": "more.csv"}}}}
    Path("more.csv").write_text(captions.replace("there is one red bar on white,train", "a bar of red,train"))
    comparison.sections["variants"]["low"] = build
    assert comparison.train() == (0, [])
    assert list(comparison.table()) == ["teacher", "student before training", "student", "low"]


def test_times_of_several_machines_are_told(comparison, caplog):
    changed(comparison, "low-seed42", lambda content: {**content, "machine": {"processor": "another"}})
    assert comparison.train() == (0, [])
    assert "not measured on one machine (processor)" in caplog.text
    assert "do not compare times" in (comparison.home / "report.html").read_text(encoding="utf-8")


def test_a_run_that_was_damaged_meanwhile_is_a_line(comparison):
    def damage(name):
        if name == "low-seed42":
            (comparison.home / "student-seed42" / "results.json").write_text("{}")

    comparison.training.after = damage
    status, lines = comparison.train()
    assert status == 2 and len(lines) == 1
    assert "variant 'student', seed 42, in output/job/c/student-seed42: results.json is cut short" in lines[0]


def test_values_from_the_environment_stay_unresolved(comparison, monkeypatch):
    monkeypatch.setenv("SECRET_FOLDER", "photos")
    build = {"root": "${oc.env:SECRET_FOLDER}", "csv": "captions.csv"}
    comparison.sections["datasets"]["image_text_retrieval"]["build_info"] = build
    comparison.sections["variants"]["low"] = {
        "datasets": {"image_text_retrieval": {"build_info": {"root": build["root"]}}}
    }
    assert comparison.train() == (0, [])
    for name in ("config.yaml", "report.html"):
        text = (comparison.home / name).read_text(encoding="utf-8")
        assert text.count("${oc.env:SECRET_FOLDER}") == 2 and "root: photos" not in text


def test_a_place_from_the_environment_is_hidden_in_what_the_runs_are_given(comparison, monkeypatch):
    monkeypatch.setenv("MY_PLACE", "hunter2-place")
    comparison.sections["run"]["output_dir"] = "${oc.env:MY_PLACE}"
    shown = []
    comparison.training.after = lambda name: shown.append(secrets.as_stored(str(Path("hunter2-place") / name)))
    assert comparison.train() == (0, [])
    assert shown == ["${oc.env:MY_PLACE}/student-seed42", "${oc.env:MY_PLACE}/low-seed42"]
    home = Path("hunter2-place") / "job" / "c"
    for path in home.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    secrets.forget()
