"""Ctrl-C, SIGTERM and SIGHUP that let the running step finish."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a door that imports this module need not wait for torch
    from lavis_dcd.training.devices import Process

log = logging.getLogger(__name__)

_SAME_KEY_PRESS = 1.0  # seconds within which a second Ctrl-C is the first, passed on by torchrun


class Terminated(KeyboardInterrupt):
    """SIGTERM: a cluster takes the machine back, or somebody ends the job. `status` is the command's exit status."""

    status = 128 + signal.SIGTERM  # as a shell names it


class HungUp(Terminated):
    """SIGHUP: the terminal is closed, or the connection to it is lost."""

    status = 128 + signal.SIGHUP


_ERRORS = {signal.SIGTERM: Terminated, signal.SIGHUP: HungUp}


def _terminations() -> list[signal.Signals]:
    """Return the signals that end a job after its step; SIGHUP is left alone where `nohup` has it ignored."""
    return [number for number in _ERRORS if signal.getsignal(number) != signal.SIG_IGN]


class InterruptGuard:
    """While inside, Ctrl-C, SIGTERM and SIGHUP only set `requested`; a second Ctrl-C raises KeyboardInterrupt at once.

    A second SIGTERM changes nothing: a cluster and torchrun may both send one. Leaving raises what was requested and
    not answered by then. Outside the main thread, where Python delivers no signals, the guard does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.terminated = False
        self.hung_up = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        self.requested = self.terminated = self.hung_up = False
        if threading.current_thread() is threading.main_thread():
            actions = {signal.SIGINT: self._note_interrupt, **dict.fromkeys(_terminations(), self._note_termination)}
            self._previous = {number: signal.signal(number, action) for number, action in actions.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, action in self._previous.items():
            signal.signal(number, action)
        self._previous = {}
        if kind is None and self.requested:  # since somebody last looked
            raise self._error(self.terminated, self.hung_up)

    def error(self, process: Process) -> KeyboardInterrupt:
        """Return what to raise once the step is finished and saved: the same in every process, which all must call."""
        return self._error(process.any(self.terminated), process.any(self.hung_up))

    @staticmethod
    def _error(terminated: bool, hung_up: bool) -> KeyboardInterrupt:
        return Terminated() if terminated else HungUp() if hung_up else KeyboardInterrupt()

    def _note_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since > _SAME_KEY_PRESS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = True, now
            log.warning("interrupted: finishing this step, then saving (Ctrl-C again stops at once)")

    def _note_termination(self, number: int, _frame: FrameType | None) -> None:
        if not self.requested:
            self._since = time.monotonic()
            log.warning("%s: finishing this step, then saving", signal.Signals(number).name)
        self.requested = True
        if number == signal.SIGHUP:
            self.hung_up = True
        else:
            self.terminated = True


@contextmanager
def terminations_raised() -> Iterator[None]:
    """While inside, SIGTERM raises `Terminated` and SIGHUP `HungUp`, so that files being written are cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _raise) for number in _terminations()}
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def _raise(number: int, _frame: FrameType | None) -> None:
    for other in _terminations():  # another one must not cut the clearing away short
        signal.signal(other, signal.SIG_IGN)
    raise _ERRORS[signal.Signals(number)]()
