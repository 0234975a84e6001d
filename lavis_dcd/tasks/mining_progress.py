"""How far a mining is: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15


class Progress:
    """Counts scored pairs; a context.

    Args:
        total: pairs to score now.
        where: behind "pairs", as in " by this process".
    """

    def __init__(self, total: int, where: str = "") -> None:
        self._total, self._where, self._done = total, where, 0
        self._on_terminal = sys.stderr.isatty()
        self._redirect = logging_redirect_tqdm()

    def __enter__(self) -> Progress:
        self._began = self._told = time.monotonic()
        self._bar = tqdm(total=self._total, unit="pair", unit_scale=True, leave=False, disable=not self._on_terminal)
        if self._on_terminal:
            self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_terminal:
            self._redirect.__exit__(kind, error, trace)
        self._bar.close()

    def add(self, pairs: int) -> None:
        """After a shard of so many pairs."""
        first, now = not self._done, time.monotonic()
        self._done += pairs
        self._bar.update(pairs)
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate
        if first and left:
            log.info("%s pairs/s: about %s for all%s", _number(rate), duration(left), self._where)
        elif left and not self._on_terminal and now - self._told > SECONDS_BETWEEN_LINES:
            self._told = now
            share = 100 * self._done / self._total
            log.info(
                "%s of %s pairs%s (%.0f %%), %s pairs/s, %s left",
                f"{self._done:,}", f"{self._total:,}", self._where, share, _number(rate), duration(left),
            )  # fmt: skip

    def summary(self) -> str:
        """Pairs, time and rate."""
        seconds = time.monotonic() - self._began
        rate = self._done / max(seconds, 1e-9)
        return f"{self._done:,} pairs in {duration(seconds)} ({_number(rate)} pairs/s){self._where}"


def duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h 20 min", "5 d 3 h"."""
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
