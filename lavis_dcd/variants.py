"""Several runs of one job: named settings and seeds side by side, and one table of their means and spreads.

A job file may carry, beside ``model``, ``datasets`` and ``run``::

    variants:                 # name -> settings over the job's own
      student: {}
      ground truth alone: {model: {loss: {alpha: 0.0}}}
    seeds: [0, 1, 2]          # every variant once with each
"""

from __future__ import annotations

import json
import logging
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.reporting.report import write_report
from lavis_dcd.reporting.table import format_table
from lavis_dcd.training.run_folder import write_config, write_results

log = logging.getLogger(__name__)

SECTIONS = ("variants", "seeds")
_SHARED = ("teacher", "student before training")  # rows that every variant shares, evaluated by the first run alone
_AVERAGED = re.compile(r"(_r\d+|r_sum|r_mean|ms_per_pair|median_rank)$")


@dataclass(frozen=True)
class Variant:
    """One run of a comparison: a named setting with one seed, in a folder of its own below the comparison's."""

    name: str
    seed: int
    settings: DictConfig  # of the whole job, over the file and the options

    @property
    def folder(self) -> str:
        """The name of the run's folder in the comparison's."""
        return str(self.settings.run.job_id)


def slug(name: str) -> str:
    """Return a name as a folder name: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def split_off(user: DictConfig) -> tuple[DictConfig, DictConfig]:
    """Split a job file into the sections of one job, and ``variants`` and ``seeds`` where it has them."""
    job = OmegaConf.masked_copy(user, [key for key in user if key not in SECTIONS])
    return job, OmegaConf.masked_copy(user, [key for key in user if key in SECTIONS])


def home_folder(run: Mapping[str, Any], project: str) -> Path:
    """Return ``<run.output_dir>/<project>/<job id>``: the newest one with ``run.resume: auto``, else a new one."""
    parent = Path(run.get("output_dir", "output")) / project
    if run.get("job_id"):
        return parent / str(run["job_id"])
    earlier = sorted(p for p in parent.glob("*") if p.is_dir()) if run.get("resume") == "auto" else []
    return earlier[-1] if earlier else parent / time.strftime("%Y%m%d-%H%M%S")


def expand(comparison: DictConfig, run: Mapping[str, Any], home: Path) -> list[Variant]:
    """Return every variant with every seed; the first alone evaluates the models that all share.

    Args:
        comparison: ``variants`` and ``seeds``.
        run: the job's ``run:`` section.
        home: the folder in which each run gets its own.

    Raises:
        UserError: sections of another form.
    """
    variants = OmegaConf.to_container(comparison, resolve=True).get("variants")
    seeds = list(comparison.get("seeds", None) or [run.get("seed", 42)])
    faults = []
    if not isinstance(variants, dict) or not variants:
        faults.append("variants: expected names with settings under each, as in variants: {student: {}}")
        variants = {}
    if not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        faults.append(f"seeds: {seeds!r} must be a list of whole numbers")
    for name, settings in variants.items():
        if not isinstance(settings or {}, dict) or not slug(str(name)):
            faults.append(f"variants.{name}: expected sections such as model: or run: under a name with letters")
    if faults:
        raise UserError(faults)
    runs: list[Variant] = []
    for seed in seeds:
        for name, settings in variants.items():
            place = {"seed": seed, "output_dir": str(home.parent), "project": home.name}
            place["job_id"] = f"{slug(str(name))}-seed{seed}"
            shared = {"evaluate_teacher": False, "evaluate_before": False} if runs else {}
            runs.append(Variant(str(name), seed, OmegaConf.merge({"run": shared}, settings or {}, {"run": place})))
    return runs


def is_done(home: Path, variant: Variant) -> bool:
    """Return whether this run has its results, so that a comparison taken up again does not repeat it."""
    return (home / variant.folder / "results.json").is_file()


def summarise(home: Path, title: str, variants: Sequence[Variant], config: Mapping[str, Any]) -> Path:
    """Write one table and report of all runs in ``home``: means over seeds, ``<metric>_std`` their standard deviation.

    Returns:
        the path of the report.
    """
    results = [json.loads((home / v.folder / "results.json").read_text(encoding="utf-8")) for v in variants]
    first = results[0]
    rows = [row for row in first["rows"] if row["name"] in _SHARED]
    for name in dict.fromkeys(v.name for v in variants):
        learners = [
            row for v, content in zip(variants, results, strict=True) if v.name == name
            for row in content["rows"] if row["name"] not in _SHARED
        ]  # fmt: skip
        rows.append(_mean_row(name, learners))
    write_config(home, config)
    write_results(home, title, {first["split"]: rows}, first["gallery"], first["machine"])
    seeds = len({v.seed for v in variants})
    of_seeds = f"means of {seeds} seeds" if seeds > 1 else "one seed"
    log.info("results on %s, %s:\n%s", first["split"], of_seeds, format_table(rows))
    return write_report(home)


def _mean_row(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged = {**rows[0], "name": name, "seeds": len(rows)}
    for key, value in rows[0].items():
        if isinstance(value, int | float) and _AVERAGED.search(key):
            values = [row[key] for row in rows]
            merged[key] = statistics.fmean(values)
            if len(values) > 1:
                merged[f"{key}_std"] = statistics.stdev(values)
    return merged
