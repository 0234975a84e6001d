"""Exceptions in the words of a user: lines for what can be put right outside of the program, none for its own bugs."""

from __future__ import annotations

import errno
import os
import re
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line

_SPACE = "free some space; what was written before stays, and run.resume=auto continues a training"
_PLACE = "permit it or name another place; outputs go to run.output_dir"
_FILES = "raise the limit of open files (ulimit -n), or lower run.num_workers"
_DISK = "the disk or its network fails; look at it, then run.resume=auto continues a training"
_GONE = "put it back or name another place; outputs go to run.output_dir, and run.resume=auto continues a training"
_MEMORY = (
    "lower run.batch_size_train, run.batch_size_eval, run.num_workers or run.match_memory_mb, or take a larger machine"
)
_WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR), _PLACE),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EREMOTEIO), _DISK),
    **dict.fromkeys((errno.ENOENT,), _GONE),
    **dict.fromkeys((errno.ENOMEM,), _MEMORY),
    **dict.fromkeys((errno.ENAMETOOLONG,), "give a shorter name"),
    **dict.fromkeys((errno.EFBIG,), "raise the limit of a file's size (ulimit -f), or write to another disk"),
}  # fmt: skip
_OTHER = "put that right; what was written before stays"
_NO_HOME = re.compile(r"[Cc]ould not determine home directory|[Cc]an't determine home directory|getpwuid\(\)")
_NO_MEMORY = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|CUDA (?:error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)
_SHARED_MEMORY = re.compile(r"(?:unable to|error) .*(?:/torch_|shared memory).*: (.+) \((\d+)\)")
_NO_FILES = "received 0 items of ancdata"  # a loader's process could not send a descriptor
_NO_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable")
_LOST_PEER = re.compile(r"gloo.*(?:[Cc]onnection|[Tt]imed out)|NCCL (?:error|communicator)|ncclRemoteError", re.DOTALL)
_PEER_ERRORS = ("DistNetworkError", "DistStoreError", "DistBackendError")
_LAST_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)(?:: |$)", re.MULTILINE)


def user_lines(error: BaseException) -> list[str] | None:
    """Return what went wrong and the way out, a line each; None where only the program itself can be at fault."""
    lines = _lines(error)
    return None if lines is None else [_shown(line) for line in lines]


def _lines(error: BaseException) -> list[str] | None:
    text = str(error)
    if isinstance(error, Exception) and text.startswith("Caught ") and "Original Traceback" in text:
        return _of_worker(error, text)
    if isinstance(error, UserError):
        return error.faults
    if isinstance(error, OSError):
        return [_of_system(error)]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return [f"out of memory{_because(text)}; {_MEMORY}"]
    if isinstance(error, RecursionError):
        return [f"something that the job reads is nested too deeply{_because(text)}; look at its YAML and JSON files"]
    if isinstance(error, SystemExit):
        return [_of_exit(error)]
    if isinstance(error, RuntimeError | KeyError | ValueError):
        return _of_runtime(error, text)
    return None


def _of_runtime(error: Exception, text: str) -> list[str] | None:
    if _NO_HOME.search(text):
        return [f"HOME: the user has no home folder and no name{_because(text)}; set HOME, USER and LAVIS_CACHE"]
    if _NO_MEMORY.search(text):
        return [f"out of memory{_because(text)}; {_MEMORY}"]
    if match := _SHARED_MEMORY.search(text):
        return [
            f"/dev/shm: {match[1]}{_because(text)}; lower run.num_workers, or give the container more shared memory"
        ]
    if _NO_FILES in text:
        return [f"too many files are open{_because(text)}; {_FILES}"]
    if _NO_THREADS.search(text):
        return [f"the system starts no more threads{_because(text)}; lower run.num_workers or raise ulimit -u"]
    if text.startswith("Error initializing torch.distributed"):
        return [f"{text}; start several processes by torchrun, which sets all of it"]
    if text.startswith("DataLoader worker"):
        return [f"run.num_workers: {text}; often memory (or /dev/shm) is short: lower run.num_workers, 0 loads without"]
    if type(error).__name__ in _PEER_ERRORS or _LOST_PEER.search(text):
        return [f"another process of this job is gone or cannot be reached{_because(text)}; its own log says why"]
    return None


def _of_system(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    what = error.strerror or (str(error) if any(error.args) else type(error).__name__)
    return f"{where}{what}; {_WAYS_OUT.get(error.errno or 0, _OTHER)}"


def _of_worker(error: Exception, text: str) -> list[str] | None:
    """Return the lines of an error that a loader's process sent: only its text is left, behind its traceback."""
    body = text[text.index("Original Traceback") :]
    last = [match for match in _LAST_ERROR.finditer(body) if match[1] == type(error).__name__]
    message = body[last[-1].end() :].strip() if last else ""
    if isinstance(error, UserError):
        return message.splitlines()
    if isinstance(error, OSError):
        return [f"{message or type(error).__name__}; {_OTHER}"]
    return _lines(type(error)(message))


def _of_exit(error: SystemExit) -> str:
    called = f"sys.exit({'' if error.code is None else one_line(repr(error.code), 80)})"
    frame = _caller(error)
    if frame is None:
        return f"{called} was called; a plug-in must raise an error or return, it cannot end the job"
    frame_of, number = frame
    name, file = frame_of.f_globals.get("__name__", "?"), frame_of.f_code.co_filename
    return f"plug-in {name}: {file}, line {number}, called {called}; it must raise an error or return, not end the job"


def _caller(error: SystemExit) -> tuple[FrameType, int] | None:
    """Return the innermost frame that is not of Python's own library: `argparse` may be what called sys.exit."""
    library = Path(sysconfig.get_path("stdlib"))
    chosen = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if "site-packages" in path.parts or library not in path.parents:
            chosen = frame, number
    return chosen


def _because(text: str) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), "").strip("'\"")
    return f" ({one_line(first, 200)})" if first else ""


def _shown(line: str) -> str:
    """Return the text as one line of a terminal."""
    return one_line(" ".join(line.splitlines()), 4000)
