"""A script for torchrun: jobs of the runners' stub under ddp and fsdp. Argument: a folder for runs and findings.

The main process alone evaluates, so a collective in an evaluation would never end.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lavis_dcd.common.processes import leave_group

_path = Path(__file__).parents[1] / "training" / "stub_job.py"
_spec = importlib.util.spec_from_file_location("runner_stub_job", _path)
stubs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stubs)


class Model(stubs.Distiller):
    """The stub with two units, and a root with the norm."""

    def __init__(self, random: bool = True) -> None:
        super().__init__()
        if not random:
            self.student = stubs.Learner(dropout=0.0, norm=False)

    def sharding_units(self) -> list[torch.nn.Module]:
        return [self.student.encoder, self.student.head]


class Broken(stubs.Pictures):
    """One picture in the set is NaN."""

    def __getitem__(self, index: int) -> dict:
        sample = super().__getitem__(index)
        return {**sample, "image": sample["image"] * float("nan")} if index == 5 else sample


def stop() -> None:
    raise RuntimeError("cut")


def train(folder: Path, name: str, strategy: str, model=None, at_step=None, data=None, **run):
    task = stubs.Task(at_step)
    trainer = stubs.job(folder, task, model or Model(), job_id=name, strategy=strategy, save_every=1, log_freq=1, **run)
    if data is not None:
        trainer.datasets["train"] = data
    trainer.train()
    return trainer


def resumed(folder: Path, name: str, first: str, second: str) -> None:
    try:
        train(folder, name, first, at_step={3: stop})
    except RuntimeError as error:
        if "cut" not in str(error):
            raise
    train(folder, name, second, resume="auto")


def parts(trainer) -> dict:
    """What this process holds of a sharded model and its optimizer, in numbers."""
    learning = [p for p in trainer.model.parameters() if p.requires_grad]
    moments = [s["exp_avg"] for s in trainer._stepper.optimizer.state.values()]
    return {
        "sharded": all(isinstance(p, DTensor) for p in learning),
        "all": sum(p.numel() for p in learning),
        "here": sum(p.to_local().numel() for p in learning),
        "moments_here": sum(m.to_local().numel() for m in moments),
        "frozen_whole": all(not isinstance(p, DTensor) for p in trainer.model.student.frozen.parameters()),
        "units": sum(isinstance(m, FSDPModule) for m in trainer.model.modules()),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {"parts": parts(train(folder, "fsdp", "fsdp"))}
    train(folder, "ddp", "ddp")
    for first in ("fsdp", "ddp"):
        for second in {"fsdp": ("fsdp", "ddp"), "ddp": ("fsdp",)}[first]:
            resumed(folder, f"{first}-{second}", first, second)
    for strategy in ("fsdp", "ddp"):
        broken = train(folder, f"nan-{strategy}", strategy, data=Broken())
        found[f"nan-{strategy}"] = [broken._stepper.health.skipped, broken._stepper.health.in_row]
    plain = {"rows": 16, "data": stubs.Pictures(16, noise=0)}
    train(folder, "steps", "fsdp", Model(random=False), **plain)
    train(folder, "micro-steps", "fsdp", Model(random=False), batch_size_train=2, accum_grad_iters=2, **plain)
    # a bias before a norm has no gradient but rounding, which AdamW would follow by its sign
    train(folder, "clipped-fsdp", "fsdp", grad_clip=0.01, eps=1e-4)
    train(folder, "clipped-ddp", "ddp", grad_clip=0.01, eps=1e-4)
    train(folder, "bf16-fsdp", "fsdp", amp="bf16")
    train(folder, "bf16-ddp", "ddp", amp="bf16")
    train(folder, "bare-fsdp", "fsdp", stubs.Learner())  # the root itself is evaluated
    train(folder, "bare-ddp", "ddp", stubs.Learner())
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    leave_group()


if __name__ == "__main__":
    main()
