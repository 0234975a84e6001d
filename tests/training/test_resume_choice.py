import errno
import os
import shutil

import pytest
from checkpoints import content, sign, write, write_best

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.training import checkpoint
from lavis_dcd.training.resume_choice import find, find_weights, is_newest
from lavis_dcd.training.run_folder import write_run_manifest


def test_auto_takes_the_newest_that_is_whole_and_says_what_it_passed_over(tmp_path, caplog):
    write(tmp_path / "a", 30, 1_000)
    write(tmp_path / "b", 10, 2_000)
    cut = write(tmp_path / "b", 20, 3_000) / checkpoint.TENSORS
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = write(tmp_path / "b", 21, 3_000) / checkpoint.STATE
    flipped.write_bytes(flipped.read_bytes().replace(b"abc", b"abd"))
    write(tmp_path / "b", 22, 3_000, health={"skipped": -1, "in_row": 0, "last_taken": None})
    (tmp_path / "b/checkpoints/step-00000023.pth").write_bytes(b"old")
    (tmp_path / "b/checkpoints/.step-00000030.x.tmp").mkdir()
    found = find("auto", tmp_path)
    assert found.path == checkpoint.step_file(tmp_path / "b", 10) and found.step == 10
    lines = [record.getMessage().removeprefix("passed over: run.resume: ") for record in caplog.records]
    size = len(flipped.with_name(checkpoint.TENSORS).read_bytes())
    assert lines == [
        f"{tmp_path}/b/checkpoints/step-00000023.pth has format 1, this version reads 3",
        f"{tmp_path}/b/checkpoints/step-00000022: health.skipped: -1 is no whole number from 0 to 22",
        f"{tmp_path}/b/checkpoints/step-00000021 is not whole: the checksum of state.json does not fit it",
        f"{tmp_path}/b/checkpoints/step-00000020 is not whole: tensors.safetensors is cut short "
        f"({size - 100:,} of {size:,} bytes)",
    ]
    assert find("auto", tmp_path, job_id="a").path == checkpoint.step_file(tmp_path / "a", 30)
    assert find("auto", tmp_path / "nowhere") is None


def test_auto_does_not_start_anew_over_damaged_checkpoints(tmp_path):
    shutil.rmtree(write(tmp_path / "a", 1, 1))
    checkpoint.step_file(tmp_path / "a", 1).mkdir()
    with pytest.raises(UserError) as caught:
        find("auto", tmp_path)
    assert caught.value.faults == [
        f"run.resume: {tmp_path}/a/checkpoints/step-00000001 is not whole: manifest.json is missing",
        "run.resume: none of these 1 checkpoints is whole; move them away to start anew",
    ]


def test_auto_starts_anew_beside_checkpoints_of_an_earlier_version(tmp_path):
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    (tmp_path / "a/checkpoints/step-00000023.pth").write_bytes(b"old")
    assert find("auto", tmp_path) is None


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, caplog):
    write(tmp_path / "a", 1, 1)
    real = os.listdir

    def listdir(path):
        if str(path).endswith("b/checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    (tmp_path / "b/checkpoints").mkdir(parents=True)
    monkeypatch.setattr(os, "listdir", listdir)
    assert find("auto", tmp_path).path == checkpoint.step_file(tmp_path / "a", 1)
    assert f"{tmp_path}/b/checkpoints cannot be read (Permission denied)" in caplog.text


def test_a_named_checkpoint_or_run_folder(tmp_path):
    path = write(tmp_path, 5, 1)
    assert find(str(path), tmp_path).path == path
    assert find(str(tmp_path), tmp_path).path == path


@pytest.mark.parametrize("kind", ["two", "kind"])
def test_auto_does_not_start_anew_over_checkpoints_of_the_second_format(tmp_path, kind):
    path = write(tmp_path / "a", 4, 1)
    (path / "manifest.json").unlink()
    (path / checkpoint.STATE).write_text('{"sha256": "' + "0" * 64 + '",\n"tensors": {}, "state": {}}\n')
    with pytest.raises(UserError, match=r"step-00000004 has format 2 \(of an earlier version\), this version reads 3"):
        find("auto" if kind == "two" else str(tmp_path / "a"), tmp_path)


def test_a_folder_without_checkpoints_is_told(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"x has no readable checkpoint in its folder checkpoints/"):
        find(str(tmp_path / "x"), tmp_path)


def test_values_that_do_not_fit_the_job_are_passed_over(tmp_path, caplog):
    for step in (1, 2):
        write(tmp_path / "a", step, step)

    def fits(found):
        if found["position"]["global_step"] == 2:
            raise ValueError("optimizer.state: 7 is the number of no parameter")

    assert find("auto", tmp_path, fits=fits).step == 1
    assert "step-00000002: optimizer.state: 7 is the number of no parameter" in caplog.text


def test_the_newest_of_its_folder(tmp_path):
    first, second = write(tmp_path, 1, 9), write(tmp_path, 2, 3)
    assert is_newest(second) and not is_newest(first)
    checkpoint.remove(second)
    assert is_newest(first) and not is_newest(second)


BEST = {"step": 2, "metric": 1.0}


def test_weights_to_evaluate(tmp_path):
    for step, best in ((1, None), (4, BEST)):
        write(tmp_path / "a", step, step, best=best)
    write_best(tmp_path / "a", 2, model={"w": 2.0 * content(1)["model"]["w"]})
    at = (tmp_path / "a/checkpoints").joinpath
    for resume, number, words in (
        ("auto", 2, "the best weights, of step 2"),
        (str(tmp_path / "a"), 2, "the best weights, of step 2"),
        (str(at("step-00000004")), 4, "the weights of step 4, as run.resume names them"),
        (str(at("best-00000002")), 2, "the best weights, of step 2"),
    ):
        found = find_weights(resume, tmp_path)
        assert (float(found.model["w"]), found.words) == (number, words)
    shutil.rmtree(at("step-00000004"))
    found = find_weights("auto", tmp_path)
    assert found.words == "the last weights, of step 1: no best was chosen by then"
    assert find_weights("auto", tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["gone", "cut", "edited"])
def test_best_weights_that_are_gone_are_not_replaced_in_silence(tmp_path, damage):
    write(tmp_path / "a", 4, 4, best=BEST)
    write_best(tmp_path / "a", 2)
    path = checkpoint.best_file(tmp_path / "a", 2)
    if damage == "gone":
        shutil.rmtree(path)
    elif damage == "cut":
        (path / checkpoint.TENSORS).write_bytes(b"")
    else:
        (path / checkpoint.STATE).write_text('{"model": 3, "step": 2, "metric": 1.0}')
        sign(path)
    for resume in ("auto", str(tmp_path / "a")):
        with pytest.raises(UserError) as caught:
            find_weights(resume, tmp_path)
        (line,) = caught.value.faults
        named = tmp_path / "a/checkpoints/step-00000004"
        assert line.startswith(f"run.resume: {path}") and "these are the best weights of the job" in line
        assert line.endswith(f"run.resume={named} evaluates the last weights instead, of step 4")
    assert find_weights(str(named), tmp_path).words == "the weights of step 4, as run.resume names them"


def test_the_best_of_a_job_is_what_it_chose_after_its_last_checkpoint(tmp_path):
    write(tmp_path / "a", 4, 4, best=BEST)
    for step in (2, 4):
        write_best(tmp_path / "a", step)
    assert find_weights("auto", tmp_path).words == "the best weights, of step 4"
    shutil.rmtree(checkpoint.best_file(tmp_path / "a", 4))
    assert find_weights("auto", tmp_path).words == "the best weights, of step 2"
    write_run_manifest(tmp_path / "a", Identity(), [], 4)  # the job is done, and chose step 4
    with pytest.raises(UserError, match=r"best-00000004 does not exist: these are the best weights of the job"):
        find_weights("auto", tmp_path)
