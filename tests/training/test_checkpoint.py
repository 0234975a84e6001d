import errno
import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import rng_state, seed_everything, set_rng_state
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import checkpoint
from lavis_dcd.training.checkpoint import STATE, TENSORS, DamagedError

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
    assert events == [checkpoint.TENSORS, checkpoint.STATE, temporary, "rename", "checkpoints"]


def test_auto_takes_the_newest_that_is_whole_and_says_what_it_passed_over(tmp_path, caplog):
    write(tmp_path / "a", 30, 1_000)
    write(tmp_path / "b", 10, 2_000)
    cut = write(tmp_path / "b", 20, 3_000) / checkpoint.TENSORS
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = write(tmp_path / "b", 21, 3_000) / checkpoint.STATE
    flipped.write_bytes(flipped.read_bytes().replace(b"abc", b"abd"))
    write(tmp_path / "b", 22, 3_000, format=3)
    (tmp_path / "b/checkpoints/step-00000023.pth").write_bytes(b"old")
    (tmp_path / "b/checkpoints/.step-00000030.x.tmp").mkdir()
    path, found = checkpoint.find("auto", tmp_path)
    assert path == checkpoint.step_file(tmp_path / "b", 10) and found["position"]["global_step"] == 10
    lines = [record.getMessage().removeprefix("passed over: run.resume: ") for record in caplog.records]
    size = len(flipped.with_name(checkpoint.TENSORS).read_bytes())
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
    set_rng_state(checkpoint.read(tmp_path / "rng"))
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


def assert_equal(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted


def test_what_is_written_is_read(tmp_path):
    checkpoint.write(tmp_path / "x", STATES)
    assert_equal(checkpoint.read(tmp_path / "x"), STATES)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [STATE, TENSORS]
    assert json.loads((tmp_path / "x" / STATE).read_text())["state"]["best"]["step"] == 10
    assert checkpoint.read_plain(tmp_path / "x")["best"] == STATES["best"]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$items"])
nested = st.recursive(
    plain | st.integers(0, 5).map(lambda n: torch.arange(n)),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(keys, nested))
def test_any_nesting_comes_back(tmp_path, content):
    checkpoint.write(tmp_path / "any", content)
    assert_equal(checkpoint.read(tmp_path / "any"), content)


def test_tied_and_overlapping_tensors(tmp_path):
    whole = torch.arange(12.0)
    content = {"a": whole, "b": whole, "part": whole[3:5], "turned": whole.reshape(3, 4).T}
    checkpoint.write(tmp_path / "x", content)
    found = checkpoint.read(tmp_path / "x")
    assert_equal(found, {**content, "turned": content["turned"].contiguous()})
    assert found["a"] is found["b"]


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


files = st.sampled_from([STATE, TENSORS])
relaxed = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(name=files, data=st.data())
def test_a_cut_at_any_byte_is_seen(sound, tmp_path, name, data):
    file = damaged_copy(sound, tmp_path) / name
    raw = file.read_bytes()
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    for read in (checkpoint.read, checkpoint.read_plain)[: 1 if name == TENSORS else 2]:
        with pytest.raises(DamagedError, match=f"{name} is (cut short|empty)"):
            read(tmp_path / "x")


@relaxed
@given(name=files, data=st.data())
def test_a_changed_byte_is_seen(sound, tmp_path, name, data):
    file = damaged_copy(sound, tmp_path) / name
    raw = bytearray(file.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    with pytest.raises(DamagedError, match=f"the checksum of {name} does not fit it|{name} is cut short"):
        checkpoint.read(tmp_path / "x")


@pytest.mark.parametrize("name", [STATE, TENSORS])
def test_a_missing_half_an_empty_half_and_a_folder_in_its_place(sound, tmp_path, name):
    file = damaged_copy(sound, tmp_path) / name
    file.unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        checkpoint.read(tmp_path / "x")
    file.write_bytes(b"")
    with pytest.raises(DamagedError, match=f"{name} is (empty|cut short)"):
        checkpoint.read(tmp_path / "x")
    file.unlink()
    file.mkdir()
    with pytest.raises(DamagedError, match=r"Is a directory|cut short"):
        checkpoint.read(tmp_path / "x")


def test_halves_of_two_checkpoints_do_not_pass_for_one(sound, tmp_path):
    path = damaged_copy(sound, tmp_path)
    checkpoint.write(tmp_path / "y", {**STATES, "model": {"a.weight": torch.zeros(2, 3)}})
    shutil.copy(tmp_path / "y" / TENSORS, path / TENSORS)
    with pytest.raises(DamagedError, match="tensors"):
        checkpoint.read(path)


def test_a_sound_checksum_over_nonsense(tmp_path):
    checkpoint.write(tmp_path / "x", {"model": torch.ones(1)})
    file = tmp_path / "x" / STATE
    body = file.read_bytes().partition(b"\n")[2].replace(b'"$tensor": "model"', b'"$tensor": "other"')
    file.write_bytes(b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body)
    with pytest.raises(DamagedError, match="does not fit"):
        checkpoint.read(tmp_path / "x")
