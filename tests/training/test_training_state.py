"""What a resumed job reuses of the one before: never another test set's figures, never a folder that is in use."""

import json
import shutil

import pytest
import torch

from lavis_dcd.cli import EXIT_USER_ERROR, guarded
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.locks import is_locked, one_writer
from lavis_dcd.training import checkpoint
from lavis_dcd.training.run_folder import finished

DATA = {"resume": "auto", "resume_force": ["data"]}


class StopError(Exception):
    pass


def stop():
    raise StopError


def results(trainer):
    return json.loads((trainer.output_dir / "results.json").read_text())


def rows(trainer):
    return {row["name"]: row["r_mean"] for row in results(trainer)["rows"]}


def evaluations(trainer):
    lines = [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["model"]) for line in lines if line["kind"] == "eval"]


def stopped(stubs, folder, **keys):
    """A job of three epochs that ended in its third."""
    with pytest.raises(StopError):
        stubs.job(folder, stubs.Task({12: stop}), **keys).train()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_rows_of_any_split_are_refused_unless_told(stubs, tmp_path, split):
    stopped(stubs, tmp_path)
    changed = {{"train": "rows", "val": "val_rows", "test": "test_rows"}[split]: 8}
    with pytest.raises(UserError, match=rf"the rows of {split} changed \(\d+ in the checkpoint, 8 now\)") as caught:
        stubs.job(tmp_path, resume="auto", **changed)
    assert caught.value.faults[-1].endswith("run.resume_force=[data] continues with the change")
    stubs.job(tmp_path, **DATA, **changed).train()


def test_a_split_of_the_teacher_alone_counts(stubs, tmp_path):
    keys = {"test_splits": [], "valid_splits": ["val"], "teacher_split_eval": ["test"]}
    stopped(stubs, tmp_path, **keys)
    with pytest.raises(UserError, match="the rows of test changed"):
        stubs.job(tmp_path, resume="auto", test_rows=8, **keys)


def test_one_table_never_mixes_two_test_sets(stubs, tmp_path):
    stopped(stubs, tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    resumed = stubs.job(tmp_path / "new", **DATA, test_rows=8)
    resumed.train()
    whole = stubs.job(tmp_path / "whole", test_rows=8)
    whole.train()
    assert rows(resumed) == rows(whole) and list(rows(resumed)) == ["teacher", "student before training", "student"]
    assert results(resumed)["data"] == results(whole)["data"]
    assert sorted(evaluations(resumed)) == sorted(evaluations(whole))
    as_before = stubs.job(tmp_path / "old", resume="auto")
    as_before.train()
    assert rows(as_before)["teacher"] != rows(resumed)["teacher"]


def test_the_model_before_training_is_left_out_where_it_cannot_be_had_again(stubs, tmp_path, caplog):
    stopped(stubs, tmp_path)
    other = stubs.Distiller()
    with torch.no_grad():
        other.student.head.bias.add_(1)
    resumed = stubs.job(tmp_path, model=other, **DATA, test_rows=8)
    resumed.train()
    assert list(rows(resumed)) == ["teacher", "student"]
    assert "the model before training is not in the table" in caplog.text


def test_the_best_step_is_told_on_one_validation_set(stubs, tmp_path):
    """The best of the old set is scored anew on the new one before others are compared with it."""
    stopped(stubs, tmp_path)
    resumed = stubs.job(tmp_path, **DATA, val_rows=8)
    resumed.train()
    whole = stubs.job(tmp_path / "whole", val_rows=8)
    whole.train()
    assert resumed._best.best == whole._best.best
    wanted = {key for key in evaluations(whole) if key[1] != "val"} | {(15, "val", "student")}
    assert wanted <= set(evaluations(resumed))
    again = torch.load(resumed.output_dir / "student.pth", weights_only=True)["model"]
    assert all(torch.equal(again[name], value) for name, value in stubs.weights(whole.output_dir).items())


@pytest.mark.parametrize("text", ["", '{"test/teacher": {"st', "[]", "\0"])
def test_a_cut_file_of_evaluations_is_made_again(stubs, tmp_path, caplog, text):
    stopped(stubs, tmp_path)
    (folder,) = (tmp_path / "stub").glob("2*")
    (folder / "evaluations.json").write_text(text)
    resumed = stubs.job(tmp_path, resume="auto")
    resumed.train()
    assert "evaluations.json is passed over" in caplog.text
    whole = stubs.job(tmp_path / "whole")
    whole.train()
    assert rows(resumed) == rows(whole) and sorted(evaluations(resumed)) == sorted(evaluations(whole))


def test_another_teacher_s_evaluation_is_not_reused(stubs, tmp_path):
    first = stubs.job(tmp_path, max_epoch=1)
    first.train()
    model = stubs.Distiller("t2")
    model._teacher = [stubs.Learner(seed=5).eval()]
    resumed = stubs.job(tmp_path, model=model, resume="auto", resume_force=["teacher"], max_epoch=1)
    before = rows(first)
    resumed.train()
    assert rows(resumed)["teacher"] != before["teacher"] and rows(resumed)["student"] == before["student"]


def test_evaluations_of_another_protocol_are_not_reused(stubs, tmp_path):
    stubs.job(tmp_path, max_epoch=1).train()
    for keys, wanted in (({}, 0), ({"k_test": 3}, 4), ({"k_test": 3}, 0)):
        task = stubs.Task()
        stubs.job(tmp_path, task, resume="auto", max_epoch=1, **keys).train()
        assert task.evaluated == wanted  # the best step's, the table's two, the teacher's


# -- done, and one writer


def test_a_run_is_done_when_all_is_written_and_not_while_it_goes_on(stubs, tmp_path):
    trainer = stubs.job(tmp_path, report=False)
    trainer.train()
    done = finished(trainer.output_dir)
    assert sorted(done.files) == ["results.json", "student.pth"]
    assert done.identity.rows.keys() == {"train", "val", "test"} and done.identity.settings["the teacher"] == "t1"
    seen = []
    again = stubs.job(tmp_path, stubs.Task({0: lambda: seen.append(finished(trainer.output_dir))}), resume="auto",
                      max_epoch=4)  # fmt: skip
    again.train()
    assert seen == [None] and finished(trainer.output_dir) is not None


def test_an_evaluation_tells_its_data(stubs, tmp_path):
    trainer = stubs.job(tmp_path, evaluate=True)
    trainer.train()
    done = finished(trainer.output_dir)
    assert done.identity.rows.keys() == {"val", "test"}
    data = results(trainer)["data"]
    assert data == {"rows": {"test": done.identity.rows["test"]}, "pictures": {"test": done.identity.pictures["test"]}}


def test_a_folder_in_use_is_refused_in_one_line(stubs, tmp_path):
    first = stubs.job(tmp_path, job_id="mine", max_epoch=1)
    for keys in ({}, {"resume": "auto"}, {"evaluate": True}):
        with pytest.raises(UserError, match=r"run\.output_dir: the run folder .*mine: another process .* is writing"):
            stubs.job(tmp_path, job_id="mine", max_epoch=1, **keys)
    first.train()
    assert not is_locked(first.output_dir) and not list((tmp_path / "stub").glob(".*.lock"))
    with pytest.raises(UserError, match="already holds a job"):
        stubs.job(tmp_path, job_id="mine", max_epoch=1)


def test_a_running_job_is_not_resumed(stubs, tmp_path):
    seen = []

    def resume():
        for resume in ("auto", str(next((tmp_path / "stub").glob("2*")))):
            with pytest.raises(UserError, match="is writing there; wait until it has ended or stop it") as caught:
                stubs.job(tmp_path, resume=resume)
            seen.append(len(caught.value.faults))

    stubs.job(tmp_path, stubs.Task({7: resume}), save_every=1).train()
    assert seen == [1, 1]


@pytest.mark.parametrize("how", ["never trained", "refused", "failed", "evaluated"])
def test_the_lock_goes_with_its_job(stubs, tmp_path, how):
    stubs.job(tmp_path, job_id="mine", max_epoch=1).train()
    folder = tmp_path / "stub" / "mine"
    if how == "refused":
        with pytest.raises(UserError, match="changed"):
            stubs.job(tmp_path, job_id="mine", resume="auto", rows=30)
    elif how == "failed":
        trainer = stubs.job(tmp_path, stubs.Task({0: stop}), job_id="mine", resume="auto", max_epoch=2)
        assert is_locked(folder)
        with pytest.raises(StopError):
            trainer.train()
    elif how == "evaluated":
        trainer = stubs.job(tmp_path, job_id="mine", resume="auto", max_epoch=1)
        trainer.train()
        with one_writer(folder, "a test"), pytest.raises(UserError, match="is writing there"):
            trainer.evaluate()
        trainer.evaluate()
    else:
        trainer = stubs.job(tmp_path, job_id="mine", resume="auto", max_epoch=1)
        assert is_locked(folder)
        del trainer
    assert not is_locked(folder)


def test_a_checkpoint_outside_of_a_run_folder_cannot_go_on(stubs, tmp_path):
    first = stubs.job(tmp_path, max_epoch=1)
    first.train()
    moved = shutil.copytree(checkpoint.step_file(first.output_dir, 5), tmp_path / "step-00000005")
    with pytest.raises(UserError, match=r"step-00000005 does not lie in <run folder>/checkpoints/"):
        stubs.job(tmp_path, max_epoch=2, resume=str(moved))
    evaluated = stubs.job(tmp_path, max_epoch=1, resume=str(moved), evaluate=True)
    assert evaluated.train()["test"]["r_mean"] == rows(first)["student"]


def test_the_exported_model_is_what_is_evaluated_later(stubs, tmp_path, caplog):
    first = stubs.job(tmp_path, max_epoch=1)  # its only validation comes after its last checkpoint
    first.train()
    evaluated = stubs.job(tmp_path, resume="auto", evaluate=True)
    assert evaluated.train()["test"]["r_mean"] == rows(first)["student"]
    assert "evaluating the best weights, of step 5" in caplog.text
    shutil.rmtree(checkpoint.best_file(first.output_dir, 5))
    with pytest.raises(UserError, match=r"best-00000005 does not exist: these are the best weights of the job"):
        stubs.job(tmp_path, resume=str(first.output_dir), evaluate=True)


def test_what_is_evaluated_is_told(stubs, tmp_path, caplog):
    first = stubs.job(tmp_path, valid_splits=[], max_epoch=1)
    first.train()
    evaluated = stubs.job(tmp_path, resume="auto", evaluate=True, valid_splits=[])
    assert evaluated.train()["test"]["r_mean"] == rows(first)["student"]
    assert "evaluating the last weights, of step 5: no best was chosen by then" in caplog.text


def test_an_evaluation_of_a_named_job_leaves_its_files_alone(stubs, tmp_path):
    first = stubs.job(tmp_path, job_id="mine", max_epoch=1)
    first.train()
    before = {path: path.read_bytes() for path in first.output_dir.rglob("*") if path.is_file()}
    evaluated = stubs.job(tmp_path, job_id="mine", resume="auto", evaluate=True)
    assert evaluated.train()["test"]["r_mean"] == rows(first)["student"]
    assert evaluated.output_dir.name == "mine-2"
    assert {path: path.read_bytes() for path in first.output_dir.rglob("*") if path.is_file()} == before


def test_a_finished_job_whose_checkpoints_are_gone_is_not_written_over(stubs, tmp_path):
    first = stubs.job(tmp_path, job_id="mine", max_epoch=1)
    first.train()
    shutil.rmtree(first.output_dir / "checkpoints")
    with pytest.raises(UserError, match=r"mine holds a job that is done, without checkpoints; give another name"):
        stubs.job(tmp_path, job_id="mine", resume="auto", max_epoch=1)
    assert finished(first.output_dir) is not None


@pytest.mark.parametrize("resume", ["x" * 300, "\0", "/dev/null", "/proc/1/mem/x"])
@pytest.mark.parametrize("evaluate", [False, True])
def test_an_odd_path_to_resume_is_a_line(stubs, tmp_path, resume, evaluate):
    with pytest.raises(UserError, match=r"run\.resume: ") as caught:
        stubs.job(tmp_path, resume=resume, evaluate=evaluate)
    assert len(caught.value.faults) == 1


# -- the disk


def status_of(trainer):
    return guarded(lambda: trainer.train() and None)


@pytest.mark.parametrize("at", [0, 2, 4, 7, 14])
def test_a_run_folder_that_is_removed_meanwhile_ends_the_job_with_a_line(stubs, tmp_path, capfd, at):
    def remove():
        (tmp_path / "stub").rename(tmp_path / "elsewhere")  # deleting would race with TensorBoard's own thread

    trainer = stubs.job(tmp_path, stubs.Task({at: remove}), log_freq=1)
    assert status_of(trainer) == EXIT_USER_ERROR
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "is gone" in errors[0]
    assert not trainer.output_dir.exists()


@pytest.mark.parametrize("at", [0, 4, 14])
def test_a_run_folder_that_takes_nothing_any_more(stubs, tmp_path, capfd, permissions_count, at):
    trainer = stubs.job(tmp_path, stubs.Task({at: lambda: lock(trainer.output_dir)}), log_freq=1)

    def lock(folder):
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o500 if path.is_dir() else 0o400)

    assert status_of(trainer) == EXIT_USER_ERROR
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot be written" in errors[0]
