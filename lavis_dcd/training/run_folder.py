"""The run folder: which one a job writes to, and what a finished job leaves there."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.secrets import as_exported, hidden, hides_something
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.learner import as_learner
from lavis_dcd.training.checkpoint import FOLDER
from lavis_dcd.training.devices import map_leaves
from lavis_dcd.training.strategy import Strategy


def new_run_folder(project_folder: Path, run: RunConfig, job_id: str | None) -> Path:
    """Make the folder of a job that starts afresh.

    Args:
        job_id: the caller's proposal; `run.job_id` wins over it. Default: the time.

    Raises:
        UserError: the user named the job, and its folder already holds one.
    """
    if run.job_id:
        folder = project_folder / run.job_id
        restart = run.resume == "auto"  # the first attempt ended before its first checkpoint
        if not restart and _is_used(folder):
            raise UserError(
                f"run.job_id: {folder} already holds a job; give another name, or continue it with run.resume=auto"
            )
    else:
        name = job_id or time.strftime("%Y%m%d-%H%M%S")
        folder = _claim(project_folder, name)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    return folder


def _claim(parent: Path, name: str) -> Path:
    """Make the first of name, name-2, name-3, ... that does not exist."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def _is_used(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "results.json", "metrics.jsonl"))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml: the whole configuration as it ran."""
    with atomic_write(folder / "config.yaml", "w") as handle:
        yaml.safe_dump(dict(config), handle, sort_keys=False, allow_unicode=True)


def write_results(
    folder: Path,
    title: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    gallery: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
) -> None:
    """Write results.json for the first split, results_<split>.json for each other one.

    Args:
        rows: by split; each row has a "name" and metrics.
        gallery: queries and what each matcher returns, of the first split.
    """
    for number, (split, split_rows) in enumerate(rows.items()):
        content = {
            "title": hidden(title),
            "split": split,
            "rows": list(split_rows),
            "gallery": [] if number else list(gallery),
            "machine": dict(machine),
        }
        name = f"results_{split}.json" if number else "results.json"
        with atomic_write(folder / name, "w") as handle:
            json.dump(content, handle, indent=1)


def export_model(folder: Path, strategy: Strategy) -> Path:
    """Write the model that the job produced, on its own: student.pth, or model.pth for a plain model.

    Every process must call it; the main one writes. The file holds `checkpoint()` of the model's `exported()`: tensors
    and plain containers, which load with `weights_only=True`.
    """
    model = strategy.bare_model
    exported = as_learner(model).exported()
    content = strategy.whole(as_learner(exported).checkpoint())
    if "config" in content and hides_something():
        content = {**content, "config": as_exported(content["config"])}
    path = folder / ("student.pth" if exported is not model else "model.pth")
    if strategy.process.is_main:
        with atomic_write(path) as handle:
            torch.save(map_leaves(content, _on_cpu), handle)
    return path


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
