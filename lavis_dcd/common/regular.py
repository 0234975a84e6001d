"""Regular files: opened without waiting, and only those whose size is in bounds."""

from __future__ import annotations

import io
import os
import stat

from lavis_dcd.common.texts import size_in_words

_KINDS = {
    stat.S_IFDIR: "it is a folder",
    stat.S_IFIFO: "it is a FIFO, which holds nothing",
    stat.S_IFSOCK: "it is a socket, which holds nothing",
    stat.S_IFCHR: "it is a device, whose bytes have no end",
    stat.S_IFBLK: "it is a device, not a file on it",
}
# without them, opening a FIFO waits for its other end, and opening a terminal may make it this process's
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


class IrregularError(Exception):
    """A path that is no regular file, or a file that is empty or too large; the reason, without the path."""


def open_regular(path: str | os.PathLike[str], most: int) -> io.FileIO:
    """Open a regular file, or the one at the end of a link, for reading.

    Nothing else is opened: opening a device may set it off. What the path stands for is looked at again after it is
    opened, since another process may have put something else there in between.

    Args:
        most: bytes that the file may have.

    Raises:
        IrregularError: it is no regular file (a folder, FIFO, socket or device), is empty, or has more bytes than
            ``most`` by its entry (a file of ``/proc`` is empty, or endless).
        OSError: it is missing, or cannot be opened.
        ValueError: the path holds a NUL.
    """
    _check(os.stat(path), most)
    descriptor = os.open(path, _FLAGS)
    try:
        _check(os.fstat(descriptor), most)
        return io.FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check(facts: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise IrregularError(_KINDS.get(stat.S_IFMT(facts.st_mode), "it is no regular file"))
    if facts.st_size == 0:
        raise IrregularError("the file is empty")
    if facts.st_size > most:
        raise IrregularError(
            f"a file of {size_in_words(facts.st_size)}, more than {size_in_words(most)}: make it smaller"
        )
