import logging

import pytest
import torch

from lavis_dcd.common.texts import memory_in_words
from lavis_dcd.training import devices as memory
from lavis_dcd.training.devices import MemoryPeaks, peak

CPU = torch.device("cpu")


def test_a_phase_has_its_own_peak(caplog):
    if not memory._CLEAR.exists():
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
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent" / "status")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "clear")
    memory.restart(CPU)
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
