"""The folder of a comparison: its name, which one is taken up again, and one writer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.locks import one_writer
from lavis_dcd.comparison.place import Place, contents, opened
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.run_folder import new_run_folder

AGAIN = "run.resume=auto"


def place(file="jobs/mine.yaml", **run):
    return Place.of_job(OmegaConf.create({"run": run}), Path(file))


def begun(home):
    with opened(home):
        return home


def test_the_project_is_named_after_the_job_file(tmp_path):
    home = place(output_dir=str(tmp_path)).home()
    assert home.parent == tmp_path / "mine" and not home.parent.exists()
    assert Place.of_job(OmegaConf.create({}), Path("x.yaml")).home().parts[:2] == ("output", "x")


def test_a_named_comparison_is_that_one():
    assert place(output_dir="o", project="p", job_id="mine").home() == Path("o/p/mine")
    # digits alone are a number to YAML, and a name to a single job, too
    assert place(output_dir="o", project=12, job_id=20250101).home() == Path("o/12/20250101")


@pytest.mark.parametrize("key", ["project", "job_id"])
@pytest.mark.parametrize(
    "value", ["../../x", "a/b", "a\\b", "..", ".", "", " a", "a\0b", "x" * 201, "a\u202eb", True, ["a"]]
)
def test_names_that_are_no_folder_are_a_line(key, value):
    with pytest.raises(UserError, match=rf"^run\.{key}: ") as error:
        place(**{key: value})
    assert len(error.value.faults) == 1 and str(error.value).isprintable()


@pytest.mark.parametrize(
    "run, message",
    [
        ({"output_dir": "a\0b"}, r"run\.output_dir: 'a\\x00b' has a character that cannot be printed"),
        ({"output_dir": ""}, r"run\.output_dir: '' is no path"),
        ({"output_dir": ["a"]}, r"run\.output_dir: .* is no path"),
        ({"resume": "output/mine/1"}, r"run\.resume: 'output/mine/1' is one run's; a comparison is taken up"),
        ({"evaluate": True}, "variants are trained; take one out to evaluate it"),
        ({"job_id": "${nowhere}"}, r"run\.job_id: "),
        ({"job_id": "${oc.env:NOT_SET_ANYWHERE}"}, r"run\.job_id: "),
    ],
)
def test_other_keys_that_no_comparison_can_have_are_a_line(run, message):
    with pytest.raises(UserError, match=message) as error:
        place(**run)
    assert len(error.value.faults) == 1


@pytest.mark.parametrize("run", [3, "x", [1], None])
def test_a_run_section_of_another_form_is_a_line(run):
    with pytest.raises(UserError, match=r"run: .* is not a section"):
        Place.of_job(OmegaConf.create({"run": run}), Path("x.yaml"))


@pytest.mark.parametrize(
    "option", ["run.project=../../x", "run.job_id=../x", "run.job_id=" + "x" * 300, "run.project=a\tb"]
)
def test_refused_names_leave_no_folder(comparison, option):
    before = sorted(os.listdir())
    status, lines = comparison.train(option)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(option.partition("=")[0])
    assert sorted({*os.listdir()} - {"job.yaml"}) == before and not comparison.training.ran
    assert not (comparison.home.parents[3] / "x").exists()


def test_a_fault_of_a_variant_leaves_no_folder(comparison):
    comparison.sections["variants"]["low"]["model"] = {"fusion": {"layers": "two"}}
    status, lines = comparison.train()
    assert status == 2 and lines == ["variants.low: model.fusion.layers: 'two' (text) is not an integer"]
    assert not Path("output").exists()


def test_a_variant_that_puts_a_list_for_a_section_is_a_line(comparison):
    comparison.sections["variants"]["low"]["model"] = {"fusion": [1]}
    status, lines = comparison.train()
    assert status == 2 and lines == ["variants.low: model.fusion: a list, expected a section"]


@pytest.mark.parametrize(
    "variants",
    [
        "${model}",
        {"a": "${nowhere.x}"},
        {"a": {"model": {"arch": "${nowhere.x}"}}},
        {"a": {"run": {"init_lr": "${oc.env:NOT_SET_ANYWHERE}"}}},
    ],
)
def test_variants_that_cannot_be_resolved_are_a_line(comparison, variants):
    comparison.sections["variants"] = variants
    status, lines = comparison.train()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("variants")


def test_a_number_in_the_file_and_the_same_name_as_an_option_are_a_line(comparison):
    comparison.sections["variants"] = {1: {}}
    status, lines = comparison.train("variants.1.run.max_epoch=3")
    assert status == 2 and len(lines) == 1


# -- which one is taken up again


def test_the_newest_comparison_is_taken_up_again(tmp_path):
    first, second = tmp_path / "p" / "zeta", tmp_path / "p" / "alpha"
    begun(first)
    time.sleep(0.01)
    begun(second)
    assert place(output_dir=str(tmp_path), project="p", resume="auto").home() == second  # by its time, not its name
    begun(first)  # taken up again: that does not make it newer
    assert place(output_dir=str(tmp_path), project="p", resume="auto").home() == second
    assert place(output_dir=str(tmp_path), project="p").home() not in (first, second)


def test_the_folder_of_a_single_job_is_not_taken_for_a_comparison(tmp_path):
    job = tmp_path / "p" / "20990101-000000"
    job.mkdir(parents=True)
    (job / "results.json").write_text("{}")
    (tmp_path / "p" / "notes.txt").write_text("")
    home = place(output_dir=str(tmp_path), project="p", resume="auto").home()
    assert home != job and not home.exists()


def test_a_comparison_with_a_damaged_record_is_passed_over_and_told(tmp_path, caplog):
    good, bad = begun(tmp_path / "p" / "a"), begun(tmp_path / "p" / "b")
    (bad / "comparison.json").write_text("{")
    assert place(output_dir=str(tmp_path), project="p", resume="auto").home() == good
    assert "passed over: run.resume:" in caplog.text and str(bad) in caplog.text


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "notes.txt"])
def test_a_folder_that_holds_something_else_is_refused(comparison, name):
    comparison.home.mkdir(parents=True)
    (comparison.home / name).write_text("{}")
    assert (
        comparison.refused() == "run.job_id: output/job/c is there and no comparison of this version; give another name"
    )
    assert comparison.files() == {name: b"{}"}


@pytest.mark.parametrize("resume", [None, "auto"])
def test_the_folder_of_a_comparison_is_no_single_job_s(tmp_path, resume):
    begun(tmp_path / "c")
    with pytest.raises(UserError, match=r"run\.job_id: .*c is the folder of a comparison; give another name"):
        new_run_folder(tmp_path, RunConfig(job_id="c", resume=resume), None)
    assert contents(tmp_path / "c") == ["comparison.json"]


def test_what_a_killed_process_left_hidden_is_nobody_s(tmp_path):
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / ".comparison.json.abc.tmp").write_text("")
    begun(begun(tmp_path / "h"))
    assert contents(tmp_path / "h") == ["comparison.json"] and not list((tmp_path / "h").glob(".*"))


def test_a_damaged_record_is_a_line(tmp_path):
    (begun(tmp_path / "h") / "comparison.json").write_text("{")
    with pytest.raises(UserError, match=r"h: comparison\.json is no manifest, or was cut short; move the folder away"):
        begun(tmp_path / "h")


# -- one writer


def test_a_second_comparison_in_one_folder_is_refused(comparison):
    refused = []

    def second(name):
        if not refused:
            # the lock is of this process, and of the first one's thread: another's is the same
            refused.append(None)
            refused.append(comparison.train())

    comparison.training.after = second
    assert comparison.train() == (0, [])
    status, lines = refused[1]
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("the comparison ") and "is writing there" in lines[0]
    assert lines[0].endswith("wait until it has ended, or give another run.job_id")
    assert comparison.training.ran == ["student-seed42", "low-seed42"]


HOLD = """
import sys, time
from pathlib import Path
from lavis_dcd.comparison.place import opened
with opened(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(600)
"""


def test_another_process_s_comparison_is_refused_and_a_dead_one_s_taken_over(comparison, repo_root):
    env = {**os.environ, "PYTHONPATH": str(repo_root)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(comparison.home)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout.readline() == "in\n"
        for options in ([], [AGAIN], [AGAIN, "run.job_id=null"]):  # auto finds the folder by itself
            line = comparison.refused(*options)
            assert line.startswith("the comparison ") and f"(number {process.pid} on " in line
    finally:
        process.kill()
        process.wait(60)
    assert comparison.train(AGAIN, "run.job_id=null") == (0, [])
    assert (comparison.home / "results.json").is_file()


def test_comparisons_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    at = place(output_dir=str(tmp_path), project="p")
    with one_writer(at.home(), "the comparison"):  # before its folder is made
        assert at.home().name == "now-2"
    begun(at.home())
    assert at.home().name == "now-2"
    shutil.rmtree(tmp_path / "p" / "now")
    assert at.home().name == "now"
