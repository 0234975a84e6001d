import errno
import os
import pickle
import shutil

import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import rng_state, seed_everything, set_rng_state
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import checkpoint
from lavis_dcd.training import checkpoint as state_folder

CONFIG = {"model": {"arch": "dcd"}, "datasets": {}, "run": RunConfig().to_dict()}


def content(step=0, **changes):
    found = {
        "format": checkpoint.FORMAT,
        "model": {"w": torch.ones(1) * step},
        "optimizer": {},
        "scheduler": {},
        "scaler": {},
        "health": {},
        "rng": rng_state(),
        "position": {"global_step": step, "world_size": 1},
        "best": None,
        "window": {},
        "config": CONFIG,
        "teacher_fingerprint": "abc",
        "data": {},
    }
    return {**found, **changes}


def write(folder, step, time, **changes):
    path = checkpoint.step_file(folder, step)
    checkpoint.save(path, content(step, **changes))
    os.utime(path, ns=(time, time))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file", [state_folder.TENSORS, state_folder.STATE])
def test_save_is_all_or_nothing(tmp_path, monkeypatch, file):
    path = write(tmp_path, 1, 1)
    before = contents(path)
    real = state_folder.sync

    def stop(synced):
        real(synced)
        if synced.name == file:
            raise KeyboardInterrupt

    monkeypatch.setattr(state_folder, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, content(2))
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_a_line_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    path = write(tmp_path, 1, 1)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_folder, "save_file", full)
    with pytest.raises(UserError, match=r"step-00000002 cannot be written \(No space left on device\)"):
        checkpoint.save(checkpoint.step_file(tmp_path, 2), content(2))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert checkpoint.load(path)["position"]["global_step"] == 1


def test_both_files_and_both_folders_reach_the_disk_before_and_after_the_name(tmp_path, monkeypatch):
    events = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(old, new):
        events.append("rename")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    checkpoint.save(checkpoint.step_file(tmp_path, 1), content(1))
    temporary = events[2]
    assert temporary.startswith(".step-00000001.")
    assert events == [state_folder.TENSORS, state_folder.STATE, temporary, "rename", "checkpoints"]


def test_auto_takes_the_newest_that_is_whole_and_says_what_it_passed_over(tmp_path, caplog):
    write(tmp_path / "a", 30, 1_000)
    write(tmp_path / "b", 10, 2_000)
    cut = write(tmp_path / "b", 20, 3_000) / state_folder.TENSORS
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = write(tmp_path / "b", 21, 3_000) / state_folder.STATE
    flipped.write_bytes(flipped.read_bytes().replace(b"abc", b"abd"))
    write(tmp_path / "b", 22, 3_000, format=3)
    (tmp_path / "b/checkpoints/step-00000023.pth").write_bytes(b"old")
    (tmp_path / "b/checkpoints/.step-00000030.x.tmp").mkdir()
    path, found = checkpoint.find("auto", tmp_path)
    assert path == checkpoint.step_file(tmp_path / "b", 10) and found["position"]["global_step"] == 10
    lines = [record.getMessage().removeprefix("passed over: run.resume: ") for record in caplog.records]
    size = len(flipped.with_name(state_folder.TENSORS).read_bytes())
    assert lines == [
        f"{tmp_path}/b/checkpoints/step-00000023.pth has format 1, this version reads 2",
        f"{tmp_path}/b/checkpoints/step-00000022 has format 3, this version reads 2",
        f"{tmp_path}/b/checkpoints/step-00000021 is not whole: the checksum of state.json does not fit it",
        f"{tmp_path}/b/checkpoints/step-00000020 is not whole: tensors.safetensors is cut short "
        f"({size - 100:,} of {size:,} bytes)",
    ]
    assert checkpoint.find("auto", tmp_path, job_id="a")[0] == checkpoint.step_file(tmp_path / "a", 30)
    assert checkpoint.find("auto", tmp_path / "nowhere") is None


def test_auto_does_not_start_anew_over_damaged_checkpoints(tmp_path):
    shutil.rmtree(write(tmp_path / "a", 1, 1))
    checkpoint.step_file(tmp_path / "a", 1).mkdir()
    with pytest.raises(UserError) as caught:
        checkpoint.find("auto", tmp_path)
    assert caught.value.faults == [
        f"run.resume: {tmp_path}/a/checkpoints/step-00000001 is not whole: state.json is missing",
        "run.resume: none of these 1 checkpoints is whole; move them away to start anew",
    ]


def test_auto_starts_anew_beside_checkpoints_of_an_earlier_version(tmp_path):
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    (tmp_path / "a/checkpoints/step-00000023.pth").write_bytes(b"old")
    assert checkpoint.find("auto", tmp_path) is None


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, caplog):
    write(tmp_path / "a", 1, 1)
    real = os.listdir

    def listdir(path):
        if str(path).endswith("b/checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    (tmp_path / "b/checkpoints").mkdir(parents=True)
    monkeypatch.setattr(os, "listdir", listdir)
    assert checkpoint.find("auto", tmp_path)[0] == checkpoint.step_file(tmp_path / "a", 1)
    assert f"{tmp_path}/b/checkpoints cannot be read (Permission denied)" in caplog.text


def test_a_named_checkpoint_or_run_folder(tmp_path):
    path = write(tmp_path, 5, 1)
    assert checkpoint.find(str(path), tmp_path)[0] == path
    assert checkpoint.find(str(tmp_path), tmp_path)[0] == path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "does not exist"),
        ("garbage", "is a file, not a checkpoint"),
        ("weights", "holds no state of a running job"),
        ("folder", "has no readable checkpoint in its folder checkpoints/"),
        ("format", "has format 99, this version reads 2"),
        ("fields", "lacks rng, window"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, kind, words):
    path = tmp_path / "x"
    if kind == "garbage":
        path.write_bytes(b"no checkpoint")
    elif kind == "weights":
        checkpoint.save(path, {"model": {}, "step": 3})
    elif kind == "format":
        checkpoint.save(path, content(format=99))
    elif kind == "fields":
        checkpoint.save(path, {key: value for key, value in content().items() if key not in ("rng", "window")})
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=rf"run\.resume: .*x {words}"):
        checkpoint.find(str(path), tmp_path)


def test_a_checkpoint_of_the_first_format_is_refused_unread(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "step-00000001.pth"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"has format 1 \(of an earlier version\), this version reads 2"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_prune_keeps_the_newest_and_the_best_that_they_speak_of(tmp_path):
    bests = {1: None, 2: 1, 3: 1, 4: 3}
    for step, best in bests.items():
        write(tmp_path, step, step, best=best and {"step": best, "metric": 1.0})
        checkpoint.save(checkpoint.best_file(tmp_path, step), {"model": {}})
    left = tmp_path / "checkpoints/.step-00000009.x.tmp"
    left.mkdir()
    checkpoint.prune(tmp_path, keep_last=2)
    assert names(tmp_path) == ["best-00000001", "best-00000003", "best-00000004", "step-00000003", "step-00000004"]
    checkpoint.prune(tmp_path, keep_last=1, keep_best=1)
    assert names(tmp_path) == ["best-00000003", "best-00000004", "step-00000004"]


def test_keep_best_keeps_more(tmp_path):
    write(tmp_path, 9, 9)
    for step in range(5):
        checkpoint.save(checkpoint.best_file(tmp_path, step), {"model": {}})
    checkpoint.prune(tmp_path, keep_last=1, keep_best=3)
    assert names(tmp_path) == ["best-00000002", "best-00000003", "best-00000004", "step-00000009"]


def test_discard_after(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step, step)
        checkpoint.save(checkpoint.best_file(tmp_path, step), {"model": {}})
    checkpoint.discard_after(tmp_path, 2)
    assert names(tmp_path) == ["best-00000001", "best-00000002", "step-00000001", "step-00000002"]


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_damaged_best_weights_are_told(tmp_path, caplog):
    path = checkpoint.best_file(tmp_path, 3)
    checkpoint.save(path, {"model": {"w": torch.ones(3)}})
    assert checkpoint.has_best(tmp_path, 3)
    (path / state_folder.TENSORS).unlink()
    assert not checkpoint.has_best(tmp_path, 3)
    assert "tensors.safetensors is missing; the best is chosen anew" in caplog.text


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(3)
    draw()
    state_folder.write(tmp_path / "rng", rng_state())
    expected = draw()
    seed_everything(4)
    set_rng_state(state_folder.read(tmp_path / "rng"))
    assert draw() == expected
