"""A model, a data set and a task of a few lines, and a job made of them; also a script (one JSON argument).

The pictures are noise, augmentation adds more, and the model has dropout and a running mean: whatever a
resumed job forgets to put back changes its weights.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lavis_dcd.cli import guarded
from lavis_dcd.common.processes import leave_group
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.contracts import TrainTask
from lavis_dcd.training.trainer import Trainer

WIDTH = 6


class Learner(nn.Module):
    def __init__(self, dropout: float = 0.3, seed: int = 0, norm: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, 1)
        self.drop = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, samples: dict) -> dict:
        hidden = self.drop(self.norm(self.encoder(samples["image"]) + self.frozen(samples["image"])).tanh())
        loss = (self.head(hidden).squeeze(-1) - samples["target"]).square().mean()
        return {"loss": loss, "distill_loss": loss.detach() * 2, "scores": hidden, "text": "ignored"}

    def head_parameter_names(self) -> set[str]:
        return {"head.weight", "head.bias"}

    def checkpoint(self) -> dict:
        return {"model": self.state_dict(), "arch": "stub", "config": {"width": WIDTH}}


class Distiller(nn.Module):
    """A student, and a teacher outside the module tree."""

    def __init__(self, fingerprint: str = "t1") -> None:
        super().__init__()
        self.student = Learner()
        self._teacher = [Learner(seed=9).eval()]
        self._fingerprint = fingerprint

    def forward(self, samples: dict) -> dict:
        return self.student(samples)

    def matchers(self) -> dict:
        return {"teacher": self._teacher[0], "student": self.student}

    def exported(self) -> nn.Module:
        return self.student

    def teacher_fingerprint(self) -> str:
        return self._fingerprint


class Pictures(torch.utils.data.Dataset):
    """Noise whose mean is the target; `loaded`: the indices read, `epochs`: what `set_epoch` got."""

    def __init__(self, size: int = 22, noise: float = 0.1) -> None:
        self.size, self.noise, self.loaded, self.epochs = size, noise, [], []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        self.loaded.append(index)
        image = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        target = image.mean()
        if self.noise:
            image = image + self.noise * (torch.randn(WIDTH) + random.random() + float(np.random.rand()))
        return {"image": image, "target": target}

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Task(TrainTask):
    """Scores are minus the error; `evaluated` counts calls, `at_step` maps a step to an action before it."""

    def __init__(self, at_step: dict | None = None) -> None:
        self.evaluated, self.steps, self.at_step, self.modes = 0, 0, at_step or {}, []
        self.folders: set[Path] = set()

    def train_step(self, model: nn.Module, samples: dict) -> dict:
        if self.steps in self.at_step:
            self.at_step[self.steps]()
        self.steps += 1
        return model(samples)

    def evaluate_matcher(
        self, matcher: nn.Module, dataset: Pictures, run: RunConfig, device: torch.device, **more
    ) -> dict:
        self.evaluated += 1
        self.folders.add(more["folder"])
        self.modes.append(matcher.training)
        rows = [dataset[index] for index in range(len(dataset))]
        batch = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
        score = -100 * float(matcher(batch)["loss"])
        return {
            "txt_r1": score,
            "r_mean": score,
            "agg_metrics": score,
            "fusion_parameters": 7,
            "how": "exhaustive",
        }

    def gallery(self, matchers: dict, dataset: Pictures, run: RunConfig, device: torch.device) -> list:
        return [{"query": "q", "names": sorted(matchers)}]


def job(
    folder: Path,
    task: Task | None = None,
    model: nn.Module | None = None,
    rows: int = 22,
    val_rows: int = 6,
    test_rows: int = 5,
    **run,
) -> Trainer:
    keys = {
        "output_dir": str(folder),
        "max_epoch": 3,
        "batch_size_train": 4,
        "init_lr": 0.05,
        "device": "cpu",
        "valid_splits": ["val"],
        "test_splits": ["test"],
        "log_freq": 2,
        "report": False,
        "keep_last": 3,
    }
    evaluated = {"val": Pictures(val_rows, noise=0), "test": Pictures(test_rows, noise=0)}
    datasets = {"train": Pictures(rows), **evaluated}
    config = {"model": {"arch": "stub", "size": {"width": WIDTH}}, "datasets": {"noise": {"size": 22}}}
    return Trainer(RunConfig(**{**keys, **run}), config, task or Task(), model or Distiller(), datasets, "stub")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "student.pth" if (folder / "student.pth").exists() else "model.pth"
    return torch.load(folder / name, weights_only=True)["model"]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_group() -> None:
    """SIGTERM to this process and its loader workers."""
    os.killpg(os.getpgid(0), signal.SIGTERM)


def signal_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """`kill_at`: SIGKILL before that step; `terminate_at`: SIGTERM, to `terminate_rank` if that is given."""
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    at_step = {}
    if "kill_at" in options:
        at_step[options.pop("kill_at")] = kill_self
    rank = options.pop("terminate_rank", None)
    if "terminate_at" in options:
        number = options.pop("terminate_at")
        if rank is None:
            os.setpgrp()
            at_step[number] = signal_group
        elif rank == int(os.environ["RANK"]):
            at_step[number] = signal_self

    def work() -> None:
        job(Path(options.pop("folder")), Task(at_step), **options).train()
        leave_group()

    status = guarded(work)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main()
