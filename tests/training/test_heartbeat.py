"""A process that is stopped is named by the others."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from lavis_dcd.training import heartbeat
from lavis_dcd.training.heartbeat import Heartbeat


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT", 1.0)


def until(happens) -> None:
    """Wait for what another thread does; a test that waits in vain fails after a minute."""
    for _ in range(3000):
        if happens():
            return
        time.sleep(0.02)
    raise TimeoutError


class Stoppable(Heartbeat):
    """Stops giving signs, as a process does that gets SIGSTOP."""

    stopped = False

    def _look(self, now: float) -> None:
        super()._look(now)
        while self.stopped:
            time.sleep(0.01)


@pytest.mark.parametrize(("stopped", "watcher"), [(1, 0), (0, 1), (2, 0)])
def test_the_one_that_stops_is_named_and_welcomed_back(quick, caplog, stopped, watcher):
    store = dist.HashStore()
    hearts = [Stoppable(store, rank, 3, goes_on=lambda: True) for rank in range(3)]
    for heart in hearts:
        heart.start()
    until(lambda: all(heart._last for heart in hearts))
    with caplog.at_level(logging.WARNING):
        hearts[stopped].stopped = True
        until(lambda: caplog.messages)
        me = f"(host {socket.gethostname()}, pid {os.getpid()})"
        assert all(line.startswith(f"process {stopped} {me} has given no sign of life for") for line in caplog.messages)
        until(lambda: stopped in hearts[watcher]._silent)
        hearts[stopped].stopped = False
        until(lambda: f"process {stopped} {me} answers again" in caplog.messages)
    for heart in hearts:
        heart.stop()
        assert not heart.is_alive()


def test_it_ends_with_the_group_and_with_the_store(quick):
    alive = [True]
    heart = Heartbeat(dist.HashStore(), 0, 2, goes_on=lambda: alive[0])
    heart.start()
    alive[0] = False
    heart.join(60)
    assert not heart.is_alive()

    class Gone:
        def set(self, *_):
            raise RuntimeError("the store is gone")

    heart = Heartbeat(dist.HashStore(), 0, 2, goes_on=lambda: True)
    heart._store = Gone()
    heart.run()


def test_who_was_stopped_itself_blames_nobody(quick, caplog):
    """After a machine wakes up, the others' signs are as old as its own sleep."""
    store = dist.HashStore()
    first = Stoppable(store, 0, 2, goes_on=lambda: True)
    prefixed = dist.PrefixStore("lavis_dcd/alive", store)
    prefixed.set("1", "1 host 7")
    first.start()
    until(lambda: 1 in first._last)
    first.stopped = True
    time.sleep(1.2)
    first.stopped = False
    prefixed.set("1", "2 host 7")
    until(lambda: first._last[1][0].startswith(b"2"))
    first.stop()
    assert not caplog.messages


def test_no_exit_waits_for_it():
    code = (
        "import torch.distributed as dist\nfrom lavis_dcd.training import heartbeat\n"
        "dist.is_initialized = lambda: True\n"
        "heartbeat.Heartbeat.__init__.__defaults__ = (lambda: True,)\n"
        "heartbeat.watch_ranks(dist.FileStore('store', 2), 0, 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
