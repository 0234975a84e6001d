"""The values of a checkpoint: each is of its type and in its range before it is used.

The sums of a manifest tell damage, not intent: a file that was edited together with its sums is whole, and its values
are anybody's. All checks raise `ValueError` with the field and the value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.common.seeding import check_rng_state
from lavis_dcd.common.texts import shown

FIELDS = (
    *("model", "optimizer", "scheduler", "scaler", "health", "rng", "position", "best", "window"),
    *("config", "teacher_fingerprint", "rows", "as_built"),
)
OPTIONAL = ("neighbours",)  # of jobs whose batches are neighbourhoods
_MOST = 2**53  # of a count: whole numbers up to here are exact as floats, too
_LARGEST = 1e300


def check_content(content: Mapping[str, Any], step: int | None = None) -> None:
    """Check what can be told of a checkpoint's content without its job.

    Args:
        step: the one in the folder's name.
    """
    if lacking := [name for name in FIELDS if name not in content]:
        raise ValueError(f"state.json lacks {', '.join(lacking)}")
    if foreign := [name for name in content if name not in (*FIELDS, *OPTIONAL)]:
        raise ValueError(f"state.json has {', '.join(shown(name) for name in foreign[:5])}, which is foreign")
    _check_position(content["position"], step)
    now = content["position"]["global_step"]
    check_tensors(content["model"])
    for name in ("optimizer", "scheduler", "scaler"):
        as_mapping(content[name], name)
    _check_health(content["health"], now)
    _check_best(content["best"], now)
    _check_window(content["window"])
    _check_origin(content)
    try:
        check_rng_state(content["rng"])
    except ValueError as error:
        raise ValueError(f"rng {error}") from error


def check_best(content: Mapping[str, Any], step: int | None = None) -> None:
    """Check the content of a folder of best weights.

    Args:
        step: the one in the folder's name.
    """
    as_mapping(content, "the content", ("model", "step", "metric"))
    check_tensors(content["model"])
    as_integer(content["step"], "step", *(() if step is None else (step, step)))
    as_number(content["metric"], "metric", -_LARGEST)


def check_tensors(model: Any) -> None:
    """Check that a model's entry is tensors by name."""
    for name, tensor in as_mapping(model, "model").items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"model.{shown(name)}: {shown(tensor)} is no tensor")


def check_finite(saved: Mapping[str, Tensor], built: Mapping[str, Tensor]) -> None:
    """Check that weights are numbers wherever the model's own, as built, are: a mask may hold infinities."""
    for name, tensor in saved.items():
        if not is_finite(tensor) and (name not in built or is_finite(built[name])):
            raise ValueError(f"model.{name} has NaN or infinite values")


def _check_position(position: Any, step: int | None) -> None:
    names = ("epoch", "step_in_epoch", "global_step", "world_size")
    as_mapping(position, "position", names)
    for name in names:
        as_integer(position[name], f"position.{name}", int(name == "world_size"))
    now = position["global_step"]
    for name in ("epoch", "step_in_epoch"):
        if position[name] > now:
            raise ValueError(f"position.{name}: {position[name]} is above the steps taken, {now}")
    if step is not None and now != step:
        raise ValueError(f"position.global_step: {now}, but the folder is of step {step}")


def _check_health(health: Any, now: int) -> None:
    as_mapping(health, "health", ("skipped", "in_row", "last_taken"))
    as_integer(health["skipped"], "health.skipped", 0, now)
    as_integer(health["in_row"], "health.in_row", 0, health["skipped"])
    if health["last_taken"] is not None:
        as_integer(health["last_taken"], "health.last_taken", 0, now)


def _check_best(best: Any, now: int) -> None:
    if best is None:
        return
    as_mapping(best, "best", ("step", "metric"))
    as_integer(best["step"], "best.step", 0, now)
    as_number(best["metric"], "best.metric", -_LARGEST)


def _check_window(window: Any) -> None:
    as_mapping(window, "window", ("sums", "counts"))
    sums, counts = as_mapping(window["sums"], "window.sums"), as_mapping(window["counts"], "window.counts")
    if sums.keys() != counts.keys():
        raise ValueError("window: its sums and counts are of different names")
    for name, total in sums.items():
        as_tensor(total, f"window.sums.{shown(name)}", torch.Size(), torch.float64)
        as_integer(counts[name], f"window.counts.{shown(name)}", 1)
        if not isinstance(name, str):
            raise ValueError(f"window.sums: {shown(name)} is no name")


def _check_origin(content: Mapping[str, Any]) -> None:
    config = as_mapping(content["config"], "config")
    for name in ("model", "datasets"):
        as_mapping(config.get(name, {}), f"config.{name}")
    if not all(isinstance(key, str) for key in as_mapping(config.get("run"), "config.run")):
        raise ValueError("config.run: its keys must be text")
    for path, digest in as_mapping(config.get("environment", {}), "config.environment").items():
        if not isinstance(path, str) or not isinstance(digest, str):
            raise ValueError(f"config.environment: {shown(path)} and {shown(digest)} are no texts")
    for name in ("teacher_fingerprint", "as_built"):
        if not isinstance(content[name], str):
            raise ValueError(f"{name}: {shown(content[name])} is no text")
    if not isinstance(content.get("neighbours", ""), str):
        raise ValueError(f"neighbours: {shown(content['neighbours'])} is no text")
    for name, count in as_mapping(content["rows"], "rows").items():
        as_integer(count, f"rows.{shown(name)}")


def as_mapping(value: Any, name: str, keys: Collection[str] | None = None) -> Mapping[Any, Any]:
    """Return a section, which has the `keys` and no others where they are given."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: {shown(value)} is no section")
    if keys is not None and value.keys() != set(keys):
        lacking, foreign = [key for key in keys if key not in value], [key for key in value if key not in keys]
        raise ValueError(f"{name} {f'lacks {lacking[0]}' if lacking else f'has {shown(foreign[0])}, which is foreign'}")
    return value


def as_integer(value: Any, name: str, least: int = 0, most: int = _MOST) -> int:
    """Return a whole number in its range; `True` is none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {shown(value)} is no whole number from {least} to {most}")
    return value


def as_number(value: Any, name: str, least: float = 0.0, most: float = _LARGEST) -> float:
    """Return a finite number in its range."""
    # a whole number may be too large for isfinite; NaN is in no range
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError(f"{name}: {shown(value)} is no number from {least:g} to {most:g}")
    return value


def as_tensor(value: Any, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor of this shape and type."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: {shown(value)} is no tensor")
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"{name} is {tuple(value.shape)} of {value.dtype}, expected {tuple(shape)} of {dtype}")
    return value


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinities."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def same(value: Any, other: Any) -> bool:
    """Return whether two plain values are equal and of one type; a list and a tuple of equal items are."""
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    numbers = type(value) in (int, float) and type(other) in (int, float)
    return (type(value) is type(other) or numbers) and bool(value == other)
