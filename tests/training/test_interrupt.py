import os
import signal
import threading

import pytest

from lavis_dcd.training import interrupt
from lavis_dcd.training.devices import Process
from lavis_dcd.training.interrupt import HungUp, InterruptGuard, Terminated, terminations_raised

ALONE = Process(device=None)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, HungUp)]
)
def test_a_signal_is_noted_and_the_handlers_come_back(number, error):
    before = [signal.getsignal(other) for other in SIGNALS]
    with pytest.raises(error), InterruptGuard() as guard:
        assert not guard.requested
        send(number)
        assert guard.requested
        assert type(guard.error(ALONE)) is error
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_second_ctrl_c_stops_at_once_but_not_one_that_torchrun_passes_on(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), InterruptGuard():
        send(signal.SIGINT)
        clock[0] += 0.5
        send(signal.SIGINT)
        clock[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_any_number_of_sigterms_is_one():
    with pytest.raises(Terminated), InterruptGuard() as guard:
        for _ in range(5):
            send(signal.SIGTERM)
        assert guard.requested and guard.terminated


def test_an_error_inside_goes_first_and_a_new_start_forgets():
    guard = InterruptGuard()
    with pytest.raises(ValueError), guard:
        send(signal.SIGTERM)
        raise ValueError
    with guard:
        assert not guard.requested


def test_another_process_had_the_sigterm():
    class Both:
        def any(self, flag):
            return True

    assert type(InterruptGuard().error(Both())) is Terminated


def test_terminations_are_raised_once():
    before = signal.getsignal(signal.SIGTERM)
    cleared = []
    with pytest.raises(Terminated), terminations_raised():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            cleared.append(True)
    assert cleared and signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_touched():
    found = []

    def work():
        with InterruptGuard() as guard, terminations_raised():
            found.append(guard.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGTERM) is before


def test_sigterm_wins_over_sighup_and_each_has_its_status():
    with pytest.raises(Terminated) as caught, InterruptGuard() as guard:
        send(signal.SIGHUP)
        assert guard.requested and guard.hung_up and not guard.terminated
        send(signal.SIGTERM)
    assert type(caught.value) is Terminated and caught.value.status == 143
    with pytest.raises(HungUp) as caught, terminations_raised():
        send(signal.SIGHUP)
    assert caught.value.status == 129


def test_under_nohup_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminations_raised(), InterruptGuard() as guard:
            send(signal.SIGHUP)
            assert not guard.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_the_first_no_other_cuts_the_clearing_away_short():
    cleared = []
    with pytest.raises(HungUp), terminations_raised():
        try:
            send(signal.SIGHUP)
        finally:
            send(signal.SIGTERM)
            send(signal.SIGHUP)
            cleared.append(True)
    assert cleared
