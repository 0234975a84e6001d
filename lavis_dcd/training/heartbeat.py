"""Signs of life among torchrun's processes: one that is stopped, not dead, is named while the others wait for it.

A process that dies closes its connections, which ends the job at once. One that is stopped (SIGSTOP, a debugger, a
machine that swaps) keeps them open, and the others would wait for half an hour without a word.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from typing_extensions import override

log = logging.getLogger(__name__)

BEAT = 5.0  # seconds between two signs
SILENT = 30.0  # seconds without one, after which a process is named

_PREFIX = "lavis_dcd/alive"


class Heartbeat(threading.Thread):
    """Writes signs of this process's life to a store, and warns of processes whose signs have stopped.

    The main process watches all others, and these watch the main one. The thread draws nothing at random, holds up no
    exit of the interpreter, and ends with the process group.

    Args:
        store: a connection of its own: a training's must not wait for this thread's.
        goes_on: whether there is still a group to watch.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, goes_on: Callable[[], bool] = dist.is_initialized
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._rank, self._goes_on = dist.PrefixStore(_PREFIX, store), rank, goes_on
        self._others = [other for other in range(world_size) if other != rank] if rank == 0 else [0]
        self._last: dict[int, tuple[bytes, float]] = {}
        self._silent: set[int] = set()
        self._ended = threading.Event()

    @override
    def run(self) -> None:
        me = f"{socket.gethostname()} {os.getpid()}"
        count, looked = 0, time.monotonic()
        with suppress(RuntimeError, OSError, ValueError):  # the store goes with the process that keeps it
            while self._goes_on():
                self._store.set(str(self._rank), f"{count} {me}")
                now = time.monotonic()
                if now - looked > SILENT / 2:  # this process itself was stopped: nobody else is to blame
                    self._last = {other: (sign, now) for other, (sign, _) in self._last.items()}
                looked, count = now, count + 1
                self._look(now)
                if self._ended.wait(BEAT):
                    return

    def stop(self) -> None:
        """End the thread, which takes no longer than an answer of the store."""
        self._ended.set()
        self.join(timeout=1.0)

    def _look(self, now: float) -> None:
        for other in self._others:
            sign = self._store.get(str(other)) if self._store.check([str(other)]) else b""
            before, since = self._last.setdefault(other, (sign, now))
            if sign != before:
                self._last[other] = sign, now
                if other in self._silent:
                    self._silent.discard(other)
                    log.warning("process %d%s answers again", other, _place(sign))
            elif now - since > SILENT and other not in self._silent:
                self._silent.add(other)
                log.warning(
                    "process %d%s has given no sign of life for %.0f s: it is stopped (kill -CONT lets it go on), or "
                    "its machine is; the others wait for it",
                    *(other, _place(sign), now - since),
                )


def _place(sign: bytes) -> str:
    _, _, place = sign.decode("utf-8", "replace").partition(" ")
    host, _, number = place.rpartition(" ")
    return f" (host {host}, pid {number})" if host else ""


def watch_ranks(store: Any, rank: int, world_size: int) -> None:
    """Start a heartbeat over the store of the process group that was just joined."""
    try:
        own = store.clone()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info("processes that stop are not named: %s", error)
        return
    heart = Heartbeat(own, rank, world_size)
    atexit.register(heart.stop)
    heart.start()
