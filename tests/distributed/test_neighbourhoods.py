"""Jobs whose batches are neighbourhoods: two processes train as one, and a resumed job as one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

TWO = ("--nproc_per_node=2",)
BATCHES = {"by": "teacher", "size": 3, "share": 0.75, "neighbours": 4}


def distilled(teacher: dict, student: dict) -> dict:
    return {"arch": "dcd", "teacher": teacher, "student": student, "selection": {"hard_negatives": 3},
            "share_encoders": False}  # fmt: skip


def weights_of(tmp_path: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(tmp_path / "output" / "job" / name / "student.pth", weights_only=True)["model"]


def table_of(tmp_path: Path, name: str) -> bytes:
    return (tmp_path / "output" / "job" / name / "neighbours.safetensors").read_bytes()


def test_two_processes_train_as_one(write_job, finished, metrics, tmp_path, teacher, dual):
    model = distilled(teacher, dual)
    finished(write_job("random", model, batch_size_train=8, eps=1e-4))
    finished(write_job("one", model, batch_size_train=8, eps=1e-4, batches=BATCHES))
    finished(write_job("two", model, batch_size_train=4, eps=1e-4, batches=BATCHES), *TWO)
    assert table_of(tmp_path, "one") == table_of(tmp_path, "two")
    one, two, other = (metrics(name, "train") for name in ("one", "two", "random"))
    assert len(one) == len(two) == 4
    for line_one, line_two in zip(one, two, strict=True):
        assert line_two["loss"] == pytest.approx(line_one["loss"], rel=1e-5, abs=1e-5)
    for name, value in weights_of(tmp_path, "one").items():
        torch.testing.assert_close(weights_of(tmp_path, "two")[name], value, rtol=1e-5, atol=1e-5)
    assert [line["loss"] for line in other] != [line["loss"] for line in one]


def test_a_resumed_job_ends_as_one_that_never_stopped(write_job, finished, tmp_path, teacher, dual):
    model = distilled(teacher, dual)
    run = {"batch_size_train": 4, "max_steps": 6, "batches": BATCHES, "lr_sched": "constant"}
    finished(write_job("whole", model, **run))
    finished(write_job("parted", model, **{**run, "max_steps": 3}))  # in the middle of the first epoch
    finished(write_job("parted", model, **run, resume="auto"))
    assert table_of(tmp_path, "whole") == table_of(tmp_path, "parted")
    for name, value in weights_of(tmp_path, "whole").items():
        assert torch.equal(weights_of(tmp_path, "parted")[name], value), name


def test_kept_features_make_the_same_neighbourhoods(write_job, finished, tmp_path, teacher):
    student = {"init_from_teacher": {"layers": [1]}}
    frozen = {**teacher, "vision": {**teacher["vision"], "freeze": True}, "text": {**teacher["text"], "freeze": True}}
    model = {"arch": "dcd", "teacher": frozen, "student": student, "selection": {"hard_negatives": 3}}
    for name, kept in (("fresh", "off"), ("kept", "memory")):
        run = {"batch_size_train": 8, "batches": BATCHES, "cache_features": kept, "cache_dtype": "float32"}
        finished(write_job(name, model, **run))
    assert table_of(tmp_path, "fresh") == table_of(tmp_path, "kept")
