import os

import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.runners import checkpoint
from lavis_dcd.runners.config import RunConfig
from lavis_dcd.runners.seeding import rng_state, seed_everything, set_rng_state

CONFIG = {
    "model": {"arch": "dcd", "loss": {"alpha": 0.2}},
    "datasets": {"own": {"build_info": {"images": "x"}}},
    "run": RunConfig().to_dict(),
}


def content(step=0, **changes):
    found = {
        "format": checkpoint.FORMAT,
        "model": {"w": torch.ones(1) * step},
        "optimizer": {},
        "scheduler": {},
        "scaler": {},
        "rng": rng_state(),
        "position": {"global_step": step, "world_size": 1},
        "best": None,
        "window": {},
        "config": CONFIG,
        "teacher_fingerprint": "abc",
    }
    return {**found, **changes}


def write(folder, step, time, **changes):
    path = checkpoint.step_file(folder, step)
    checkpoint.save(path, content(step, **changes))
    os.utime(path, ns=(time, time))
    return path


def test_save_is_all_or_nothing(tmp_path, monkeypatch):
    path = write(tmp_path, 1, 1)
    before = path.read_bytes()

    def half(_content, handle):
        handle.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, content(1))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_auto_takes_the_newest_that_can_be_read(tmp_path):
    write(tmp_path / "a", 30, 1_000)
    write(tmp_path / "b", 10, 2_000)
    broken = write(tmp_path / "b", 20, 3_000)
    broken.write_bytes(broken.read_bytes()[:-100])
    (broken.parent / ".step-00000030.pth.x.tmp").write_bytes(b"half")
    path, found = checkpoint.find("auto", tmp_path)
    assert path == checkpoint.step_file(tmp_path / "b", 10) and found["position"]["global_step"] == 10
    assert checkpoint.find("auto", tmp_path, job_id="a")[0] == checkpoint.step_file(tmp_path / "a", 30)
    assert checkpoint.find("auto", tmp_path / "nowhere") is None


def test_a_named_file_or_folder(tmp_path):
    path = write(tmp_path, 5, 1)
    assert checkpoint.find(str(path), tmp_path)[0] == path
    assert checkpoint.find(str(tmp_path), tmp_path)[0] == path


@pytest.mark.parametrize("kind", ["absent", "garbage", "student", "folder", "format"])
def test_what_cannot_be_resumed(tmp_path, kind):
    path = tmp_path / "x.pth"
    if kind == "garbage":
        path.write_bytes(b"no checkpoint")
    elif kind == "student":
        torch.save({"model": {}, "arch": "a", "config": {}}, path)
    elif kind == "format":
        torch.save(content(format=99), path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=r"run\.resume: .*x\.pth"):
        checkpoint.find(str(path), tmp_path)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(content(rng=Evil()), tmp_path / "x.pth")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


def test_prune_keeps_the_newest_and_their_best(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, step)
        checkpoint.save(checkpoint.best_file(tmp_path, step), {})
    checkpoint.prune(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"best-0000000{n}.pth" for n in (2, 3, 4)] + [f"step-0000000{n}.pth" for n in (3, 4)]


def test_nothing_refused_when_nothing_changed():
    changed = {**CONFIG, "run": {**CONFIG["run"], "resume": "auto", "max_epoch": 99, "num_workers": 3}}
    assert checkpoint.refusals(content(), changed, "abc", 1) == []


def test_each_change_is_named():
    changed = {
        "model": {"arch": "dcd", "loss": {"alpha": 0.5}},
        "datasets": {"own": {"build_info": {"images": "y"}}, "more": {}},
        "run": {**CONFIG["run"], "seed": 1},
    }
    lines = checkpoint.refusals(content(), changed, "abd", 2)
    assert any("teacher" in line and "abc" in line and "abd" in line for line in lines)
    for part in (
        "model.loss.alpha was 0.2 in the checkpoint, is 0.5 now",
        "datasets.own.build_info.images was 'x' in the checkpoint, is 'y' now",
        "datasets.more was None in the checkpoint, is {} now",
        "run.seed was 42 in the checkpoint, is 1 now",
        "number of processes was 1 in the checkpoint, is 2 now",
    ):
        assert any(part in line for line in lines), part
    assert len(lines) == 7


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(3)
    draw()
    torch.save(rng_state(), tmp_path / "rng.pth")
    expected = draw()
    seed_everything(4)
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == expected
