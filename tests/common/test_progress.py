"""How far a long loop is, in log lines."""

from __future__ import annotations

import pytest

from lavis_dcd.common import progress as progress_module
from lavis_dcd.common.progress import duration, progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_an_estimate_after_the_first_shard_then_lines_at_times(clock, caplog):
    caplog.set_level("INFO")
    with progress(1000, "pair", " by this process") as pairs:
        for moment in (10.0, 11.0, 30.0, 100.0):
            clock[0] = moment
            pairs.add(250)
        summary = pairs.summary()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "25 pairs/s: about 30 s for all by this process",
        "750 of 1,000 pairs by this process (75 %), 25 pairs/s, 10 s left",
    ]
    assert summary == "1,000 pairs in 2 min (10 pairs/s) by this process"


def test_durations():
    said = [duration(seconds) for seconds in (0.2, 89, 600, 7260, 300000)]
    assert said == ["1 s", "89 s", "10 min", "2 h 01 min", "3 d 11 h"]
