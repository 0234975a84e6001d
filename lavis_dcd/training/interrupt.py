"""Ctrl-C and SIGTERM that let the running step finish."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lavis_dcd.training.devices import Process

log = logging.getLogger(__name__)

_SAME_KEY_PRESS = 1.0  # seconds within which a second Ctrl-C is the first, passed on by torchrun


class Terminated(KeyboardInterrupt):
    """SIGTERM: a cluster takes the machine back, or somebody ends the job."""


class InterruptGuard:
    """While inside, Ctrl-C and SIGTERM only set `requested`; a second Ctrl-C raises KeyboardInterrupt at once.

    A second SIGTERM changes nothing: a cluster and torchrun may both send one. Leaving raises what was requested and
    not answered by then. Outside the main thread, where Python delivers no signals, the guard does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.terminated = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        self.requested = self.terminated = False
        if threading.current_thread() is threading.main_thread():
            actions = {signal.SIGINT: self._note_interrupt, signal.SIGTERM: self._note_termination}
            self._previous = {number: signal.signal(number, action) for number, action in actions.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, action in self._previous.items():
            signal.signal(number, action)
        self._previous = {}
        if kind is None and self.requested:  # since somebody last looked
            raise self._error(self.terminated)

    def error(self, process: Process) -> KeyboardInterrupt:
        """Return what to raise once the step is finished and saved: the same in every process, which all must call."""
        return self._error(process.any(self.terminated))

    @staticmethod
    def _error(terminated: bool) -> KeyboardInterrupt:
        return Terminated() if terminated else KeyboardInterrupt()

    def _note_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since > _SAME_KEY_PRESS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = True, now
            log.warning("interrupted: finishing this step, then saving (Ctrl-C again stops at once)")

    def _note_termination(self, _number: int, _frame: FrameType | None) -> None:
        if not self.requested:
            self._since = time.monotonic()
            log.warning("SIGTERM: finishing this step, then saving")
        self.requested = self.terminated = True


@contextmanager
def terminations_raised() -> Iterator[None]:
    """While inside, SIGTERM raises `Terminated`, so that files being written are cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # another one must not cut the clearing away short
    raise Terminated
