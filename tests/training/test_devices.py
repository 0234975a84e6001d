import ctypes
import gc
import logging
import sys
import tracemalloc

import pytest
import torch

from lavis_dcd.common.texts import memory_in_words
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import devices
from lavis_dcd.training.devices import MemoryPeaks, peak

CPU = torch.device("cpu")
WARM_UP, MEASURED = 100, 400
MB = 1e6


def test_a_phase_has_its_own_peak(caplog):
    if not devices._CLEAR.exists():
        pytest.skip("only Linux lets a peak start anew")
    peaks = MemoryPeaks(CPU)
    with caplog.at_level(logging.INFO, "lavis_dcd"):
        with peaks.phase("training"):
            torch.ones(50_000_000)  # 200 MB, and given back
        with peaks.phase("evaluation"):
            pass
        with peaks.phase("training"):
            pass
    found = peaks.facts()["peak_memory"]
    assert 190 < found["training"]["host_mb"] - found["evaluation"]["host_mb"] < 260
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "peak memory of training", "peak memory of evaluation", "peak memory of training",
    ]  # fmt: skip


def test_without_the_kernels_files_there_is_a_figure_all_the_same(monkeypatch, tmp_path):
    before = peak(CPU)["host_mb"]
    monkeypatch.setattr(devices, "_STATUS", tmp_path / "absent" / "status")
    monkeypatch.setattr(devices, "_CLEAR", tmp_path / "absent" / "clear")
    devices.restart(CPU)
    assert peak(CPU)["host_mb"] >= 0.9 * before > 10


def test_words():
    assert memory_in_words({"host_mb": 1234}) == "1,234 MB"
    assert memory_in_words({"host_mb": 812, "gpu_mb": 2345}) == "812 MB, on the GPU 2,345 MB"
    assert MemoryPeaks(CPU).facts() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_has_its_own_peak():
    device = torch.device("cuda", 0)
    peaks = MemoryPeaks(device)
    with peaks.phase("training"):
        torch.ones(50_000_000, device=device)
    with peaks.phase("evaluation"):
        pass
    found = peaks.facts()["peak_memory"]
    assert found["training"]["gpu_mb"] - found["evaluation"]["gpu_mb"] == pytest.approx(200, abs=5)


def resident() -> float:
    """Resident megabytes, freed memory given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = devices._STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")) / MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_do_not_grow(stubs, tmp_path):
    """Thousands of steps hold no more memory than hundreds, and leave no more objects behind."""
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


@pytest.mark.parametrize(
    ("workers", "here", "warned"),
    [(0, 1, False), (4, 1, False), (8, 1, False), (9, 1, True), (5, 2, True), (4000, 1, True)],
)
def test_loaders_far_above_the_cores_are_warned_of(monkeypatch, workers, here, warned):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    lines = devices.load_warnings(RunConfig(num_workers=workers))
    assert bool(lines) == warned
    if warned:
        assert lines[0].startswith(f"run.num_workers: {workers}") and "there are 4 cores" in lines[0]


def test_the_warning_of_loaders_stands_in_the_log(stubs, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    trainer = stubs.job(tmp_path, evaluate=True, num_workers=7)
    trainer.evaluate()
    assert "WARNING run.num_workers: 7, but there are 1 cores" in (trainer.output_dir / "log.txt").read_text()
