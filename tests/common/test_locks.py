"""One writer a folder: against other processes, threads, forks, kills and odd lock files."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.locks import is_locked, one_writer

HOLD = """
import sys, time
from lavis_dcd.common.locks import one_writer
with one_writer(sys.argv[1], "the run folder"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "job")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_named_in_one_line(tmp_path, holder):
    assert is_locked(tmp_path / "job")
    with pytest.raises(UserError) as error, one_writer(tmp_path / "job", "the run folder"):
        pass
    (line,) = error.value.faults
    assert f"number {holder.pid} on" in line and str(tmp_path / "job") in line and "the run folder" in line


def test_a_link_to_the_folder_is_the_folder(tmp_path, holder):
    (tmp_path / "job").mkdir()
    (tmp_path / "alias").symlink_to("job")
    with pytest.raises(UserError, match="is writing there"), one_writer(tmp_path / "alias", "the run folder"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with one_writer(tmp_path / "job", "the run folder"):
        assert is_locked(tmp_path / "job")
    assert not is_locked(tmp_path / "job")
    assert list(tmp_path.iterdir()) == []


def test_one_that_waits_comes_after_the_other(tmp_path, holder):
    entered = threading.Event()

    def wait():
        with one_writer(tmp_path / "job", "the bank", wait=True):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not entered.wait(1.2)
    holder.kill()
    thread.join(30)
    assert entered.is_set()


def test_two_threads_of_one_process_exclude_each_other(tmp_path):
    with one_writer(tmp_path / "job", "x"), pytest.raises(UserError), one_writer(tmp_path / "job", "x"):
        pass
    with one_writer(tmp_path / "job", "x"), one_writer(tmp_path / "other", "x"):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    context = multiprocessing.get_context("fork")
    release = context.Event()
    with one_writer(tmp_path / "job", "x"):
        child = context.Process(target=release.wait, args=(60,))
        child.start()
    try:
        with one_writer(tmp_path / "job", "x"):
            assert child.is_alive()
    finally:
        release.set()
        child.join()


def test_a_forked_child_that_leaves_the_block_leaves_the_lock(tmp_path):
    with one_writer(tmp_path / "job", "x"):
        child = os.fork()
        if child == 0:
            try:
                block = one_writer(tmp_path / "unrelated", "x")
                block.__enter__()
                block.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert is_locked(tmp_path / "job")


def test_many_writers_never_meet(tmp_path):
    script = """
import sys
from pathlib import Path
from lavis_dcd.common.locks import one_writer
inside = Path(sys.argv[1]).with_name("inside")
for _ in range(20):
    with one_writer(sys.argv[1], "x", wait=True):
        inside.touch(exist_ok=False)
        inside.unlink()
"""
    jobs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "job")]) for _ in range(3)]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]


@pytest.mark.parametrize("make", ["link", "fifo", "folder"])
def test_what_is_no_lock_file_is_left_alone(tmp_path, make):
    lock, victim = tmp_path / ".job.lock", tmp_path / "victim"
    victim.write_text("precious")
    {"link": lambda: lock.symlink_to(victim), "fifo": lambda: os.mkfifo(lock), "folder": lock.mkdir}[make]()
    try:
        with one_writer(tmp_path / "job", "the run folder"):
            pass
    except UserError as error:
        assert "the run folder" in error.faults[0]
    assert victim.read_text() == "precious"


def test_a_parent_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"the bank .* cannot be written to"),
        one_writer(tmp_path / "file" / "x", "the bank"),
    ):
        pass


def test_a_lock_file_with_nonsense_in_it_names_nobody(tmp_path, holder):
    (tmp_path / ".job.lock").write_text("{" * 5000)
    with pytest.raises(UserError, match="another process is writing"), one_writer(tmp_path / "job", "x"):
        pass
