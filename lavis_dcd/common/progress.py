"""The state of a long loop: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15


@contextmanager
def progress_bar(
    total: int, unit: str, done: int = 0, label: str = "", active: bool = True, scale: bool = False
) -> Iterator[tqdm[Any]]:
    """Show a bar on a terminal, nothing elsewhere; log lines print above it.

    Args:
        total: of the units to do.
        unit: a noun in the singular.
        done: units that were done before.
        label: in front of the bar.
        active: False never shows it.
        scale: shorten large counts, as in 12k.
    """
    shown = active and sys.stderr.isatty()
    with ExitStack() as stack:
        if shown:
            stack.enter_context(logging_redirect_tqdm())
        bar = tqdm(total=total, initial=done, desc=label, unit=unit, unit_scale=scale, leave=False, disable=not shown)
        yield stack.enter_context(bar)


class Progress:
    """Counts units as they are done, with their rate: an estimate after the first ones, then lines where no bar is.

    Args:
        total: of the units to do.
        unit: a noun in the singular.
        where: behind the counts, as in " by this process".
        bar: of the same units.
    """

    def __init__(self, total: int, unit: str, where: str, bar: tqdm[Any]) -> None:
        self._total, self._units, self._where, self._bar, self._done = total, f"{unit}s", where, bar, 0
        self._began = self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Count units that were done."""
        first, now = not self._done, time.monotonic()
        self._done += count
        self._bar.update(count)
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate
        if first and left:
            log.info("%s %s/s: about %s for all%s", _number(rate), self._units, duration(left), self._where)
        elif left and self._bar.disable and now - self._told > SECONDS_BETWEEN_LINES:
            self._told = now
            counts = f"{self._done:,} of {self._total:,} {self._units}{self._where}"
            share = 100 * self._done / self._total
            log.info("%s (%.0f %%), %s %s/s, %s left", counts, share, _number(rate), self._units, duration(left))

    def summary(self) -> str:
        """Return count, time and rate in words."""
        seconds = time.monotonic() - self._began
        rate = _number(self._done / max(seconds, 1e-9))
        return f"{self._done:,} {self._units} in {duration(seconds)} ({rate} {self._units}/s){self._where}"


@contextmanager
def progress(total: int, unit: str, where: str = "") -> Iterator[Progress]:
    """Count units of which there are ``total``; see :class:`Progress`."""
    with progress_bar(total, unit, scale=True) as bar:
        yield Progress(total, unit, where, bar)


def duration(seconds: float) -> str:
    """Return a time in words: "42 s", "12 min", "3 h 20 min", "5 d 3 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
