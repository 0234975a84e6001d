"""The differences between a checkpoint and the job that continues it, and which of them run.resume_force accepts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.tree import plain_sets
from lavis_dcd.training.environment import comparable

Force = Literal["teacher", "data", "recipe", "world_size"]

# Keys of run: without which the position of a checkpoint, or its optimizer state, would mean something else, and
# what run.resume_force must name for a job to continue with another value. None: the optimizer and the scaler go on
# with the checkpoint's value, so that another one in the configuration would have no effect.
_RUN_KEYS: dict[str, Force | None] = {
    "seed": "recipe",
    "drop_last": "recipe",
    "batch_size_train": "world_size",  # the two that keep the global batch when the number of processes changes
    "accum_grad_iters": "world_size",
    "batch_by": "data",
    "train_splits": "data",
    "init_lr": None,
    "head_lr_multiplier": None,
    "weight_decay": None,
    "betas": None,
    "eps": None,
    "lr_sched": None,
    "amp": None,
}
_TEACHER_SECTIONS = ("model.teacher", "model.teachers")


def data_fingerprint(dataset: Any) -> dict[str, dict[str, Any]]:
    """Return, for each set in a training set, the number of its rows and a hash of their annotation.

    No picture is read.

    Args:
        dataset: a set, a wrapper or a concatenation; None for a job that does not train.
    """
    if dataset is None:
        return {}
    sets: dict[str, dict[str, Any]] = {}
    for name, leaf in plain_sets(dataset, "train").items():
        sets[name] = {"rows": len(leaf)}
        annotation = getattr(leaf, "annotation", None)
        if isinstance(annotation, list):
            digest = hashlib.sha256()
            for row in annotation:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            sets[name]["sha256"] = digest.hexdigest()
    return sets


def resume_faults(
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    teacher: str,
    world_size: int,
    data: Mapping[str, Any] | None = None,
    force: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Return why a checkpoint cannot be continued with this config, and what of it `force` lets pass; a line each.

    Args:
        saved: a checkpoint's content.
        config: {"model": ..., "datasets": ..., "run": ...}, plain containers.
        teacher: the fingerprint of the teacher as built now.
        world_size: the number of processes now.
        data: `data_fingerprint` of the training set now.
        force: run.resume_force.
    """
    refused: list[str] = []
    passed: list[str] = []
    flags: list[Force | None] = []
    for kind, line in _changes(saved, config, teacher, world_size, data or {}):
        if kind in force:
            passed.append(f"run.resume: {line} (run.resume_force)")
        else:
            refused.append(f"run.resume: {line}")
            flags.append(kind)
    if refused:
        refused.append("run.resume: put these back to continue the job, or start a new one without run.resume")
        if None not in flags:
            wanted = ",".join(dict.fromkeys([*force, *map(str, flags)]))
            refused[-1] += f"; run.resume_force=[{wanted}] continues with the change"
    return refused, passed


def _changes(
    saved: Mapping[str, Any], config: Mapping[str, Any], teacher: str, world_size: int, data: Mapping[str, Any]
) -> Iterator[tuple[Force | None, str]]:
    """Yield every difference, with what overrides it."""
    old = saved["config"]
    config = comparable(old, config)
    if saved["teacher_fingerprint"] != teacher:
        before, now = _short(saved["teacher_fingerprint"]), _short(teacher)
        yield "teacher", f"the teacher's weights changed (fingerprint {before} in the checkpoint, {now} now)"
    for line in _differences("model", old.get("model"), config.get("model")):
        about_teacher = line.split(" ")[0].startswith(tuple(f"{name}." for name in _TEACHER_SECTIONS))
        yield "teacher" if about_teacher else "recipe", line
    for line in _differences("datasets", old.get("datasets"), config.get("datasets")):
        yield "data", line
    for line in _differences("the rows of", _shortened(saved["data"]), _shortened(data)):
        yield "data", line
    for key, kind in _RUN_KEYS.items():
        for line in _differences(f"run.{key}", old["run"].get(key), config["run"].get(key)):
            yield kind, line
    for line in _differences("number of processes", saved["position"]["world_size"], world_size):
        yield "world_size", line


def check_shapes(path: Any, saved: Mapping[str, torch.Tensor], built: Mapping[str, torch.Tensor]) -> None:
    """Raise a `UserError` where a checkpoint's weights are those of another model; nothing overrides that.

    Args:
        path: of the checkpoint, for messages.
        saved, built: the model's tensors in the checkpoint, and as built now.
    """
    faults = [
        f"run.resume: {path}: {name} is {tuple(tensor.shape)} there, {tuple(built[name].shape)} in the model"
        for name, tensor in saved.items()
        if name in built and tensor.shape != built[name].shape
    ]
    for names, words in ((built.keys() - saved.keys(), "lacks"), (saved.keys() - built.keys(), "has")):
        if names:
            only = "weights of the model" if words == "lacks" else "weights that the model has not"
            faults.append(f"run.resume: {path} {words} {len(names)} {only}, first {min(names)}")
    if faults:
        hidden = [f"run.resume: {path}: {len(faults) - 10} more differ"] if len(faults) > 10 else []
        way_out = "run.resume: it is another model's; start a new job without run.resume"
        raise UserError([*faults[:10], *hidden, way_out])


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"


def _shortened(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: _short(value) if key == "sha256" else value for key, value in rows.items()}
        for name, rows in data.items()
    }


def _differences(name: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted(set(before) | set(now), key=str)
        joint = " " if name.endswith(" of") else "."
        return [line for key in keys for line in _differences(f"{name}{joint}{key}", before.get(key), now.get(key))]
    same = before == now or (
        isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and list(before) == list(now)
    )
    return [] if same else [f"{name} was {before!r} in the checkpoint, is {now!r} now"]
