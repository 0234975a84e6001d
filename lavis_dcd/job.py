"""The life of a job: read its file, check it, fetch its files, build data and model, run it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lavis  # noqa: F401  registers LAVIS's own names, then ours
import torch.distributed as dist
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_dcd import variants
from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.names import name_fault, path_fault
from lavis_dcd.common.processes import leave_group
from lavis_dcd.common.seeding import seed_everything
from lavis_dcd.config.checks import check_sections
from lavis_dcd.config.job import Job
from lavis_dcd.config.job_file import merge_defaults, read_job, refuse_unusable
from lavis_dcd.config.required_files import fetch_and_check, missing_faults, required_files
from lavis_dcd.models.building import reading_tensors_only
from lavis_dcd.plugins import load_plugins
from lavis_dcd.training.devices import Process, device_faults, this_process
from lavis_dcd.variants import Variant

log = logging.getLogger(__name__)

_RUNNER = "runner_dcd"


def run_job(cfg_path: str, options: Sequence[str], plugins: Sequence[str], evaluate: bool) -> None:
    """Train (or only evaluate) the model that a job describes.

    Args:
        cfg_path: a file in the current folder, else a packaged one.
        options: `a.b=c` settings over those of the file.
        plugins: modules to import first.
        evaluate: evaluate without training.

    Raises:
        UserError: anything the user can put right; before any model is built where it can be told by then.
    """
    load_plugins(plugins)
    sections, path = read_job(cfg_path, options, evaluate)
    sections, comparison = variants.split_off(sections)
    if comparison:
        _run_comparison(sections, comparison, path, options)
    else:
        _run(check_job(sections, path, options))


def load_config(cfg_path: str, options: Sequence[str] = (), evaluate: bool = False) -> Job:
    """Read and check a job. Nothing is built, written or downloaded.

    Args:
        cfg_path: a file in the current folder, else one that ships with the package.
        options: `a.b=c` (or `a.b c`) each.
        evaluate: sets `run.evaluate`.

    Raises:
        UserError: one line per fault.
    """
    sections, path = read_job(cfg_path, options, evaluate)
    return check_job(sections, path, options)


def check_job(sections: DictConfig, path: Path, options: Sequence[str] = ()) -> Job:
    """Merge a job's sections over their defaults and check all of them.

    Args:
        sections: as written, the options over them.
        path: the file they stand in.
        options: for the record.

    Raises:
        UserError: one line per fault.
    """
    refuse_unusable(sections, path)
    config = merge_defaults(sections)
    secrets.remember(config)
    if config.run.get("project") is None:
        config.run.project = path.stem
    checked, files = check_sections(config), required_files(config)
    faults = checked.faults + missing_faults(files)
    if checked.run is not None and config.run.runner == _RUNNER:
        faults += device_faults(checked.run)
    if faults or checked.run is None:
        raise UserError(faults)
    return Job(config, checked.run, checked.model, files, path, options)


def _run_comparison(sections: DictConfig, comparison: DictConfig, path: Path, options: Sequence[str]) -> None:
    """Run every variant with every seed, all checked before the first runs; finished ones are not repeated."""
    refuse_unusable(sections, path)
    run = sections.get("run", {})
    if run.get("evaluate") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{path}: variants are trained in one process; take one out to evaluate it or to use torchrun")
    project = _name(run.get("project")) or path.stem
    named = {"run.project": project, "run.job_id": _name(run.get("job_id"))}
    faults = [name_fault(value, field) for field, value in named.items() if value is not None]
    faults.append(path_fault(run.get("output_dir", "output"), "run.output_dir"))
    if found := [line for line in faults if line is not None]:
        raise UserError(found)
    home = variants.home_folder(run, project)
    todo = variants.expand(comparison, run, home)
    jobs = [_check_variant(sections, variant, path, options) for variant in todo]
    for variant, job in zip(todo, jobs, strict=True):
        if variants.is_done(home, variant):
            log.info("%s: done before", variant.folder)
            continue
        log.info("%s, seed %d", variant.name, variant.seed)
        _run(job)
    report = variants.summarise(home, project, todo, OmegaConf.to_container(OmegaConf.merge(sections, comparison)))
    log.info("report: %s", report)


def _name(value: Any) -> Any:
    """Return a name that YAML has read as a number as the text that it was."""
    return str(value) if isinstance(value, int | float) else value


def _check_variant(sections: DictConfig, variant: Variant, path: Path, options: Sequence[str]) -> Job:
    try:
        return check_job(OmegaConf.merge(sections, variant.settings), path, options)
    except UserError as error:
        raise UserError([f"variants.{variant.name}: {line}" for line in error.faults]) from error


def _run(job: Job) -> None:
    now = time.strftime("%Y%m%d-%H%M%S")
    if job.run_cfg.runner != _RUNNER:
        _build_and_run(job, now)
        return
    with on_its_place(job) as place:
        _build_and_run(job, place.share(now))


@contextmanager
def on_its_place(job: Job) -> Iterator[Process]:
    """This process's place, files fetched and seeds set; torchrun's group is left afterwards.

    Raises:
        UserError: a device that is not there, a download that fails.
    """
    joined_before = dist.is_available() and dist.is_initialized()
    place = this_process(job.run)
    try:
        if place.is_main:
            fetch_and_check(job.files)
        place.share(None)
        seed_everything(job.run.seed)
        yield place
        if not joined_before:
            leave_group()
    finally:
        # after a failure the others are not waited for
        if not joined_before and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _build_and_run(job: Job, job_id: str) -> None:
    task = registry.get_task_class(job.run.task).setup_task(cfg=job)
    datasets = task.build_datasets(job)
    with reading_tensors_only(registry.get_model_class(job.model_cfg.arch)):
        model = task.build_model(job)
    runner_class = registry.get_runner_class(job.run.runner)
    runner = runner_class(cfg=job, task=task, model=model, datasets=datasets, job_id=job_id)
    log.info("job %s: %s with %s", job_id, job.run.task, job.run.runner)
    if job.run.evaluate:
        runner.evaluate()
    else:
        runner.train()
