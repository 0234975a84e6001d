"""Jobs of a few thousand weights under torchrun on the loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIDE = 32
SECONDS = 420  # the machine may be busy; nothing here is about speed


@pytest.fixture
def towers(vocabulary: str) -> dict[str, Any]:
    """A vision and a text tower without dropout."""
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return {
        "load_finetuned": False,
        "vision": {"backbone": "clip_vit", "image_size": SIDE, "patch_size": 16, "width": 32, "layers": 1, "heads": 2},
        "text": {"family": "bert", "name": vocabulary, "max_length": 16, "config": text},
    }


@pytest.fixture
def meter(towers: dict[str, Any]) -> dict[str, Any]:
    """A METER with a joint head, without dropout."""
    return {
        "arch": "meter_retrieval",
        **towers,
        "fusion": {"width": 16, "layers": 2, "heads": 2, "dropout": 0.0},
        "joint_head": {"dim": 8, "hidden": 16, "dropout": 0.0},
    }


@pytest.fixture
def teacher(meter: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same METER with weights in a file, as a teacher must have them."""
    import torch

    from lavis_dcd.models.building import build_matcher

    torch.manual_seed(3)
    file = tmp_path / "teacher.pth"
    torch.save(build_matcher(meter, "model").checkpoint(), file)
    return {**meter, "load_finetuned": True, "finetuned": str(file)}


@pytest.fixture
def dual(towers: dict[str, Any]) -> dict[str, Any]:
    """A dual encoder without dropout."""
    head = {"dim": 8, "hidden": 0, "dropout": 0.0, "hidden_dropout": 0.0, "token_dropout": 0.0}
    return {"arch": "dual_encoder", **towers, "head": head}


@pytest.fixture
def write_job(tmp_path: Path, retrieval_files: dict[str, Any]) -> Callable[..., Path]:
    """``write_job(name, model, **run)``: the file of a job of four steps over 16 captions of 8 pictures."""

    def write(name: str, model: dict[str, Any], **run: Any) -> Path:
        pictures = {"name": "blip_image_eval", "image_size": SIDE}
        readers = {
            "vis_processor": {"train": pictures, "eval": pictures},
            "text_processor": {stage: {"name": "dcd_caption"} for stage in ("train", "eval")},
        }
        keys = {
            "device": "cpu", "max_epoch": 4, "max_steps": 4, "batch_size_train": 8, "batch_size_eval": 2, "log_freq": 1,
            "init_lr": 1e-3, "warmup": 0, "grad_clip": 1.0, "report": False, "job_id": name, "num_threads": 1,
            "output_dir": str(tmp_path / "output"), "project": "job", "evaluate_before": False,
        }  # fmt: skip
        sections = {
            "model": model,
            "datasets": {"coco_retrieval": {**readers, "build_info": retrieval_files}},
            "run": {**keys, **run},
        }
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(sections))
        return file

    return write


@pytest.fixture
def environment(tmp_path: Path, repo_root: Path) -> dict[str, str]:
    """Of the processes that a test starts."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "LAVIS_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1"}  # fmt: skip


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path, free_port: int) -> Callable[..., subprocess.Popen]:
    """Starts ``python -m lavis.train`` on a job file, by torchrun with these flags or, without any, alone.

    What else it is given goes to the process's environment.
    """
    started = []

    def start(
        job: Path, *flags: str, script: Path | None = None, plugin: str | None = None, **more: str
    ) -> subprocess.Popen:
        torchrun = [sys.executable, "-m", "torch.distributed.run", *flags]
        torchrun += ["--master_addr=127.0.0.1", f"--master_port={free_port}"]
        what = ["-m", "lavis.train", "--cfg-path"] if script is None else [str(script)]
        command = [*torchrun, *what] if flags else [sys.executable, *what]
        log = (tmp_path / f"{job.stem}-{len(started)}.out").open("w+")
        command += [str(job), *(["--plugins", plugin] if plugin else [])]
        process = subprocess.Popen(
            command, env={**environment, **more}, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        process.log.close()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """The status and the output of a process, once it has ended."""
    status = process.wait(SECONDS)
    process.log.seek(0)
    return status, process.log.read()


@pytest.fixture
def finished(launch: Callable[..., subprocess.Popen]) -> Callable[..., str]:
    """Runs a job to its end and returns its output; fails where it fails."""

    def run(job: Path, *flags: str) -> str:
        status, output = ended(launch(job, *flags))
        assert status == 0, output
        return output

    return run


@pytest.fixture
def outcome() -> Callable[[subprocess.Popen], tuple[int, str]]:
    """Status and output of a started job, once it has ended."""
    return ended


@pytest.fixture
def metrics(tmp_path: Path) -> Callable[..., list[dict]]:
    """The lines of one kind of a run's log, without times."""

    def read(name: str, kind: str) -> list[dict]:
        file = tmp_path / "output" / "job" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        skipped = ("time", "data_wait", "ms_per_pair", "ms_per_search", "seconds")
        return [{k: v for k, v in line.items() if k not in skipped} for line in lines if line["kind"] == kind]

    return read
