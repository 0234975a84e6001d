"""The standard streams of a command: none of them, closed or broken, ends the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from lavis_dcd.common.secrets import hidden


class KeptStream:
    """A stream that takes every text: what it cannot write, because a pipe broke or a disk is full, is dropped.

    Values that came from the environment are written by the names of their variables.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        shown = hidden(text)
        with suppress(OSError, ValueError):  # ValueError: closed
            try:
                self._stream.write(shown)
            except UnicodeError:
                self._stream.write(shown.encode("ascii", "backslashreplace").decode("ascii"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts, each as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def kept_streams() -> Iterator[None]:
    """While inside, stdout and stderr are kept; a reader who has gone away changes neither work nor exit status."""
    _fill_standard_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (cast(TextIO, KeptStream(stream or nowhere)) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in before:
                _flush_for_good(stream)


def _fill_standard_descriptors() -> None:
    """Open the null device where a standard descriptor is closed: the next file would get its number, and be written to
    by libraries that complain to it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _flush_for_good(stream: TextIO | None) -> None:
    """Flush; where that fails, leave Python's own flush at its end nothing to fail at."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
