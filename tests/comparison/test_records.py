"""Runs of a comparison are reused only where they are those that the jobs would give now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.comparison.records import WITHOUT_EFFECT, Sums, identity_of
from lavis_dcd.config.required_files import RequiredFile
from lavis_dcd.config.run_section import RunConfig

DONE = ["student-seed42", "low-seed42"]
AGAIN = "run.resume=auto"


@pytest.fixture
def done(comparison):
    """A comparison that has ended."""
    assert comparison.train() == (0, [])
    assert comparison.training.ran == DONE
    return comparison


def test_runs_that_are_done_are_not_repeated(done):
    assert done.train() == (0, []) and done.train(AGAIN) == (0, [])
    assert done.training.ran == DONE


def test_settings_without_effect_do_not_count(done):
    options = ["run.num_workers=1", "run.log_freq=3", "run.report=false", "run.save_every=7", "run.verify=off"]
    assert done.train(*options) == (0, [])
    assert done.training.ran == DONE


def test_all_settings_without_effect_are_keys_of_run():
    assert RunConfig().to_dict().keys() >= WITHOUT_EFFECT


@pytest.mark.parametrize(
    "options, words",
    [
        (["run.max_epoch=1"], "(run.max_epoch)"),
        (["run.k_test=3"], "(run.k_test)"),
        (["run.picture_content=all"], "(run.picture_content)"),
        (["model.fusion.layers=2", "run.batch_size_train=3"], "(run.batch_size_train, model.fusion.layers)"),
        (["datasets.image_text_retrieval.vis_processor.eval.image_size=32"],
         "(datasets.image_text_retrieval.vis_processor.eval.image_size)"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_and_named(done, options, words):
    before = done.files()
    for more in ([], [AGAIN]):
        status, lines = done.train(*options, *more)
        assert status == 2 and len(lines) == 2, lines  # a line for each variant
        assert done.training.ran == DONE and done.files() == before
        for line, folder in zip(lines, DONE, strict=True):
            assert f"variant {folder[:-7]!r}, seed 42, in output/job/c/{folder}: it was trained with" in line
            assert f"with other settings {words}; put them back" in line
            assert "remove that folder to train it anew, or give another run.job_id" in line


def test_a_variant_s_own_settings_count_for_it_alone(done):
    done.sections["variants"]["low"]["run"]["init_lr"] = 2e-6
    line = done.refused()
    assert "variant 'low', seed 42" in line and "(run.init_lr)" in line


def test_removing_the_folder_is_a_way_out(done):
    shutil.rmtree(done.home / "low-seed42")
    done.sections["variants"]["low"]["run"]["init_lr"] = 2e-6
    assert done.train() == (0, [])
    assert done.training.ran == [*DONE, "low-seed42"]


def test_variants_and_seeds_may_be_added(done):
    done.sections["variants"] = {"first": {"run": {"max_epoch": 2}}, **done.sections["variants"]}
    done.sections["seeds"] = [42, 1]
    assert done.train() == (0, [])
    assert done.training.ran == [*DONE, "first-seed42", "first-seed1", "student-seed1", "low-seed1"]
    assert list(done.table()) == ["teacher", "student before training", "first", "student", "low"]


def test_many_changes_are_one_line(done):
    options = ["run.max_epoch=1", "run.k_test=3", "run.init_lr=1", "run.weight_decay=0", "run.warmup=0",
               "run.grad_clip=1", "run.batch_size_train=3", "run.eps=1e-3"]  # fmt: skip
    _, lines = done.train(*options)
    assert " and 2 more);" in lines[0]


# -- rows and pictures


def test_changed_rows_are_refused_and_named(done):
    path = Path("captions.csv")
    path.write_text(path.read_text() + "\ngrey_stripe.png,one more,test")
    status, lines = done.train(AGAIN)
    assert status == 2 and done.training.ran == DONE
    assert len(lines) == 2 and all("since it was trained, the rows of test changed" in line for line in lines)


@pytest.mark.parametrize("split, name", [("test", "grey_stripe.png"), ("train", "red_bar.png")])
def test_changed_pictures_are_refused_and_named(done, split, name):
    path = Path("photos") / name
    facts = path.stat()
    Image.new("RGB", (60, 40), "black").save(path)
    path.write_bytes(path.read_bytes().ljust(facts.st_size, b"\0"))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    status, lines = done.train(AGAIN)
    assert status == 2 and done.training.ran == DONE
    assert len(lines) == 2 and all(f"the pictures of {split} changed" in line for line in lines)


def test_data_that_is_gone_is_a_line(done):
    Path("captions.csv").unlink()
    status, lines = done.train()
    assert status == 2 and lines and "captions.csv" in lines[0]


def test_a_file_of_weights_that_was_replaced_shows_in_the_identity(tmp_path):
    weights = tmp_path / "teacher.pth"
    weights.write_bytes(b"one")
    files = [RequiredFile("model.teacher.finetuned", weights), RequiredFile("datasets.x", tmp_path / "absent")]
    config = OmegaConf.create({"model": {"teacher": {"finetuned": str(weights)}}, "datasets": {}})
    job = SimpleNamespace(run=RunConfig(), config=config, files=files, model=None)
    before, facts = identity_of(job, Sums()), weights.stat()
    assert identity_of(job, Sums()) == before
    weights.write_bytes(b"two")
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert before.differences(identity_of(job, Sums())) == ["the file of model.teacher.finetuned"]


def test_a_score_bank_that_was_mined_anew_shows_in_the_identity(tmp_path):
    from lavis_dcd.models.dcd.config import DcdConfig

    bank = {"source": "bank", "bank": {"path": str(tmp_path)}}
    config = OmegaConf.create({"model": {"candidates": bank}, "datasets": {}})
    model = parse(DcdConfig, {"candidates": bank, "teacher": {}, "student": {}}, "model")
    job = SimpleNamespace(
        run=RunConfig(), config=config, files=[], model=model, model_cfg=config.model, datasets_cfg=config.datasets
    )
    (tmp_path / "manifest.json").write_text("one")
    before = identity_of(job, Sums())
    (tmp_path / "manifest.json").write_text("two")
    assert before.differences(identity_of(job, Sums())) == ["the file of model.candidates.bank"]


def test_sums_read_a_file_again_when_it_changed(tmp_path):
    (tmp_path / "folder").mkdir()
    file, sums = tmp_path / "folder" / "vocab.txt", Sums()
    file.write_text("a")
    before, of_folder = sums.of(file), sums.of(tmp_path / "folder")
    file.write_text("b")
    assert sums.of(file) != before and sums.of(tmp_path / "folder") != of_folder
    os.mkfifo(tmp_path / "fifo")
    assert sums.of(tmp_path / "fifo") == "no file"  # and does not wait for a writer


# -- stored bytes


@pytest.mark.parametrize("name", ["results.json", "student.pth", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_files_are_refused_and_named(done, name, damage):
    path = done.home / "low-seed42" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] if damage == "cut" else raw[:-1] + bytes([raw[-1] ^ 1]))
    line = done.refused(AGAIN)
    assert "variant 'low', seed 42, in output/job/c/low-seed42: " in line and name in line
    assert "remove that folder" in line


def test_a_missing_student_is_refused(done):
    (done.home / "low-seed42" / "student.pth").unlink()
    assert "student.pth is missing" in done.refused(AGAIN)


def test_a_folder_that_was_copied_from_another_variant_s_is_refused(done):
    shutil.rmtree(done.home / "low-seed42")
    shutil.copytree(done.home / "student-seed42", done.home / "low-seed42")
    assert "its files are those of another run" in done.refused(AGAIN)


def test_records_that_were_edited_are_refused(done):
    path = done.home / "low-seed42.json"
    path.write_text(path.read_text().replace("run.init_lr", "run.init_LR"))
    assert "the checksum of low-seed42.json does not fit it" in done.refused(AGAIN)


def test_a_folder_that_the_comparison_did_not_begin_is_refused(done):
    (done.home / "low-seed42.json").unlink()
    assert "this comparison did not begin it" in done.refused(AGAIN)


# -- kills


@pytest.mark.parametrize("last", ["config.yaml", "results.json", "student.pth"])
def test_a_run_that_was_killed_before_its_end_is_not_done(comparison, last):
    comparison.training.stop_after = ("low-seed42", last)
    assert comparison.train()[0] == 130
    comparison.training.stop_after = None
    assert "it is not finished; run.resume=auto goes on with it" in comparison.refused()
    assert not (comparison.home / "results.json").exists()
    assert comparison.train(AGAIN) == (0, [])
    assert comparison.training.ran == [*DONE, "low-seed42"]


def test_a_run_that_was_killed_is_not_continued_with_other_settings(comparison):
    comparison.training.stop_after = ("student-seed42", "results.json")
    assert comparison.train()[0] == 130
    comparison.training.stop_after = None
    line = comparison.refused(AGAIN, "run.max_epoch=3")
    assert "it was begun with other settings (run.max_epoch); put them back" in line
    # the user's word
    assert comparison.train(AGAIN, "run.max_epoch=3", "run.resume_force=[recipe]") == (0, [])


def test_a_kill_between_a_run_s_manifest_and_its_record(comparison, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lavis_dcd.job.finish", killed)
        assert comparison.train()[0] == 130
    assert comparison.train(AGAIN) == (0, [])
    assert comparison.training.ran == ["student-seed42", *DONE]


def test_a_runner_that_leaves_no_manifest_is_a_line(comparison):
    comparison.training = lambda job: (comparison.home / job.run.job_id).mkdir(parents=True)
    status, lines = comparison.train()
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("variant 'student', seed 42: manifest.json is missing in output/job/c/student-seed42")


def test_faults_of_a_run_name_its_variant(comparison):
    def diverged(job):
        raise UserError("run: the loss is nan by step 3")

    comparison.training = diverged
    assert comparison.train() == (2, ["variant 'student', seed 42: run: the loss is nan by step 3"])


def test_a_folder_that_was_removed_meanwhile_is_a_line_before_the_next_run(comparison):
    comparison.training.after = lambda name: (comparison.home / "comparison.json").unlink()
    status, lines = comparison.train()
    assert status == 2 and comparison.training.ran == ["student-seed42"]
    assert lines == [
        "run.output_dir: output/job/c was removed or moved while its comparison was running; start it again"
    ]


def test_the_record_names_the_settings(done):
    content = json.loads((done.home / "low-seed42.json").read_text())
    assert "run.init_lr" in content["identity"]["settings"] and "run.job_id" not in content["identity"]["settings"]
