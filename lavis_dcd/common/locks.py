"""One writer a folder: a lock of the operating system, which goes when its process does."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from lavis_dcd.common.errors import UserError

log = logging.getLogger(__name__)

_POLL = 0.5  # seconds between two looks at a lock that another process holds
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def one_writer(path: str | os.PathLike[str], what: str, *, wait: bool = False, way_out: str = "") -> Iterator[None]:
    """Keep other processes, and other threads of this one, from writing to ``path`` while inside.

    The lock is on a file beside ``path``, ``.<name>.lock``, that tells who holds it. A killed process loses it at
    once; children that it forked do not keep it. Systems and disks without such locks go unlocked, with a warning.

    Args:
        path: a folder or a file, there or not.
        what: its words in a message, as in "the run folder".
        wait: wait for the other writer, with a line in the log, instead of raising.
        way_out: what the message tells the user to do; by default to wait for the other or name another place.

    Raises:
        UserError: another process writes there, and ``wait`` is false; or the lock's file cannot be made.
    """
    target = Path(path).resolve()
    lock = _lock_file(target)
    file = _acquire(lock, target, what, wait, way_out)
    if file is None:
        yield
        return
    try:
        yield
    finally:
        # taken away while it is still held: whoever waits then finds that its file is no longer the one with the name
        with suppress(OSError):
            if file.is_at(lock):
                lock.unlink()
        file.close()


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Return whether some process writes to ``path`` now."""
    system = _system_locks()
    if system is None:
        return False
    try:
        with _lock_file(Path(path).resolve()).open("rb") as handle:
            system.flock(handle, system.LOCK_SH | system.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no such file, or no locks on this disk
    return False


def _system_locks() -> ModuleType | None:
    try:
        import fcntl  # noqa: PLC0415  there is none on Windows
    except ImportError:
        return None
    return fcntl


class _LockFile:
    """An open lock file; a forked child (a loader's worker) lets go of it, for it may outlive a killed process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(reference()))

    def fileno(self) -> int:
        """Return its descriptor, for the system's calls."""
        if self._descriptor is None:
            raise ValueError("the lock was given back")
        return self._descriptor

    def is_at(self, path: Path) -> bool:
        """Return whether ``path`` still names this file; not for a forked child, which has let go of it."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def sign(self) -> None:
        """Write who holds the lock, for the message that others get."""
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(self.fileno(), 0)
            os.pwrite(self.fileno(), json.dumps(holder).encode(), 0)

    def holder(self) -> str:
        """Return who holds the lock, in words."""
        try:
            holder = json.loads(os.pread(self.fileno(), 1000, 0))
            return f"another process (number {int(holder['pid'])} on {holder['host']}, since {holder['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def close(self) -> None:
        """Give the lock back; doing so again changes nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _close(file: _LockFile | None) -> None:
    if file is not None:
        file.close()


def _acquire(lock: Path, target: Path, what: str, wait: bool, way_out: str) -> _LockFile | None:
    """Return the locked file, or None where there are no locks."""
    system = _system_locks()
    if system is None:
        return None
    told = False
    while True:
        file = _opened(lock, target, what)
        try:
            system.flock(file, system.LOCK_EX | system.LOCK_NB)
        except BlockingIOError:
            holder = file.holder()
            file.close()
            if not wait:
                raise UserError(_refusal(target, what, holder, way_out)) from None
            if not told:
                log.info("%s writes to %s (%s): waiting for it", holder, what, target)
                told = True
            time.sleep(_POLL)
            continue
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS_HERE:
                raise UserError(f"{what}: {lock} cannot be locked ({error.strerror}); choose another disk") from error
            log.warning("%s: the disk of %s has no locks; see to it that no other process writes there", what, target)
            return None
        # the holder before may have taken the file away: then this lock is on a file that nobody else can find
        if file.is_at(lock):
            file.sign()
            return file
        file.close()


def _refusal(target: Path, what: str, holder: str, way_out: str) -> str:
    way_out = way_out or "wait until it has ended, stop it, or name another place"
    return f"{what} {target}: {holder} is writing there; {way_out}"


def _opened(lock: Path, target: Path, what: str) -> _LockFile:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        # a link to somebody's file or a FIFO under this name is no lock of ours
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return _LockFile(os.open(lock, flags, 0o666))
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{what} {target}: cannot be written to ({why}); permit it or name another place") from error
