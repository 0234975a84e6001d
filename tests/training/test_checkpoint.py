import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from checkpoints import assert_equal, content, write, write_best
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity, Manifest
from lavis_dcd.common.seeding import rng_state, seed_everything, set_rng_state
from lavis_dcd.training import checkpoint
from lavis_dcd.training.checkpoint import STATE, TENSORS, DamagedError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE])
def test_save_is_all_or_nothing(tmp_path, monkeypatch, file):
    path = write(tmp_path, 1, 1)
    before = contents(path)
    real = checkpoint.sync

    def stop(synced):
        real(synced)
        if synced.name == file:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, content(2))
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_a_line_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    path = write(tmp_path, 1, 1)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-00000002 cannot be written \(No space left on device\)"):
        checkpoint.save(checkpoint.step_file(tmp_path, 2), content(2))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert checkpoint.load(path).step == 1


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
    manifest, temporary = events[2:4]
    assert temporary.startswith(".step-00000001.") and manifest.startswith(".manifest.json.")
    files = [checkpoint.TENSORS, checkpoint.STATE, manifest]
    assert events == [*files, temporary, temporary, "rename", "checkpoints"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "does not exist"),
        ("garbage", "is a file, not a checkpoint"),
        ("folder", r"is not whole: manifest\.json is missing"),
        ("kind", "is not whole: manifest.json is of a folder of best weights, expected a checkpoint"),
        ("format", "is not whole: manifest.json has format 99, this version reads 3"),
        ("fields", ": state.json lacks rng, window"),
        ("more", ": state.json has 'code', which is foreign"),
        ("two", "has format 2 \\(of an earlier version\\), this version reads 3"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, monkeypatch, kind, words):
    path = tmp_path / "x"
    if kind == "garbage":
        path.write_bytes(b"no checkpoint")
    elif kind == "kind":
        checkpoint.save(path, {"model": {}, "step": 3, "metric": 0.0}, checkpoint.BEST_KIND)
    elif kind == "format":
        monkeypatch.setattr(checkpoint, "FORMAT", 99)
        checkpoint.save(path, content())
        monkeypatch.undo()
    elif kind == "fields":
        checkpoint.save(path, {key: value for key, value in content().items() if key not in ("rng", "window")})
    elif kind == "more":
        checkpoint.save(path, content(code=1))
    elif kind == "two":
        checkpoint.save(path, content())
        (path / "manifest.json").unlink()
        (path / STATE).write_text('{"sha256": "' + "0" * 64 + '",\n"tensors": {}, "state": {}}\n')
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=rf"run\.resume: .*x ?{words}"):
        checkpoint.load(path)


def test_best_weights_are_no_checkpoint(tmp_path):
    write_best(tmp_path, 3)
    with pytest.raises(UserError, match=r"best-00000003 holds no state of a running job; name a folder"):
        checkpoint.load(checkpoint.best_file(tmp_path, 3))


def test_a_checkpoint_of_the_first_format_is_refused_unread(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "step-00000001.pth"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"has format 1 \(of an earlier version\), this version reads 3"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_whose_name_is_of_another_step(tmp_path):
    path = write(tmp_path, 5, 1)
    path.rename(checkpoint.step_file(tmp_path, 6))
    with pytest.raises(UserError, match=r"step-00000006: position.global_step: 5, but the folder is of step 6"):
        checkpoint.load(checkpoint.step_file(tmp_path, 6))


def test_no_checkpoint_makes_a_run_folder_anew_that_is_gone(tmp_path):
    write(tmp_path / "job", 1, 1)
    shutil.rmtree(tmp_path / "job")
    with pytest.raises(UserError, match=r"step-00000002 cannot be written \(the folder .*job is gone\)"):
        checkpoint.save(checkpoint.step_file(tmp_path / "job", 2), content(2))
    assert not (tmp_path / "job").exists()


def test_prune_keeps_the_newest_and_the_best_that_they_speak_of(tmp_path):
    bests = {1: None, 2: 1, 3: 1, 4: 3}
    for step, best in bests.items():
        write(tmp_path, step, step, best=best and {"step": best, "metric": 1.0})
        write_best(tmp_path, step)
    left = tmp_path / "checkpoints/.step-00000009.x.tmp"
    left.mkdir()
    checkpoint.prune(tmp_path, keep_last=2)
    assert names(tmp_path) == ["best-00000001", "best-00000003", "best-00000004", "step-00000003", "step-00000004"]
    checkpoint.prune(tmp_path, keep_last=1, keep_best=1)
    assert names(tmp_path) == ["best-00000003", "best-00000004", "step-00000004"]


def test_keep_best_keeps_more(tmp_path):
    write(tmp_path, 9, 9)
    for step in range(5):
        write_best(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=1, keep_best=3)
    assert names(tmp_path) == ["best-00000002", "best-00000003", "best-00000004", "step-00000009"]


def test_discard_after(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step, step)
        write_best(tmp_path, step)
    checkpoint.discard_after(tmp_path, 2)
    assert names(tmp_path) == ["best-00000001", "best-00000002", "step-00000001", "step-00000002"]


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_damaged_best_weights_are_told(tmp_path, caplog):
    path = checkpoint.best_file(tmp_path, 3)
    write_best(tmp_path, 3, model={"w": torch.ones(3)})
    assert checkpoint.has_best(tmp_path, 3)
    (path / checkpoint.TENSORS).unlink()
    assert not checkpoint.has_best(tmp_path, 3)
    assert "tensors.safetensors is missing; the best is chosen anew" in caplog.text


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(3)
    draw()
    checkpoint.write(tmp_path / "rng", rng_state())
    expected = draw()
    seed_everything(4)
    set_rng_state(checkpoint.read(tmp_path / "rng")[0])
    assert draw() == expected


# -- the two files of a checkpoint --------------------------------------------------------------------------------

STATES = {
    "model": {"a.weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.98)}]},
    "rng": {"python": (3, (1, 2**64), None), "torch": torch.arange(9, dtype=torch.uint8)},
    "best": {"step": 10, "metric": 0.1 + 0.2},
    "flags": [True, False, None, "é", -1],
    "$odd": {"$tensor": "no tensor"},
    "empty": torch.empty(0, 4),
}


def test_what_is_written_is_read(tmp_path):
    checkpoint.write(tmp_path / "x", STATES)
    assert_equal(checkpoint.read(tmp_path / "x")[0], STATES)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["manifest.json", STATE, TENSORS]
    assert json.loads((tmp_path / "x" / STATE).read_text())["best"]["step"] == 10
    assert checkpoint.read_plain(tmp_path / "x")["best"] == STATES["best"]


def test_other_objects_are_no_state(tmp_path):
    with pytest.raises(TypeError, match="/model/0 is a set"):
        checkpoint.write(tmp_path / "x", {"model": [{1}]})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "step-00000001"
    checkpoint.write(path, STATES)
    return path


def damaged_copy(sound, folder):
    shutil.rmtree(folder / "x", ignore_errors=True)
    return shutil.copytree(sound, folder / "x")


files = st.sampled_from([STATE, TENSORS, "manifest.json"])
relaxed = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(name=files, data=st.data())
def test_a_cut_at_any_byte_is_seen(sound, tmp_path, name, data):
    file = damaged_copy(sound, tmp_path) / name
    raw = file.read_bytes()
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    for read in (checkpoint.read, checkpoint.read_plain)[: 1 if name == TENSORS else 2]:
        with pytest.raises(DamagedError, match=f"{name} is (cut short|no manifest)"):
            read(tmp_path / "x")


@relaxed
@given(name=files, data=st.data())
def test_a_changed_byte_is_seen(sound, tmp_path, name, data):
    file = damaged_copy(sound, tmp_path) / name
    raw = bytearray(file.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    with pytest.raises(DamagedError, match=name):
        checkpoint.read(tmp_path / "x")


@pytest.mark.parametrize("name", [STATE, TENSORS, "manifest.json"])
def test_a_missing_part_an_empty_one_and_a_folder_in_its_place(sound, tmp_path, name):
    file = damaged_copy(sound, tmp_path) / name
    file.unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        checkpoint.read(tmp_path / "x")
    file.write_bytes(b"")
    with pytest.raises(DamagedError, match=f"{name} is (cut short|no manifest)"):
        checkpoint.read(tmp_path / "x")
    file.unlink()
    file.mkdir()
    with pytest.raises(DamagedError, match=f"{name} is no file"):
        checkpoint.read(tmp_path / "x")


def test_halves_of_two_checkpoints_do_not_pass_for_one(sound, tmp_path):
    path = damaged_copy(sound, tmp_path)
    checkpoint.write(tmp_path / "y", {**STATES, "model": {"a.weight": torch.zeros(2, 3)}})
    shutil.copy(tmp_path / "y" / TENSORS, path / TENSORS)
    with pytest.raises(DamagedError, match="tensors"):
        checkpoint.read(path)


def test_a_sound_manifest_over_nonsense(tmp_path):
    checkpoint.write(tmp_path / "x", {"model": torch.ones(1)})
    for text in (
        '{"model": {"$tensor": "other"}}',
        "[]",
        "{",
        "[" * 100_000,
        '{"$tuple": [1]}',
        '{"$items": [[[], 1]]}',
    ):
        (tmp_path / "x" / STATE).write_text(text)
        Manifest.of(tmp_path / "x", (TENSORS, STATE), kind="checkpoint", format=3, identity=Identity()).write(
            tmp_path / "x"
        )
        with pytest.raises(DamagedError, match=r"does not fit|is no section"):
            checkpoint.read(tmp_path / "x")
