"""Kill it anywhere: whatever happens to a job, starting it again ends with the student of an undisturbed run."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the forked processes import the harness by its name

import harness
from harness import JOB, MINING, Fault

pytestmark = pytest.mark.slow
SITES = {"step": 8, "checkpoint": 5, "features": 2, "evaluation": 4, "report": 1}
KINDS = ("kill", "term", "int", "error", "full", "read-only")
ENDS = {"kill": -9, "term": 143, "int": 130}
# of the loader's worker: it is killed, or fails
WORKERS = [Fault("sample", number, kind) for number in (1, 35, 70) for kind in ("kill", "error")]
FIRST = [Fault("step", 4, "kill"), Fault("checkpoint", 3, "kill"), Fault("features", 1, "full"),
         Fault("evaluation", 2, "term"), Fault("report", 1, "kill"), Fault("step", 6, "term"),
         Fault("checkpoint", 4, "read-only"), Fault("sample", 35, "kill")]  # fmt: skip


def points(count: int, seed: int = 0) -> list[Fault]:
    """``count`` distinct points, the same for the same seed; those that always run come first."""
    every = [Fault(site, n, kind) for site, most in SITES.items() for n in range(1, most + 1) for kind in KINDS]
    every += WORKERS
    random.Random(seed).shuffle(every)
    return list(dict.fromkeys([*FIRST, *every]))[:count]


def chosen() -> list:
    """A sample that always runs, and the rest for ``python -m pytest tests/faults -m ""``."""
    return [*FIRST, *(pytest.param(fault, marks=pytest.mark.faults) for fault in points(50)[len(FIRST) :])]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The student of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert harness.run(folder) == 0, (folder / "err.txt").read_text()[-2000:]
    return (folder / "output/quickstart/job/student.pth").read_bytes()


def run_folder(folder: Path) -> Path:
    return folder / "output/quickstart/job"


def saved_before(fault: Fault) -> int:
    """The step of a checkpoint that is whole when the fault comes; the first of them is of step 0."""
    checkpoints = {"step": (fault.number - 1) // JOB["save_every"], "checkpoint": fault.number - 2}
    return checkpoints.get(fault.site, 0) * JOB["save_every"]


@pytest.mark.parametrize("fault", chosen(), ids=str)
def test_a_resumed_job_ends_as_if_nothing_had_happened(fault: Fault, tmp_path: Path, undisturbed: bytes) -> None:
    workers = ["run.num_workers=1"] if fault.site == "sample" else []
    status = harness.run(tmp_path, options=workers, fault=fault)
    assert status != 0, f"{fault} did not happen"
    if fault.site == "step" and fault.kind in ENDS:
        assert status == ENDS[fault.kind]
    log = (tmp_path / "err.txt").read_text()
    survived = run_folder(tmp_path) / "checkpoints"
    steps = {int(re.search(r"(\d+)", path.name)[1]) for path in survived.glob("step-*")} if survived.exists() else set()
    assert max(steps, default=0) >= saved_before(fault), "a good checkpoint did not survive"
    assert harness.run(tmp_path, options=["run.resume=auto"]) == 0, (tmp_path / "err.txt").read_text()[-3000:]
    log = (tmp_path / "err.txt").read_text()[len(log) :]
    if steps:
        at = int(re.search(r"resumed at step (\d+)", log)[1])
        assert at in steps, "a good checkpoint was passed over"
        if fault.site == "step":
            assert fault.number - 1 - at <= JOB["save_every"], "too many steps are repeated"
    assert (run_folder(tmp_path) / "student.pth").read_bytes() == undisturbed
    lines = [json.loads(line) for line in (run_folder(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if line["kind"] == "train"]
    assert logged == sorted(set(logged)), "a step was logged twice"
    if fault.kind != "kill":
        assert not list(tmp_path.rglob("*.tmp")), "a half-written file was left behind"


@pytest.mark.parametrize("site", ["mining", "bank"])
@pytest.mark.parametrize("kind", ["kill", "int", "full"])
def test_an_interrupted_mining_goes_on(site: str, kind: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert harness.run(whole, "mine", MINING) == 0
    assert harness.run(broken, "mine", MINING, Fault(site, 1, kind)) != 0
    assert harness.run(broken, "mine", MINING) == 0
    banks = [next((folder / "cache/dcd_scores").glob("*/scores-*.safetensors")) for folder in (whole, broken)]
    assert banks[0].read_bytes() == banks[1].read_bytes()
