"""Variants of one job: what each run is given, and the one table of all."""

import json

import pytest
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.variants import expand, home_folder, is_done, split_off, summarise

JOB = OmegaConf.create(
    {
        "model": {"arch": "dcd"},
        "run": {"seed": 3},
        "variants": {"student": {}, "ground truth, alone": {"model": {"loss": {"alpha": 0.0}}, "run": {"seed": 99}}},
        "seeds": [0, 1],
    }
)


def test_every_variant_runs_with_every_seed_in_a_folder_of_its_own(tmp_path):
    own, comparison = split_off(JOB)
    assert set(own) == {"model", "run"}
    runs = expand(comparison, own.run, tmp_path / "p" / "job")
    assert [(v.name, v.seed) for v in runs] == [
        ("student", 0), ("ground truth, alone", 0), ("student", 1), ("ground truth, alone", 1)
    ]  # fmt: skip
    assert [v.folder for v in runs] == [
        "student-seed0", "ground-truth-alone-seed0", "student-seed1", "ground-truth-alone-seed1"
    ]  # fmt: skip
    assert runs[1].settings.model.loss.alpha == 0.0 and runs[1].settings.run.seed == 0
    assert all(v.settings.run.output_dir == str(tmp_path / "p") and v.settings.run.project == "job" for v in runs)
    # what all share is evaluated once
    assert "evaluate_teacher" not in runs[0].settings.run
    assert all(v.settings.run.evaluate_teacher is False for v in runs[1:])


def test_no_seeds_means_the_job_s_own():
    own, comparison = split_off(OmegaConf.masked_copy(JOB, ["model", "run", "variants"]))
    assert [v.seed for v in expand(comparison, own.run, home_folder({}, "p"))] == [3, 3]


@pytest.mark.parametrize(
    "section, message",
    [
        ({"variants": []}, "variants: expected names"),
        ({"variants": {"a": 3}}, r"variants\.a: expected sections"),
        ({"variants": {"a": {}}, "seeds": ["x"]}, r"seeds: \['x'\]"),
        ({"seeds": [1]}, "variants: expected names"),
    ],
)
def test_sections_of_another_form_are_told(section, message, tmp_path):
    with pytest.raises(UserError, match=message):
        expand(OmegaConf.create(section), {}, tmp_path)


def test_the_newest_comparison_is_taken_up_again(tmp_path):
    for name in ("20240101-000000", "20250101-000000"):
        (tmp_path / "p" / name).mkdir(parents=True)
    assert home_folder({"output_dir": str(tmp_path), "resume": "auto"}, "p").name == "20250101-000000"
    assert home_folder({"output_dir": str(tmp_path), "job_id": "mine"}, "p").name == "mine"


def test_the_table_holds_means_and_spreads(tmp_path):
    own, comparison = split_off(JOB)
    runs = expand(comparison, own.run, tmp_path)
    sums = {"student-seed0": 100.0, "student-seed1": 104.0, "ground-truth-alone-seed0": 90.0,
            "ground-truth-alone-seed1": 90.0}  # fmt: skip
    for run in runs:
        assert not is_done(tmp_path, run)
        rows = [{"name": "student", "r_sum": sums[run.folder], "txt_r1": 1.0, "fusion_parameters": 5}]
        if run is runs[0]:
            rows = [{"name": "teacher", "r_sum": 110.0}, {"name": "student before training", "r_sum": 9.0}, *rows]
        (tmp_path / run.folder).mkdir()
        content = {"title": "t", "split": "val", "rows": rows, "gallery": [], "machine": {}}
        (tmp_path / run.folder / "results.json").write_text(json.dumps(content))
    report = summarise(tmp_path, "t", runs, {})
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert list(rows) == ["teacher", "student before training", "student", "ground truth, alone"]
    assert rows["student"]["r_sum"] == 102.0
    assert rows["student"]["r_sum_std"] == pytest.approx(8**0.5)
    assert rows["student"]["fusion_parameters"] == 5 and rows["ground truth, alone"]["r_sum_std"] == 0.0
    assert "102.0" in report.read_text(encoding="utf-8")
