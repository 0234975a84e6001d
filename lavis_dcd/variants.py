"""Several runs of one job: named settings and seeds side by side.

A job file may carry, beside ``model``, ``datasets`` and ``run``::

    variants:                 # name -> settings over the job's own
      student: {}
      ground truth alone: {model: {loss: {alpha: 0.0}}}
    seeds: [0, 1, 2]          # every variant once with each
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.names import LONGEST_NAME, folder_name
from lavis_dcd.common.texts import one_line, shown
from lavis_dcd.config.job import Job
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.reporting.means import BEFORE, TEACHER

log = logging.getLogger(__name__)

SECTIONS = ("variants", "seeds")
_UNSEEN = ("Cc", "Cf", "Cs")  # control characters, marks of direction and joiners, lone surrogates
_PLACE = ("output_dir", "project", "job_id", "seed")  # keys of run: that a comparison gives each of its runs


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

    @property
    def title(self) -> str:
        """The variant's name as tables and messages have it: escaped where it cannot be printed."""
        return one_line(self.name)

    @property
    def words(self) -> str:
        """The run in a message."""
        return f"variant {self.title!r}, seed {self.seed}"


def split_off(user: DictConfig) -> tuple[DictConfig, DictConfig]:
    """Split a job file into the sections of one job, and ``variants`` and ``seeds`` where it has them."""
    job = OmegaConf.masked_copy(user, [key for key in user if key not in SECTIONS])
    return job, OmegaConf.masked_copy(user, [key for key in user if key in SECTIONS])


def expand(comparison: DictConfig, run: Mapping[str, Any], home: Path) -> list[Variant]:
    """Return every variant with every seed; the first alone evaluates the models that all share.

    Args:
        comparison: ``variants`` and ``seeds``.
        run: the job's ``run:`` section.
        home: the folder in which each run gets its own.

    Raises:
        UserError: sections of another form; names of variants that would be taken for one another.
    """
    # unresolved: what a variant takes from other sections, or from the environment, stays as it is written
    content: Any = OmegaConf.to_container(comparison)
    variants, seeds = content.get("variants"), content.get("seeds")
    seeds = [run.get("seed", RunConfig.seed)] if seeds in (None, []) else seeds
    if faults := _variants_faults(variants) + _seeds_faults(seeds):
        raise UserError(faults)
    runs: list[Variant] = []
    for seed in seeds:
        for name, settings in variants.items():
            place = {"seed": seed, "output_dir": str(home.parent), "project": home.name}
            place["job_id"] = f"{folder_name(name)}-seed{seed}"
            shared = {"evaluate_teacher": False, "evaluate_before": False} if runs else {}
            runs.append(Variant(name, seed, OmegaConf.merge({"run": shared}, settings or {}, {"run": place})))
    return runs


def _seeds_faults(seeds: Any) -> list[str]:
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not whole:
        return [f"seeds: {shown(seeds)} must be a list of whole numbers"]
    if twice := _repeated(seeds):
        return [f"seeds: {twice[0]} stands there twice; one run would count as two"]
    return []


def _repeated(items: Iterable[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]


def _variants_faults(variants: Any) -> list[str]:
    if not isinstance(variants, dict) or not variants:
        return ["variants: expected names with settings under each, as in variants: {student: {}}"]
    faults: list[str] = []
    for name, settings in variants.items():
        faults += _name_faults(name) or _settings_faults(name, settings)
    return faults or _confusions(list(variants))


def _name_faults(name: object) -> list[str]:
    field = f"variants.{shown(name)}"
    if not isinstance(name, str):
        # YAML makes one key of 1, 1.0 and true; of two such names, one variant would be left
        return [f"{field}: this name is a {type(name).__name__} to YAML, expected text; put it in quotes"]
    if not _looks(name):
        return [f"{field}: the name has nothing that can be seen; give a name with letters"]
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        return [f"{field}: the name has more than {LONGEST_NAME} bytes; give a shorter one"]
    if name == TEACHER or name.endswith(BEFORE):
        return [f"{field}: the table has a row of that name that is no variant's; give another name"]
    return []


def _settings_faults(name: str, settings: Any) -> list[str]:
    field = f"variants.{one_line(name)}"
    if not isinstance(settings, dict | None):
        return [f"{field}: expected sections such as model: or run: below the name, got {shown(settings)}"]
    sections = settings or {}
    faults = [
        f"{field}.{one_line(str(key))}: {shown(section)} is not a section"
        for key, section in sections.items()
        if not isinstance(section, dict | None)
    ]
    if not faults:
        for key in set(_PLACE) & set(sections.get("run") or {}):
            log.warning("%s.run.%s: has no effect: a comparison gives each run its folder and its seed", field, key)
    return faults


def _confusions(names: Sequence[str]) -> list[str]:
    """Return a line for each name that would be taken for an earlier one, in a table or on the disk."""
    faults: list[str] = []
    for words, made in (
        ("look the same", _looks), ("look the same in a table", one_line), ("would get one folder", folder_name)
    ):  # fmt: skip
        first: dict[str, str] = {}
        for name in names:
            earlier = first.setdefault(made(name), name)
            if earlier is not name:
                faults.append(f"variants: {shown(earlier)} and {shown(name)} {words}; give one of them another name")
    return faults


def _looks(name: str) -> str:
    """Return what people see of a name: without characters that have no form, however its letters are encoded."""
    seen = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) not in _UNSEEN)
    return " ".join(seen.split())


def refuse_incomparable(variants: Sequence[Variant], jobs: Sequence[Job]) -> None:
    """Refuse jobs whose results would not make one table, before the first is trained.

    Args:
        jobs: of the variants, in their order.

    Raises:
        UserError: one line per variant.
    """
    faults = [_misfit(job, jobs[0]) for job in jobs]
    lines = [f"variants.{v.title}: {fault}" for v, fault in zip(variants, faults, strict=True) if fault]
    if lines:
        raise UserError(dict.fromkeys(lines))  # once for all seeds


def _misfit(job: Job, first: Job) -> str | None:
    run = job.run
    if not isinstance(run, RunConfig):
        return f"run.runner: {job.run_cfg.runner} has settings of its own; a comparison needs those of runner_dcd"
    if run.evaluate:
        return "run.evaluate: variants are trained; leave it out"
    if run.resume not in (None, "auto"):
        return f"run.resume: {shown(run.resume)} is one run's; set run.resume=auto for the whole comparison"
    if not run.table_splits:
        return "run.test_splits: is empty, so there is nothing to compare"
    if run.table_splits[0] != first.run.table_splits[0]:
        return (
            f"run.test_splits: {run.table_splits[0]!r} comes first, and {first.run.table_splits[0]!r} in the first "
            "variant; one table is of one split"
        )
    if run.picture_content != first.run.picture_content:
        return "run.picture_content: another one than the first variant's, so nothing tells whether they saw the same"
    return None
