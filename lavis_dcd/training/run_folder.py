"""The run folder: which one a job writes to, and what a finished job leaves there."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.locks import one_writer
from lavis_dcd.common.manifest import MANIFEST, DamagedError, Identity, Manifest, digest_of
from lavis_dcd.common.secrets import as_exported, hidden, hides_something
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.learner import as_learner
from lavis_dcd.reporting.memorised import Memorised
from lavis_dcd.training.checkpoint import FOLDER
from lavis_dcd.training.devices import map_leaves
from lavis_dcd.training.strategy import Strategy
from lavis_dcd.training.writing import writing_into

COMPARISON = "comparison.json"  # in a folder that holds the runs of several variants
_KIND, _FORMAT = "run", 1
_BEST = "best step"
_PRODUCTS = ("student.pth", "model.pth", "results.json", "results_*.json", "report.html")
# keys of run: that change no figure and no weight
_WITHOUT_EFFECT = {
    *("output_dir", "job_id", "resume", "resume_force", "log_freq", "report", "num_workers", "verify"),
    *("picture_content", "save_every", "keep_last", "keep_best"),
    *("world_size", "dist_url", "distributed", "use_dist_eval_sampler"),
}


def hold(folder: Path) -> ExitStack:
    """Lock a run folder for this process; closing what is returned gives it back.

    Raises:
        UserError: another process writes there.
    """
    way_out = (
        "wait until it has ended or stop it, then run.resume=auto goes on; or start a job of another run.job_id, "
        "without run.resume"
    )
    held = ExitStack()
    held.enter_context(one_writer(folder, "run.output_dir: the run folder", way_out=way_out))
    return held


def new_run_folder(project_folder: Path, run: RunConfig, job_id: str | None, held: ExitStack | None = None) -> Path:
    """Make the folder of a job that starts afresh.

    Args:
        job_id: the caller's proposal; `run.job_id` wins over it. Default: the time.
        held: gets the folder's lock, taken before anything is written there.

    Raises:
        UserError: the user named the job, and its folder already holds one, or another process writes there.
    """
    held = ExitStack() if held is None else held
    restart = run.resume == "auto"  # the first attempt ended before its first checkpoint
    if run.job_id and not (restart and run.evaluate and _is_used(project_folder / run.job_id)):
        folder = project_folder / run.job_id
        held.enter_context(hold(folder))
        if os.path.lexists(folder / COMPARISON):
            raise UserError(f"run.job_id: {folder} is the folder of a comparison; give another name")
        if not restart and _is_used(folder):
            raise UserError(
                f"run.job_id: {folder} already holds a job; give another name, or continue it with run.resume=auto"
            )
        if restart and (folder / MANIFEST).exists():
            raise UserError(
                f"run.job_id: {folder} holds a job that is done, without checkpoints; give another name, or move it "
                "away"
            )
    else:
        # an evaluation of a job that is there leaves that one's files alone
        folder = _claim(project_folder, run.job_id or job_id or time.strftime("%Y%m%d-%H%M%S"))
        held.enter_context(hold(folder))
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


def settings_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each section of a job, by the words for it, as a run's manifest has them.

    Keys of `run:` that change no figure and no weight do not count.

    Args:
        config: {"model", "datasets", "run"} in plain containers.
    """
    run = {key: value for key, value in config["run"].items() if key not in _WITHOUT_EFFECT}
    sections = {"model": config.get("model"), "data sets": config.get("datasets"), "run": run}
    if environment := config.get("environment"):  # digests of what interpolations stand for
        sections["the environment"] = environment
    return {f"the settings of {name}": digest_of(_text_keys(section)) for name, section in sections.items()}


def _text_keys(value: Any) -> Any:
    """Return nested containers whose keys can be sorted."""
    if isinstance(value, Mapping):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_run_manifest(
    folder: Path, identity: Identity, files: Iterable[str] | None = None, best_step: int | None = None
) -> None:
    """Write the mark of a job that is done, `manifest.json`: call it when all else is written.

    Args:
        identity: of the job: `settings_digests`, the teacher, and the rows and pictures of every split.
        files: names of what the job wrote; by default all in the folder that a job may leave.
        best_step: of the weights that the job chose by its validation.
    """
    if files is None:
        files = sorted(path.name for pattern in _PRODUCTS for path in folder.glob(pattern))
    facts = {} if best_step is None else {_BEST: best_step}
    with writing_into(folder):
        Manifest.of(folder, files, kind=_KIND, format=_FORMAT, identity=identity, facts=facts).write(folder)


def run_manifest(folder: Path) -> Manifest:
    """Return the manifest of a job that is done, whose files are whole.

    Raises:
        AbsentError: the job is not done.
        DamagedError: the manifest or a file was changed, cut or deleted since.
    """
    manifest = Manifest.read(folder, _KIND, _FORMAT)
    manifest.check_files(folder)
    return manifest


def finished(folder: Path) -> Manifest | None:
    """Return the same, or None for a job that is not done, or whose files are not what it wrote."""
    try:
        return run_manifest(folder)
    except DamagedError:
        return None


def best_step_of(folder: Path) -> int | None:
    """Return the step of the weights that a job chose which is done; None for one that is not, or chose none."""
    try:
        step = Manifest.read(folder, _KIND, _FORMAT).facts.get(_BEST)
    except DamagedError:
        return None
    return step if type(step) is int and step >= 0 else None


def clear_run_manifest(folder: Path) -> None:
    """Take the mark away, before a job writes into the folder again."""
    with writing_into(folder):
        (folder / MANIFEST).unlink(missing_ok=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml: the whole configuration as it ran."""
    with writing_into(folder), atomic_write(folder / "config.yaml", "w") as handle:
        yaml.safe_dump(dict(config), handle, sort_keys=False, allow_unicode=True)


def write_results(
    folder: Path,
    title: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    gallery: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    identity: Identity | None = None,
    memorised: Memorised | None = None,
) -> list[str]:
    """Write results.json for the first split, results_<split>.json for each other one; return their names.

    Args:
        rows: by split; each row has a "name" and metrics.
        gallery: queries and what each matcher returns, of the first split.
        identity: has the SHA-256s of the splits' rows and pictures.
        memorised: what the teacher knows of its training pictures.
    """
    names = []
    for number, (split, split_rows) in enumerate(rows.items()):
        content = {
            "title": hidden(title),
            "split": split,
            "rows": list(split_rows),
            "gallery": [] if number else list(gallery),
            "machine": dict(machine),
            "data": _data_of(split, identity or Identity()),
            **({} if memorised is None else {"memorised": memorised.stored()}),
        }
        name = f"results_{split}.json" if number else "results.json"
        with writing_into(folder), atomic_write(folder / name, "w") as handle:
            json.dump(content, handle, indent=1)
        names.append(name)
    return names


def _data_of(split: str, identity: Identity) -> dict[str, dict[str, str]]:
    sums = {"rows": identity.rows, "pictures": identity.pictures}
    return {
        kind: {name: value for name, value in of_kind.items() if f"{name}.".startswith(f"{split}.")}
        for kind, of_kind in sums.items()
    }


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
        with writing_into(folder), atomic_write(path) as handle:
            torch.save(map_leaves(content, _on_cpu), handle)
    return path


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
