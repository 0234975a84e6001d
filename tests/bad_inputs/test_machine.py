"""A machine that lacks what the job asks for: a GPU, space, permission."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavis_dcd.banks.score_bank import BankTable, ScoreBank
from lavis_dcd.cli import EXIT_USER_ERROR, guarded
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.manifest import Identity
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


def test_a_disk_that_fills_at_the_score_bank(tmp_path, capsys):
    """safetensors says it in an exception of its own; the limit of a file's size stands for the disk."""
    table = BankTable(torch.zeros(2_000, 8, dtype=torch.int32), torch.zeros(2_000, 9))
    bank = ScoreBank(Identity({}, {}, {}), {}, {"image_to_text": table})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert guarded(lambda: bank.save(tmp_path / "bank")) == EXIT_USER_ERROR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err
    assert str(tmp_path / "bank") in line and "File too large" in line and line.count("\n") == 1
    assert list((tmp_path / "bank").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_change_no_status(tmp_path, closed):
    """The door that imports LAVIS itself; `python -m lavis.train` has LAVIS imported first, which wants its stderr."""
    for cfg_path, status in (("no-such.yaml", 2),):
        command = f'exec "$0" -m lavis_dcd.train --cfg-path {cfg_path} {closed}'
        done = subprocess.run(["sh", "-c", command, sys.executable], cwd=tmp_path, timeout=300)
        assert done.returncode == status


@pytest.mark.slow
def test_a_user_without_name_and_home_reads_one_line(tmp_path):
    """As `docker run --user 12345` has it; the number has no entry, and nothing says where its home is."""
    code = (
        "import os, pwd, sys\n"
        "def nobody(number): raise KeyError(f'getpwuid(): uid not found: {number}')\n"
        "pwd.getpwuid = nobody\n"
        "from lavis_dcd.train import main\n"
        "sys.exit(main(['--cfg-path', 'no-such.yaml']))\n"
    )
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, timeout=300, env=kept,
                          capture_output=True, text=True)  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "no-such.yaml: no such file" in errors[0], done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
