"""Paths that are no regular files, or files out of bounds: told at once, and never opened."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lavis_dcd.common import regular
from lavis_dcd.common.regular import IrregularError, open_regular


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """An open that waits for ever becomes a failure."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        with open_regular(tmp_path / name, 3) as file:
            assert file.read() == b"abc"


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "it is a FIFO, which holds nothing"),
        (Path.mkdir, "it is a folder"),
        (_socket, "it is a socket, which holds nothing"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, whose bytes have no end"),
        (lambda path: path.symlink_to("/proc/self/status"), "the file is empty"),  # as its entry says
        (Path.touch, "the file is empty"),
    ],
    ids=["fifo", "folder", "socket", "device", "proc", "empty"],
)
def test_all_else_is_refused_unopened(tmp_path, monkeypatch, make, reason):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    make(Path("x"))
    monkeypatch.setattr(regular.os, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(IrregularError, match=f"^{reason}$"):
        open_regular("x", 100)


def test_a_size_out_of_bounds_is_read_from_the_entry(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**40)  # a terabyte that takes no room
    with pytest.raises(IrregularError, match=r"^a file of 1099\.5 GB, more than 100\.0 MB: make it smaller$"):
        open_regular(tmp_path / "x", 100_000_000)
    os.truncate(tmp_path / "x", 11)
    with pytest.raises(IrregularError):
        open_regular(tmp_path / "x", 10)
    open_regular(tmp_path / "x", 11).close()


def test_a_fifo_put_in_the_place_of_a_file_in_between_does_not_hang(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"abc")
    os.mkfifo(tmp_path / "fifo")
    facts, before = os.stat(tmp_path / "file"), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(
        regular, "os", SimpleNamespace(**{**vars(os), "stat": lambda path: facts, "fstat": os.fstat})
    )  # fmt: skip
    with pytest.raises(IrregularError, match="FIFO"):
        open_regular(tmp_path / "fifo", 100)
    assert len(os.listdir("/proc/self/fd")) == before  # closed again


def test_what_the_system_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none", 1)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "loop", 1)
    with pytest.raises(ValueError, match="null byte"):
        open_regular(f"{tmp_path}/a\0b", 1)
