"""The lines that exceptions become."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.faults import user_lines


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (MemoryError(), "out of memory; lower run.batch_size_train"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory (CUDA out of memory."),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
         "out of memory ("),
        (RecursionError("maximum recursion depth exceeded"), "something that the job reads is nested too deeply"),
        (RuntimeError("Could not determine home directory."), "HOME: the user has no home folder"),
        (KeyError("getpwuid(): uid not found: 12345"), "HOME: the user has no home folder and no name (getpwuid()"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "run.num_workers: DataLoader worker"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
         "another process of this job is gone"),
        (RuntimeError("unable to write to file </torch_7_8_9>: No space left on device (28)"),
         "/dev/shm: No space left on device (unable to write"),
        (RuntimeError("received 0 items of ancdata"), "too many files are open (received 0 items of"),
        (RuntimeError("can't start new thread"), "the system starts no more threads"),
        (ValueError("Error initializing torch.distributed using env:// rendezvous: environment variable MASTER_ADDR "
                    "expected, but not set"), "Error initializing torch.distributed using env://"),
        (torch.distributed.DistNetworkError("the peer is gone"), "another process of this job is gone"),
        (OSError(None, None), "OSError; put that right"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer; "),
        (UserError("a line\nof two"), "a line of two"),
    ],
)  # fmt: skip
def test_what_is_no_bug_is_one_line(error, start):
    (line,) = user_lines(error)
    assert line.startswith(start) and "\n" not in line


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), KeyError("model"), ValueError("x"), AttributeError("y"), ZeroDivisionError()],
)
def test_a_bug_has_no_line(error):
    assert user_lines(error) is None


def test_a_lack_of_memory_that_torch_meets():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert user_lines(caught.value)[0].startswith("out of memory (")


class Failing(Dataset):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError(["a.png: is no picture", "b.png: is none"]), ["a.png: is no picture", "b.png: is none"]),
        (OSError(5, "Input/output error", "a.png"),
         ["[Errno 5] Input/output error: 'a.png'; put that right; what was written before stays"]),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
         "/dev/shm: Too many open files (unable to open"),
        (ZeroDivisionError("a bug"), None),
        (RuntimeError("a bug"), None),
        (SystemExit(0), "run.num_workers: DataLoader worker (pid"),
    ],
)  # fmt: skip
def test_an_error_of_a_loaders_process(error, expected):
    with pytest.raises((Exception, SystemExit)) as caught:
        list(DataLoader(Failing(error), num_workers=1, multiprocessing_context="fork"))
    found = user_lines(caught.value)
    assert found == expected or (isinstance(expected, str) and found[0].startswith(expected))


def test_a_plug_in_that_ends_the_job_is_named():
    with pytest.raises(SystemExit) as caught:
        sys.exit(0)
    (line,) = user_lines(caught.value)
    assert line.startswith(f"plug-in {__name__}: {__file__}, line ") and "called sys.exit(0); it must raise" in line
    with pytest.raises(SystemExit) as caught:
        argparse.ArgumentParser().parse_args(["--nothing"])
    assert __file__ in user_lines(caught.value)[0]
