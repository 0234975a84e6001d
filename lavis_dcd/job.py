"""From a YAML file to a finished run: config -> task -> (data sets, model) -> runner."""

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
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import leave_group
from lavis_dcd.common.schema import parse
from lavis_dcd.common.seeding import seed_everything
from lavis_dcd.config.checks import job_faults
from lavis_dcd.config.job_file import JobConfig, check_sections, merge_defaults, read_job
from lavis_dcd.config.required_files import fetch_missing, missing_faults
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.plugins import load_plugins
from lavis_dcd.training.devices import Process, this_process
from lavis_dcd.variants import Variant

logger = logging.getLogger(__name__)


def run_job(cfg_path: str, options: Sequence[str], plugins: Sequence[str], evaluate: bool) -> None:
    """Train (or only evaluate) what a job describes.

    Args:
        cfg_path: a file in the current folder, else a packaged one.
        options: `a.b=c` settings over those of the file.
        plugins: modules to import first.
        evaluate: evaluate without training.

    Raises:
        UserError: anything the user can put right; before any model is built where it can be told by then.
    """

    load_plugins(plugins)
    user, path = read_job(cfg_path, options, evaluate)
    own, comparison = variants.split_off(user)
    if comparison:
        _run_comparison(own, comparison, path, options)
        return
    _run(check_job(own, path, options))


def load_config(cfg_path: str, options: Sequence[str] = (), evaluate: bool = False) -> JobConfig:
    """Read a job, put the options over it and the defaults under it, and check all of it.

    Nothing is built, written or downloaded.

    Args:
        cfg_path: a file in the current folder, else one that ships with the package.
        options: `a.b=c` (or `a.b c`) each.
        evaluate: sets `run.evaluate`.

    Raises:
        UserError: one line per fault.
    """
    user, path = read_job(cfg_path, options, evaluate)
    return check_job(user, path, options)


def check_job(user: DictConfig, path: Path, options: Sequence[str] = ()) -> JobConfig:
    """The sections of a job over their defaults, all of it checked.

    Raises:
        UserError: one line per fault.
    """

    check_sections(user, path)
    config = merge_defaults(user)
    if config.run.get("project") is None:
        config.run.project = path.stem
    faults = job_faults(config) + missing_faults(config)
    if faults:
        raise UserError(faults)
    return JobConfig(config, path, options)


def _run(config: JobConfig) -> None:
    if config.run_cfg.runner == "runner_dcd":
        _run_ours(config)
    else:
        _build_and_run(config, time.strftime("%Y%m%d-%H%M%S"))


def _run_comparison(own: DictConfig, comparison: DictConfig, path: Path, options: Sequence[str]) -> None:
    """Every variant with every seed, all checked before the first runs; finished ones are not repeated."""

    run = own.get("run", {})
    if run.get("evaluate") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{path}: variants are trained in one process; take one out to evaluate it or to use torchrun")
    project = run.get("project") or path.stem
    home = variants.home_folder(run, project)
    todo = variants.expand(comparison, run, home)
    configs = [_checked_variant(own, variant, path, options) for variant in todo]
    for variant, config in zip(todo, configs, strict=True):
        if variants.is_done(home, variant):
            logger.info("%s: done before", variant.folder)
            continue
        logger.info("%s, seed %d", variant.name, variant.seed)
        _run(config)
    report = variants.summarise(home, project, todo, OmegaConf.to_container(OmegaConf.merge(own, comparison)))
    logger.info("report: %s", report)


def _checked_variant(own: DictConfig, variant: Variant, path: Path, options: Sequence[str]) -> JobConfig:
    try:
        return check_job(OmegaConf.merge(own, variant.settings), path, options)
    except UserError as error:
        raise UserError([f"variants.{variant.name}: {line}" for line in error.faults]) from error


def _run_ours(config: JobConfig) -> None:
    with on_its_place(config) as (_, place):
        _build_and_run(config, place.share(time.strftime("%Y%m%d-%H%M%S")))


@contextmanager
def on_its_place(config: JobConfig) -> Iterator[tuple[RunConfig, Process]]:
    """The checked `run:` section and this process's place, files fetched, seeds set; torchrun's group is left behind.

    Raises:
        UserError: a section that makes no sense, a device that is not there, a download that fails.
    """

    run = parse(RunConfig, config.run_cfg, "run")
    joined_before = dist.is_available() and dist.is_initialized()
    place = this_process(run)
    try:
        if place.is_main:
            fetch_missing(config.config)
        place.share(None)
        seed_everything(run.seed)
        yield run, place
        if not joined_before:
            leave_group()
    finally:
        # after a failure the others are not waited for
        if not joined_before and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _build_and_run(config: JobConfig, job_id: str) -> Any:
    task = registry.get_task_class(config.run_cfg.task).setup_task(cfg=config)
    datasets = task.build_datasets(config)
    model = task.build_model(config)
    runner_class = registry.get_runner_class(config.run_cfg.runner)
    runner = runner_class(cfg=config, task=task, model=model, datasets=datasets, job_id=job_id)
    logger.info("job %s: %s with %s", job_id, config.run_cfg.task, config.run_cfg.runner)
    return runner.evaluate() if config.run_cfg.get("evaluate", False) else runner.train()
