"""Checkpoints without a job: contents whose values are sound, and folders of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lavis_dcd.common.manifest import Manifest
from lavis_dcd.common.seeding import rng_state
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import checkpoint
from lavis_dcd.training.nested_state import flatten, unflatten

CONFIG = {"model": {"arch": "dcd"}, "datasets": {}, "run": RunConfig().to_dict()}


def content(step: int = 0, **changes: Any) -> dict[str, Any]:
    """The content of a checkpoint at a step."""
    found = {
        "model": {"w": torch.ones(1) * step},
        "optimizer": {},
        "scheduler": {},
        "scaler": {},
        "health": {"skipped": 0, "in_row": 0, "last_taken": None},
        "rng": rng_state(),
        "position": {"epoch": 0, "step_in_epoch": step, "global_step": step, "world_size": 1},
        "best": None,
        "window": {"sums": {}, "counts": {}},
        "config": CONFIG,
        "teacher_fingerprint": "abc",
        "as_built": "",
        "rows": {},
    }
    return {**found, **changes}


def write(folder: Path, step: int, time: int, **changes: Any) -> Path:
    """A checkpoint, and its time in nanoseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint.step_file(folder, step)
    checkpoint.save(path, content(step, **changes))
    os.utime(path, ns=(time, time))
    return path


def write_best(folder: Path, step: int, **changes: Any) -> None:
    """A folder of best weights."""
    best = {"model": {}, "step": step, "metric": 1.0}
    checkpoint.save(checkpoint.best_file(folder, step), {**best, **changes}, checkpoint.BEST_KIND)


def sign(folder: Path, name: str = "manifest.json", **changes: Any) -> None:
    """Write a manifest anew that fits the files as they are now, as somebody does who edits them."""
    content = json.loads((folder / name).read_text()) | changes
    of = {"kind": content["kind"], "format": content["format"]}
    identity = Manifest.read(folder, **of, name=name).identity
    Manifest.of(folder, content["files"], **of, identity=identity, facts=content["facts"]).write(folder, name)


def edit(path: Path, change: Any) -> None:
    """Change the content of a checkpoint, all sums with it."""
    state = json.loads((path / checkpoint.STATE).read_text())
    tensors = load_file(path / checkpoint.TENSORS)
    plain, tensors = flatten(change(unflatten(state, tensors)))
    save_file(tensors, path / checkpoint.TENSORS)
    (path / checkpoint.STATE).write_text(json.dumps(plain))
    sign(path)


def assert_equal(found, wanted) -> None:
    """Assert that nested content has the same types, order, tensors and values."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted
