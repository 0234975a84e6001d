"""A machine that lacks what the job asks for: a GPU, space, permission."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lavis_dcd.cli import EXIT_USER_ERROR, guarded
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.devices import this_process
from lavis_dcd.training.run_folder import new_run_folder


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)


MACHINE = {
    "a GPU": ({"device": "cuda"}, "run.device: cuda is not available here; set run.device=auto or cpu"),
    "half precision": (
        {"amp": "fp16"},
        "run.amp: fp16 needs CUDA; on a CPU set run.amp=bf16 or off",
    ),
    "half precision on a CPU": (
        {"amp": "fp16", "device": "cpu"},
        "run.amp: fp16 needs CUDA; on a CPU set run.amp=bf16 or off",
    ),
}


@pytest.mark.parametrize("name", MACHINE)
def test_asked_for_and_not_there(no_gpu, name):
    keys, message = MACHINE[name]
    with pytest.raises(UserError) as caught:
        this_process(RunConfig(**keys))
    assert caught.value.faults == [message]


def test_without_a_wish_the_cpu_serves(no_gpu):
    assert this_process(RunConfig()).device.type == "cpu"


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch, where, before):
    target = tmp_path / "x"
    if before is not None:
        target.write_bytes(before)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where != "write":
        monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left on device"), atomic_write(target) as handle:
        handle.write(b"new")
        if where == "write":
            full()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["x"])
    assert before is None or target.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_dev_full_is_how_a_full_disk_looks():
    with pytest.raises(OSError) as caught, open("/dev/full", "wb") as handle:
        handle.write(b"x")
        handle.flush()
    assert caught.value.errno == errno.ENOSPC


SPACE = "free some space; what was written before stays, and run.resume=auto continues a training"
PLACE = "permit it or name another place; outputs go to run.output_dir"
REFUSED = {
    "no space": (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "No space left on device; " + SPACE),
    "over the quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"), "Disk quota exceeded; " + SPACE),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "Permission denied; " + PLACE),
    "a read-only disk": (
        OSError(errno.EROFS, "Read-only file system", "/data/x"),
        "Read-only file system; " + PLACE,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_disk_that_takes_nothing_is_one_line(capsys, name):
    error, message = REFUSED[name]

    def work() -> None:
        raise error

    assert guarded(work) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: /data/x: {message}\n"


@pytest.mark.usefixtures("permissions_count")
def test_an_output_folder_that_may_not_be_written(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert guarded(lambda: new_run_folder(tmp_path / "job", RunConfig(), "x") and None) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: {tmp_path / 'job'}: Permission denied; {PLACE}\n"
