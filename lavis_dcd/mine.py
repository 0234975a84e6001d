"""The door of mining: `python -m lavis_dcd mine --cfg-path F`."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavis_dcd.cli import guarded, job_parser, ready_process
from lavis_dcd.common.errors import UserError

if TYPE_CHECKING:
    from lavis_dcd.config.job_file import JobConfig
    from lavis_dcd.models.dcd.config import DcdConfig

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
    from lavis_dcd.mining.miner import Miner
    from lavis_dcd.plugins import load_plugins
    from lavis_dcd.runners.runner_dcd import by_split
    from lavis_dcd.variants import split_off

    load_plugins(args.plugins)
    user, path = read_job(args.cfg_path, args.options)
    own, comparison = split_off(user)
    if comparison:
        log.info("%s: its variants and seeds are left out, the job itself is mined", path)
    config = check_job(own, path, args.options)
    distillation = _distillation(config)
    with on_its_place(config) as (run, place):
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        task = registry.get_task_class(run.task).setup_task(cfg=config)
        datasets = by_split(task.build_datasets(config), run)
        if missing := [split for split in run.train_splits if split not in datasets]:
            raise UserError(f"run.train_splits: the data sets have no split {', '.join(missing)}; nothing to mine")
        folder = bank_folder(config.model_cfg, config.datasets_cfg)
        Miner(distillation, folder, datasets, run, place, _train_command(args, config)).mine(args.overwrite)


def _distillation(config: JobConfig) -> DcdConfig:
    from lavis_dcd.common.schema import parse
    from lavis_dcd.config.checks import section_schema
    from lavis_dcd.models.dcd.config import DcdConfig

    schema = section_schema(config.model_cfg)
    if schema is None or not issubclass(schema, DcdConfig):
        raise UserError(
            f"model.arch: {config.model_cfg.arch} has no teacher to mine; give a distillation job (arch: dcd)"
        )
    return parse(schema, config.model_cfg, "model")


def _train_command(args: argparse.Namespace, config: JobConfig) -> str:
    """The line that trains from the bank: the same job, its candidates from there."""
    candidates = config.model_cfg.get("candidates") or {}
    wanted, common = [], candidates.get("source")
    sections = {d: candidates.get(d) for d in ("image_to_text", "text_to_image") if d in candidates}
    named = {d: section for d, section in sections.items() if section is not None and section.get("source")}
    if len(named) < 2 and common != "bank":
        wanted.append("model.candidates.source=bank")
    for direction, section in named.items():
        if section.source != "bank":
            wanted.append(f"model.candidates.{direction}.source=bank")
            if section.get("count") is not None:
                wanted.append(f"model.candidates.{direction}.count=null")
    if candidates.get("teacher_budget") is not None:
        wanted.append("model.candidates.teacher_budget=null")
    options = [*args.options, *wanted]
    parts = ["python", "-m", "lavis.train", "--cfg-path", args.cfg_path]
    parts += ["--options", *options] if options else []
    parts += ["--plugins", *args.plugins] if args.plugins else []
    return shlex.join(parts)
