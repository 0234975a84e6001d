"""The command `python -m lavis_dcd mine --cfg-path F`."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_dcd.cli import guarded, job_parser, ready_process
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.locks import one_writer

if TYPE_CHECKING:
    from lavis_dcd.mining.miner import Process

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill a distillation job's score bank. Returns the exit status."""
    parser = job_parser(
        "lavis_dcd mine",
        "Let the teacher of a distillation job score candidates once and keep the scores, so that the job then trains "
        "without it (model.candidates.source=bank). An interrupted mining goes on where it stopped; torchrun shares it "
        "among several processes.",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bank of other settings, teacher or data")
    args = parser.parse_args(argv)
    return guarded(lambda: _mine(args))


def _mine(args: argparse.Namespace) -> None:
    ready_process()
    import lavis  # noqa: F401  registers LAVIS's own names, then ours
    import torch
    from lavis.common.registry import registry

    from lavis_dcd.banks.score_bank import bank_folder
    from lavis_dcd.config.job_file import read_job
    from lavis_dcd.job import check_job, on_its_place
    from lavis_dcd.mining.miner import Miner, mining_faults
    from lavis_dcd.models.dcd.config import DcdConfig
    from lavis_dcd.plugins import load_plugins
    from lavis_dcd.runners.runner_dcd import by_split
    from lavis_dcd.training.devices import load_warnings
    from lavis_dcd.variants import split_off

    load_plugins(args.plugins)
    sections, path = read_job(args.cfg_path, args.options)
    sections, comparison = split_off(sections)
    if comparison:
        log.info("%s: its variants and seeds are left out, the job itself is mined", path)
    job = check_job(sections, path, args.options)
    if not isinstance(job.model, DcdConfig):
        raise UserError(f"model.arch: {job.model_cfg.arch} has no teacher to mine; give a distillation job (arch: dcd)")
    if faults := mining_faults(job.model):
        raise UserError(faults)
    folder = bank_folder(job.model_cfg, job.datasets_cfg)
    with on_its_place(job) as place, _one_miner(folder, place):
        for line in load_warnings(job.run) if place.is_main else []:
            log.warning("%s", line)
        if job.run.num_threads:
            torch.set_num_threads(job.run.num_threads)
        task = registry.get_task_class(job.run.task).setup_task(cfg=job)
        datasets = by_split(task.build_datasets(job), job.run)
        if missing := [split for split in job.run.train_splits if split not in datasets]:
            raise UserError(f"run.train_splits: the data sets have no split {', '.join(missing)}; nothing to mine")
        Miner(job.model, folder, datasets, job.run, place, _train_command(args, job.model_cfg)).mine(args.overwrite)


@contextmanager
def _one_miner(folder: Path, place: Process) -> Iterator[None]:
    """Keep other minings from the bank; torchrun's main process does so for all of its processes.

    Raises:
        UserError: another one is at it; in every process.
    """
    way_out = "wait until it has ended, or mine into another folder with model.candidates.bank.path=FOLDER"
    with ExitStack() as held:
        faults: list[str] = []
        if place.is_main:
            try:
                held.enter_context(one_writer(folder, "the score bank", way_out=way_out))
            except UserError as error:
                faults = error.faults
        if faults := place.share(faults):
            raise UserError(faults)
        yield


def _train_command(args: argparse.Namespace, model: Mapping[str, Any]) -> str:
    """Return the line that trains from the bank: the same job, its candidates from there."""
    options = [*args.options, *_bank_options(model.get("candidates") or {})]
    words = ["python", "-m", "lavis.train", "--cfg-path", args.cfg_path]
    words += ["--options", *options] if options else []
    words += ["--plugins", *args.plugins] if args.plugins else []
    return shlex.join(words)


def _bank_options(candidates: Mapping[str, Any]) -> list[str]:
    """Return the options that make a bank the source of all candidates."""
    options = []
    directions = {d: candidates.get(d) for d in ("image_to_text", "text_to_image")}
    with_source = {d: section for d, section in directions.items() if section is not None and section.get("source")}
    if len(with_source) < 2 and candidates.get("source") != "bank":
        options.append("model.candidates.source=bank")
    for direction, section in with_source.items():
        if section["source"] != "bank":
            options.append(f"model.candidates.{direction}.source=bank")
            if section.get("count") is not None:
                options.append(f"model.candidates.{direction}.count=null")
    if candidates.get("teacher_budget") is not None:
        options.append("model.candidates.teacher_budget=null")
    return options
