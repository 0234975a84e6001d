"""The differences between a checkpoint and the job that continues it, and which of them run.resume_force accepts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import update_with_tensors
from lavis_dcd.common.manifest import Identity
from lavis_dcd.common.texts import one_line
from lavis_dcd.datasets.identity import Content, pictures_digests, rows_digests
from lavis_dcd.datasets.tree import plain_sets
from lavis_dcd.training.checkpoint import Checkpoint
from lavis_dcd.training.environment import comparable
from lavis_dcd.training.run_folder import settings_digests

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
    "batches": "data",
    "train_splits": "data",
    "picture_content": "data",  # without the same the pictures cannot be compared
    "init_lr": None,
    "head_lr_multiplier": None,
    "weight_decay": None,
    "betas": None,
    "eps": None,
    "lr_sched": None,
    "amp": None,
}
OPTIMIZER_KEYS = tuple(key for key, kind in _RUN_KEYS.items() if kind is None)
_TEACHER_SECTIONS = ("model.teacher", "model.teachers")


@dataclass(frozen=True)
class Origin:
    """The origin of a job: a checkpoint of another origin is not continued.

    Args:
        config: {"model", "datasets", "run"} in plain containers.
        teacher_fingerprint: of its weights.
        as_built: the same of the whole model, before a checkpoint is loaded; "" where nobody needs it.
        rows: their number, by data set.
        identity: SHA-256s of the settings, and of the rows and pictures of every split that the job reads.
    """

    config: Mapping[str, Any]
    teacher_fingerprint: str
    as_built: str
    rows: Mapping[str, int]
    identity: Identity

    @classmethod
    def of(
        cls, config: Mapping[str, Any], teacher: str, as_built: str, datasets: Mapping[str, Any], content: Content
    ) -> Origin:
        """Read all rows and, of the pictures, what ``run.picture_content`` says.

        Args:
            datasets: by split, those that the job reads.
        """
        rows = {
            name: len(plain)
            for split, dataset in datasets.items()
            if dataset is not None
            for name, plain in plain_sets(dataset, split).items()
        }
        settings = {**settings_digests(config), "the teacher": teacher}
        identity = Identity(settings, rows_digests(datasets), pictures_digests(datasets, content))
        return cls(config, teacher, as_built, rows, identity)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers."""
    digest = hashlib.sha256()
    state = model.state_dict().items()
    update_with_tensors(digest, [(name, value) for name, value in state if isinstance(value, torch.Tensor)])
    return digest.hexdigest()


def changed_data(before: Identity, now: Identity) -> dict[str, str]:
    """Return the data sets that both have and that differ, "rows" or "pictures" for each; any of the training set."""
    changed = {}
    for name in {**before.rows, **now.rows}:
        in_both = name in before.rows and name in now.rows
        if before.rows.get(name) != now.rows.get(name) and (in_both or splits_of([name], ["train"])):
            changed[name] = "rows"
        elif in_both and before.pictures.get(name) != now.pictures.get(name):
            changed[name] = "pictures"
    return changed


def splits_of(names: Iterable[str], splits: Iterable[str]) -> set[str]:
    """Return those of `splits` that plain sets of these names are in: ``train.0`` is a part of ``train``."""
    named = list(names)
    return {split for split in splits if any(name == split or name.startswith(f"{split}.") for name in named)}


def resume_faults(
    saved: Checkpoint, origin: Origin, world_size: int, force: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return why a checkpoint cannot be continued by this job, and what of it `force` lets pass; a line each.

    Args:
        origin: of the job as it is now.
        world_size: the number of processes now.
        force: run.resume_force.
    """
    refused: list[str] = []
    passed: list[str] = []
    flags: list[Force | None] = []
    for kind, line in _changes(saved, origin, world_size):
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


def _changes(saved: Checkpoint, origin: Origin, world_size: int) -> Iterator[tuple[Force | None, str]]:
    """Yield every difference, with what overrides it."""
    old = saved.content["config"]
    config = comparable(old, origin.config)
    teacher_before, teacher = saved.content["teacher_fingerprint"], origin.teacher_fingerprint
    if teacher_before != teacher:
        before, now = _short(teacher_before), _short(teacher)
        yield "teacher", f"the teacher's weights changed (fingerprint {before} in the checkpoint, {now} now)"
    for line in _differences("model", old.get("model"), config.get("model")):
        about_teacher = line.split(" ")[0].startswith(tuple(f"{name}." for name in _TEACHER_SECTIONS))
        yield "teacher" if about_teacher else "recipe", line
    for line in _differences("datasets", old.get("datasets"), config.get("datasets")):
        yield "data", line
    for line in _data_changes(saved, origin):
        yield "data", line
    for key, kind in _RUN_KEYS.items():
        for line in _differences(f"run.{key}", old["run"].get(key), config["run"].get(key)):
            yield kind, line
    for line in _differences("number of processes", saved.content["position"]["world_size"], world_size):
        yield "world_size", line


def _data_changes(saved: Checkpoint, origin: Origin) -> Iterator[str]:
    counts, key = saved.content["rows"], "picture_content"
    comparable = saved.content["config"]["run"].get(key) == origin.config["run"].get(key)
    for name, what in changed_data(saved.identity, origin.identity).items():
        if what == "rows":
            before, now = counts.get(name, "none"), origin.rows.get(name, "none")
            counts_in_words = f"{now} as before" if before == now else f"{before} in the checkpoint, {now} now"
            yield f"the rows of {name} changed ({counts_in_words})"
        elif comparable:
            yield f"the pictures of {name} changed: the size, time or content of a file"


def check_shapes(path: Any, saved: Mapping[str, torch.Tensor], built: Mapping[str, torch.Tensor]) -> None:
    """Raise a `UserError` where a checkpoint's weights are those of another model; no flag overrides that.

    Args:
        path: of the checkpoint, for messages.
        saved, built: the model's tensors in the checkpoint, and as built now.
    """
    if faults := shape_faults(path, saved, built):
        hidden = [f"run.resume: {path}: {len(faults) - 10} more differ"] if len(faults) > 10 else []
        way_out = "run.resume: it is another model's; start a new job without run.resume"
        raise UserError([*faults[:10], *hidden, way_out])


def shape_faults(path: Any, saved: Mapping[str, torch.Tensor], built: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a line for each tensor of another shape or type, and for those that only one of them has."""
    faults = []
    for name in saved.keys() & built.keys():
        there, here = saved[name], built[name]
        if there.shape != here.shape:
            faults.append(f"run.resume: {path}: {name} is {tuple(there.shape)} there, {tuple(here.shape)} in the model")
        elif there.dtype != here.dtype:
            faults.append(f"run.resume: {path}: {name} is {there.dtype} there, {here.dtype} in the model")
    faults.sort()
    for names, words in ((built.keys() - saved.keys(), "lacks"), (saved.keys() - built.keys(), "has")):
        if names:
            only = "weights of the model" if words == "lacks" else "weights that the model has not"
            faults.append(f"run.resume: {path} {words} {len(names)} {only}, first {min(names)}")
    return faults


def neighbours_line(before: str | None, now: str | None) -> str | None:
    """Return a line where the neighbours of the training set's pictures are not those of the checkpoint.

    Args:
        before, now: digests of the tables; None without one.
    """
    if before == now:
        return None
    there, here = _short(before or ""), _short(now or "")
    return f"the neighbours of run.batches changed (table {there} in the checkpoint, {here} now)"


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"


def _differences(name: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted(set(before) | set(now), key=str)
        return [line for key in keys for line in _differences(f"{name}.{key}", before.get(key), now.get(key))]
    same = before == now or (
        isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and list(before) == list(now)
    )
    before, now = (one_line(repr(value)) for value in (before, now))
    return [] if same else [f"{one_line(name)} was {before} in the checkpoint, is {now} now"]
