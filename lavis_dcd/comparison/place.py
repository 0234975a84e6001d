"""The folder of a comparison: which one it is, and one process at a time that writes there."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import clear_leftovers
from lavis_dcd.common.locks import is_locked, one_writer
from lavis_dcd.common.manifest import AbsentError, DamagedError, Identity, Manifest
from lavis_dcd.common.names import name_fault, path_fault
from lavis_dcd.common.texts import shown
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.run_folder import COMPARISON

log = logging.getLogger(__name__)

_KIND, _FORMAT = "comparison that was begun", 1


@dataclass(frozen=True)
class Place:
    """The keys of a job's ``run:`` section that say where its comparison lies, and which one.

    Args:
        again: take the newest one up again, or the one that ``job_id`` names.
        seed: of the runs, where the job file lists none.
    """

    output_dir: str = RunConfig.output_dir
    project: str = "job"
    job_id: str | None = None
    again: bool = False
    seed: Any = RunConfig.seed

    @classmethod
    def of_job(cls, sections: DictConfig, path: Path) -> Place:
        """Read a job's sections; the project is by default named after the file that they stand in.

        Raises:
            UserError: names that cannot be folders; a job that is no comparison's.
        """
        run = _value(sections, "run", "")
        if not isinstance(run, DictConfig) and "run" in sections:
            raise UserError(f"{path}: run: {shown(run)} is not a section")
        keys = ("output_dir", "project", "job_id", "resume", "seed", "evaluate")
        given = {key: value for key in keys if (value := _value(run, key, "run.")) is not None}
        resume = given.pop("resume", None)
        faults = [name_fault(given.setdefault("project", path.stem), "run.project")]
        if "job_id" in given:
            faults.append(name_fault(given["job_id"], "run.job_id"))
        faults.append(path_fault(given.get("output_dir", cls.output_dir), "run.output_dir"))
        if given.pop("evaluate", False):
            faults.append(f"{path}: variants are trained; take one out to evaluate it")
        if resume not in (None, "auto"):
            faults.append(
                f"run.resume: {shown(resume)} is one run's; a comparison is taken up again with run.resume=auto"
            )
        if told := [fault for fault in faults if fault]:
            raise UserError(told)
        return cls(**given, again=resume == "auto")

    def home(self) -> Path:
        """Return the comparison's folder, there or not: the one that is named, the newest one, or a new one.

        Raises:
            OSError: the folders cannot be listed.
        """
        parent = Path(self.output_dir) / self.project
        if self.job_id:
            return parent / self.job_id
        if self.again and (earlier := _comparisons(parent)):
            return max(earlier, key=lambda home: (earlier[home], home.name))
        now = time.strftime("%Y%m%d-%H%M%S")
        names = (now if number == 1 else f"{now}-{number}" for number in itertools.count(1))
        return next(home for name in names if not os.path.lexists(home := parent / name) and not is_locked(home))


def _value(section: DictConfig | None, key: str, path: str) -> Any:
    try:
        value = None if section is None else section.get(key)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}{key}: {str(error).splitlines()[0]}") from error
    # a name of digits alone is a number to YAML
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if key in ("output_dir", "project", "job_id") and is_number else value


def _comparisons(parent: Path) -> dict[Path, float]:
    """Return the comparisons among a project's folders, with the times at which they were begun."""
    begun: dict[Path, float] = {}
    for folder in sorted(filter(Path.is_dir, parent.iterdir())) if parent.is_dir() else ():
        try:
            begun[folder] = float(Manifest.read(folder, _KIND, _FORMAT, COMPARISON).facts["begun"])
        except AbsentError:
            continue  # a single job's
        except (DamagedError, LookupError, TypeError, ValueError) as error:
            log.warning("passed over: run.resume: %s (%s)", folder, error)
    return begun


@contextmanager
def opened(home: Path) -> Iterator[None]:
    """Make the comparison's folder, or take it up again; no other process writes there while inside.

    Raises:
        UserError: another process does; the folder is of something else.
    """
    with one_writer(home, "the comparison", way_out="wait until it has ended, or give another run.job_id"):
        if not contents(home):
            home.mkdir(parents=True, exist_ok=True)
            Manifest(_KIND, _FORMAT, Identity(), facts={"begun": time.time()}).write(home, COMPARISON)
        else:
            clear_leftovers(home)
            try:
                Manifest.read(home, _KIND, _FORMAT, COMPARISON)
            except AbsentError as error:
                raise UserError(
                    f"run.job_id: {home} is there and no comparison of this version; give another name"
                ) from error
            except DamagedError as error:
                raise UserError(f"run.job_id: {home}: {error}; move the folder away or give another name") from error
        yield


def contents(folder: Path) -> list[str]:
    """Return the names in a folder without the hidden ones, which a killed process may have left; none without it."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def still_there(home: Path) -> None:
    """Refuse to write on where the comparison's folder was removed: a record that is written would make it anew.

    Raises:
        UserError: it was.
    """
    if not (home / COMPARISON).is_file():
        raise UserError(f"run.output_dir: {home} was removed or moved while its comparison was running; start it again")
