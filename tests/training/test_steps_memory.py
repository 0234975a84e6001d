"""Thousands of steps hold no more memory than hundreds, and leave no more objects behind."""

import ctypes
import gc
import sys
import tracemalloc

import pytest

from lavis_dcd.training import devices as memory

WARM_UP, MEASURED = 100, 400
MB = 1e6


def resident() -> float:
    """Resident megabytes, freed memory given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = memory._STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")) / MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_do_not_grow(stubs, tmp_path):
    readings = []

    def read():
        # traced memory knows Python's objects to the byte, the resident size whatever torch holds
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        readings.append((resident(), tracemalloc.get_traced_memory()[0] / MB))

    task = stubs.Task({WARM_UP: read, WARM_UP + MEASURED: read})
    steps = WARM_UP + MEASURED + 1  # with logs and checkpoints, and an epoch's end among them
    trainer = stubs.job(
        tmp_path, task, max_epoch=steps, max_steps=steps, log_freq=10, save_every=100, drop_last=False,
        valid_splits=[], test_splits=[], evaluate_teacher=False,
    )  # fmt: skip
    trainer.datasets["train"] = stubs.Pictures(800)
    try:
        trainer.train()
    finally:
        tracemalloc.stop()
    (first, _), (last, traced) = readings
    assert last - first < 5, f"{MEASURED} steps grew by {last - first:.1f} MB"
    assert traced < 1, f"{MEASURED} steps left {traced:.2f} MB of Python objects"
