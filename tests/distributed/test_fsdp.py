"""`run.strategy: fsdp`: two processes that hold half of what learns each train as one process, or as ddp, does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

TWO = ("--nproc_per_node=2",)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a job has left, in this process, which knows of no other."""
    file = next(path for path in (folder / "student.pth", folder / "model.pth") if path.is_file())
    return torch.load(file, weights_only=True)["model"]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is torch.Tensor
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_line(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value), key


def test_meter_with_learning_towers(write_job, finished, metrics, tmp_path, meter, teacher):
    """Losses, norms, recalls and weights as one process has them at the same global batch."""
    from lavis_dcd.models.building import build_matcher

    student = {**meter, "vision": {**meter["vision"], "layers": 2}}
    model = {"arch": "dcd", "teacher": teacher, "student": student, "share_encoders": False,
             "selection": {"hard_negatives": 3}}  # fmt: skip
    run = {"eps": 1e-4, "test_splits": ["test"], "valid_splits": ["val"], "evaluate_before": True, "k_test": 2}
    output = finished(write_job("one", model, batch_size_train=8, strategy="fsdp", **run))
    assert "the model stays whole" in output
    output = finished(write_job("two", model, batch_size_train=4, strategy="fsdp", **run), *TWO)
    assert "over 2 processes, 2 units and the root" in output
    steps_one, steps_two = metrics("one", "train"), metrics("two", "train")
    assert len(steps_one) == len(steps_two) == 4
    for expected, found in zip(steps_one, steps_two, strict=True):
        assert_same_line(found, expected)
    assert len({line["loss"] for line in steps_one}) == 4
    assert metrics("one", "eval") == metrics("two", "eval")
    one, two = (tmp_path / "output" / "job" / name for name in ("one", "two"))
    assert_close(load(two), load(one))
    built = build_matcher({**student, "load_finetuned": True, "finetuned": str(two / "student.pth")}, "model")
    assert_close(built.state_dict(), load(two), 0.0)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, repo_root) -> Path:
    """The folder of what `sharded_jobs.py` has trained with two processes."""
    folder = tmp_path_factory.mktemp("jobs")
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    script = Path(__file__).with_name("sharded_jobs.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *TWO, str(script), str(folder)],
        env={**kept, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=420, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def weights(jobs):
    return lambda name: load(jobs / "stub" / name)


@pytest.fixture
def lines(jobs):
    """``lines(name, kind)`` of a job's metrics, without times."""

    def read(name: str, kind: str) -> list[dict]:
        found = map(json.loads, (jobs / "stub" / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in x.items() if k not in ("time", "data_wait")} for x in found if x["kind"] == kind]

    return read


def test_each_process_holds_its_half(jobs):
    found = [json.loads((jobs / f"{rank}.json").read_text())["parts"] for rank in (0, 1)]
    for parts in found:
        assert parts["sharded"] and parts["frozen_whole"] and parts["units"] == 3
        assert parts["moments_here"] == parts["here"]
        assert 0.4 < parts["here"] / parts["all"] < 0.6
    assert found[0]["here"] + found[1]["here"] == found[0]["all"]


@pytest.mark.parametrize("case", ["", "nan-", "clipped-", "bf16-", "bare-"])
def test_equals_ddp(case, weights, lines):
    """The `bare` model is itself the root that is evaluated, by one process alone."""
    fsdp, ddp = f"{case}fsdp", f"{case}ddp"
    assert_close(weights(fsdp), weights(ddp))
    assert len(lines(fsdp, "train")) == 6
    for kind in ("train", "eval"):
        for found, expected in zip(lines(fsdp, kind), lines(ddp, kind), strict=True):
            assert_same_line(found, expected)


@pytest.mark.parametrize("case", ["fsdp-fsdp", "fsdp-ddp", "ddp-fsdp"])
def test_cut_and_continued_equals_uninterrupted(case, weights, lines):
    assert_close(weights(case), weights("fsdp"), 0.0 if case == "fsdp-fsdp" else 1e-5)
    for found, expected in zip(lines(case, "train"), lines("fsdp", "train"), strict=True):
        assert_same_line(found, expected)


def test_nan_steps_are_skipped_by_both(jobs, weights):
    assert all(value.isfinite().all() for value in weights("nan-fsdp").values())
    for rank in (0, 1):
        found = json.loads((jobs / f"{rank}.json").read_text())
        assert found["nan-fsdp"] == found["nan-ddp"]
        assert found["nan-fsdp"][0] == 3  # the picture comes once in each of three epochs


def test_micro_steps_equal_steps(weights, lines):
    assert_close(weights("micro-steps"), weights("steps"))
    for found, expected in zip(lines("micro-steps", "train"), lines("steps", "train"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_steps_equal_those_of_one_process(tmp_path, weights, lines):
    path = Path(__file__).parents[1] / "training" / "stub_job.py"
    spec = importlib.util.spec_from_file_location("runner_stub_job", path)
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    model = stubs.Distiller()
    model.student = stubs.Learner(dropout=0.0, norm=False)
    trainer = stubs.job(tmp_path, model=model, rows=16, batch_size_train=8, log_freq=1)
    trainer.datasets["train"] = stubs.Pictures(16, noise=0)
    trainer.train()
    assert_close(load(trainer.output_dir), weights("steps"))
    alone = [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in alone if line["kind"] == "train"]
    assert losses == pytest.approx([line["loss"] for line in lines("steps", "train")], rel=1e-5)
    assert len(set(losses)) == 6
