"""The life of a job: read its file, check it, fetch its files, build data and model, run it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lavis  # noqa: F401  registers LAVIS's own names, then ours
import torch.distributed as dist
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_dcd import variants
from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity, digest_of
from lavis_dcd.common.processes import leave_group
from lavis_dcd.common.schema import plain
from lavis_dcd.common.seeding import seed_everything
from lavis_dcd.comparison.place import Place, opened
from lavis_dcd.comparison.records import Sums, begin, check_one_test_set, finish, sort_out
from lavis_dcd.comparison.summary import summarise
from lavis_dcd.config.checks import check_sections
from lavis_dcd.config.job import Job
from lavis_dcd.config.job_file import merge, merge_defaults, read_job, refuse_unusable
from lavis_dcd.config.required_files import fetch_and_check, missing_faults, required_files
from lavis_dcd.datasets.identity import pictures_digests, rows_digests
from lavis_dcd.models.building import reading_tensors_only
from lavis_dcd.plugins import load_plugins
from lavis_dcd.runners.runner_dcd import by_split
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
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise UserError(f"{path}: variants are trained in one process; take one out to use torchrun")
    for written in (sections, comparison):  # what the runs get as their place is resolved
        secrets.remember(written)
    place = Place.of_job(sections, path)
    home = place.home()
    todo = variants.expand(comparison, {"seed": place.seed}, home)
    jobs = [_check_variant(sections, variant, path, options) for variant in todo]
    variants.refuse_incomparable(todo, jobs)
    sums, data = Sums(), _DataIdentities()
    with opened(home):
        done, pending = sort_out(home, list(zip(todo, jobs, strict=True)), data.of, sums)
        for variant, job in pending:
            log.info("%s", variant.words)
            fetch_and_check(job.files)
            begin(home, variant, job, sums)
            _run_variant(variant, job)
            done.append(finish(home, variant, job))
            check_one_test_set(done, job.run.table_splits[0])
        done.sort(key=lambda run: todo.index(run.variant))
        content = OmegaConf.to_container(OmegaConf.merge(sections, comparison))
        log.info("report: %s", summarise(home, place.project, done, content))


def _run_variant(variant: Variant, job: Job) -> None:
    try:
        _run(job)
    except UserError as error:
        raise UserError([f"{variant.words}: {line}" for line in error.faults]) from error


class _DataIdentities:
    """The identities of the data that jobs train on and are evaluated on; jobs with the same settings share one."""

    def __init__(self) -> None:
        self._known: dict[str, Identity] = {}

    def of(self, job: Job) -> Identity:
        """Build the job's data sets, without its model, and return their identity."""
        run = job.run
        splits = list(dict.fromkeys(["train", *run.valid_splits, *run.test_splits]))
        settings = [plain(job.datasets_cfg), run.train_splits, splits, run.picture_content, run.task, run.seed]
        if (key := digest_of(settings)) not in self._known:
            with on_its_place(job):
                # pictures that are missing or broken differ from those that a run was trained on
                unverified = _with_run(job, verify="off")
                task = registry.get_task_class(run.task).setup_task(cfg=unverified)
                datasets = by_split(task.build_datasets(unverified), run)
                used = {split: datasets.get(split) for split in splits}
                self._known[key] = Identity(
                    rows=rows_digests(used), pictures=pictures_digests(used, run.picture_content)
                )
        return self._known[key]


def _with_run(job: Job, **keys: Any) -> Job:
    config = OmegaConf.merge(job.config, {"run": keys})
    return Job(config, replace(job.run, **keys), job.model, job.files, Path(job.args.cfg_path), job.args.options)


def _check_variant(sections: DictConfig, variant: Variant, path: Path, options: Sequence[str]) -> Job:
    try:
        return check_job(merge(sections, variant.settings), path, options)
    except UserError as error:
        raise UserError([f"variants.{variant.title}: {line}" for line in error.faults]) from error


def _run(job: Job) -> None:
    # every job is its own when it is made; of several, the one that runs has to be
    registry.register("configuration", job)
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
