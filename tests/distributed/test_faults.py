"""A process that dies takes the job down with it, leaves whole files, and a restarted job goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

# The rank that dies does so in a step of its own; the others are in the middle of a collective then.
PLUGIN = """
import os, signal
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask

train_step = DcdRetrievalTask.train_step
steps = 0

def dying(self, model, samples):
    global steps
    steps += 1
    if steps == {step} and os.environ["RANK"] == "{rank}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {death}
    return train_step(self, model, samples)

DcdRetrievalTask.train_step = dying
"""
KILLED = "open('died', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
RAISES = "open('died', 'w').close(); raise RuntimeError('the disk of this process is gone')"


@pytest.fixture
def dying_job(write_job, tmp_path, teacher):
    """The file of a job of four steps with a checkpoint after each, and the plugin in which one rank dies."""

    def write(name: str, death: str = KILLED, rank: int = 1, **run) -> Path:
        (tmp_path / "dying.py").write_text(PLUGIN.format(step=3, rank=rank, death=death))
        model = {"arch": "dcd", "teacher": teacher, "student": {"init_from_teacher": {"layers": [1]}},
                 "selection": {"hard_negatives": 3}}  # fmt: skip
        return write_job(name, model, batch_size_train=4, save_every=1, keep_last=10, **run)

    return write


def assert_whole_files(folder: Path) -> None:
    """No temporary file is left, and what looks like a file of a run can be read."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".tmp", ".part") or path.name.startswith(".")], files
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".pth":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            load_file(path)


@pytest.mark.parametrize(
    "death, rank, strategy",
    [(KILLED, 1, "ddp"), (KILLED, 0, "ddp"), (RAISES, 1, "ddp"), (KILLED, 1, "fsdp")],
    ids=["other", "main", "error", "sharded"],
)
def test_a_rank_that_dies_ends_the_job(death, rank, strategy, dying_job, launch, outcome, tmp_path):
    process = launch(dying_job("dying", death, rank, strategy=strategy), "--nproc_per_node=2", plugin="dying")
    status, output = outcome(process)
    died = (tmp_path / "died").stat().st_mtime
    assert status != 0
    assert time.time() - died < 60, output
    assert ("the disk of this process is gone" if death == RAISES else "SIGKILL") in output
    folder = tmp_path / "output" / "job" / "dying"
    assert list((folder / "checkpoints").iterdir())
    assert not (folder / "student.pth").exists()
    assert_whole_files(folder)


def test_torchrun_restarts_and_the_job_goes_on(dying_job, launch, outcome, finished, metrics, tmp_path):
    job = dying_job("again", resume="auto")
    status, output = outcome(launch(job, "--nproc_per_node=2", "--max-restarts=1", plugin="dying"))
    assert status == 0, output
    assert (tmp_path / "died").exists() and "resumed at step 2" in output
    finished(dying_job("whole"), "--nproc_per_node=2")
    again, whole = (
        torch.load(tmp_path / "output" / "job" / name / "student.pth", weights_only=True)["model"]
        for name in ("again", "whole")
    )
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert [line["loss"] for line in metrics("again", "train")] == [line["loss"] for line in metrics("whole", "train")]


def test_two_nodes(dying_job, launch, outcome, finished, metrics, tmp_path, free_port):
    """Two agents on the loopback, a process each, one of which dies: restarted, the job is that of one node."""
    job = dying_job("nodes", resume="auto", test_splits=["test"])
    flags = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port}",
             "--rdzv_id=nodes", "--max-restarts=2"]  # fmt: skip
    agents = [launch(job, *flags, plugin="dying", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for _ in range(2)]
    ends = [outcome(agent) for agent in agents]
    assert [status for status, _ in ends] == [0, 0], ends
    assert (tmp_path / "died").exists() and any("resumed at step 2" in output for _, output in ends)
    finished(dying_job("node", test_splits=["test"]), "--nproc_per_node=2")
    assert [line["loss"] for line in metrics("nodes", "train")] == [line["loss"] for line in metrics("node", "train")]
    runs = tmp_path / "output" / "job"
    results = [json.loads((runs / name / "results.json").read_text()) for name in ("nodes", "node")]
    assert results[0]["rows"][-1]["r_mean"] == results[1]["rows"][-1]["r_mean"]
    assert_whole_files(runs / "nodes")


STOPS = """
import os, signal, subprocess
from lavis_dcd.training import heartbeat
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask

heartbeat.BEAT, heartbeat.SILENT = 0.2, 2.0
train_step = DcdRetrievalTask.train_step
steps = 0

def stopping(self, model, samples):
    global steps
    steps += 1
    if steps == 3 and os.environ["RANK"] == "{rank}":
        subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {{os.getpid()}}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    return train_step(self, model, samples)

DcdRetrievalTask.train_step = stopping
"""


@pytest.mark.parametrize("rank", [0, 1], ids=["main", "other"])
def test_a_rank_that_is_stopped_is_named_and_changes_nothing(rank, dying_job, launch, outcome, finished, tmp_path):
    job = dying_job("stopped")
    (tmp_path / "stopping.py").write_text(STOPS.format(rank=rank))
    status, output = outcome(launch(job, "--nproc_per_node=2", plugin="stopping"))
    assert status == 0, output
    named = [line for line in output.splitlines() if "has given no sign of life for" in line]
    assert named and all(f"process {rank} (host " in line and "pid " in line for line in named)
    assert any(f"process {rank} (host" in line and "answers again" in line for line in output.splitlines())
    log = (tmp_path / "output" / "job" / "stopped" / "log.txt").read_text()
    assert ("no sign of life" in log) == (rank == 1)  # the main process keeps the log, and was stopped itself
    finished(dying_job("whole"), "--nproc_per_node=2")
    stopped, whole = (
        torch.load(tmp_path / "output" / "job" / name / "student.pth", weights_only=True)["model"]
        for name in ("stopped", "whole")
    )
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
