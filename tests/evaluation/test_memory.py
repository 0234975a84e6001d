"""The bound holds: resident memory of whole evaluations, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FEATURES_MB = 196  # 600 pictures, 1,200 captions
LIMIT_MB = 30
# beside the limit: match_memory_mb (16) once and in copies, score tables (3 MB each), a batch of the encoder
MARGIN_MB = 70


def measured(limit_mb: float, k_test: int, source: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    script = Path(__file__).with_name("evaluation_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), str(limit_mb), str(k_test), source, str(folder)],
        capture_output=True, text=True, timeout=300,
        # or the C library keeps what was freed, as much as it happens to, and it counts as held
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By k_test: features in memory."""
    return {k: measured(4096, k, "fresh", tmp_path_factory.mktemp("free") / str(k)) for k in (0, 8)}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "k_test"), [("fresh", 0), ("fresh", 8), ("bank", 8)])
def test_memory_stays_below_the_setting(source: str, k_test: int, free: dict, tmp_path: Path) -> None:
    bounded = measured(LIMIT_MB, k_test, source, tmp_path / "files")
    assert bounded["extra_mb"] < LIMIT_MB + MARGIN_MB
    assert bounded["scores"] == free[k_test]["scores"]


@pytest.mark.slow
def test_features_in_memory_stand_there_once(free: dict) -> None:
    for found in free.values():
        assert 0.9 * FEATURES_MB < found["extra_mb"] < FEATURES_MB + MARGIN_MB
