"""The rows of a comparison: of each variant the means over its seeds and their spread."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_dcd.common.errors import UserError
from lavis_dcd.reporting.results import Results

TEACHER, BEFORE = "teacher", " before training"  # rows that are no learner's: the second is the end of a name
_AVERAGED = re.compile(r"(_r\d+|r_sum|r_mean|ms_per_(?:pair|search)|median_rank)$")
# facts without which figures, times above all, are not those of one machine
_OF_MACHINE = ("system", "processor", "cores", "threads", "device", "gpu", "precision", "torch")


@dataclass(frozen=True)
class Measured:
    """The results of one run of a variant.

    Args:
        title: of the variant, as the table shows it.
        path: of the results, for messages.
        teacher: a SHA-256 of what the run's teacher is; "" where there is none.
    """

    title: str
    results: Results
    path: Path
    teacher: str = ""

    def learner(self) -> Mapping[str, Any]:
        """Return the row of the model that learned.

        Raises:
            UserError: there is none, or more than one.
        """
        rows = [row for row in self.results.rows if not _is_shared(row["name"])]
        if len(rows) != 1:
            names = ", ".join(row["name"] for row in self.results.rows) or "none"
            raise UserError(f"{self.path}: expected one row of the model that learned; rows: {names}")
        return rows[0]


def _is_shared(name: str) -> bool:
    return name == TEACHER or name.endswith(BEFORE)


def comparison_rows(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the rows of one table: what was measured once for all, then each variant's means over its seeds.

    A mean has its sample standard deviation beside it, ``<metric>_std``.

    Raises:
        UserError: results of different splits; a row or a figure is missing.
    """
    splits = {run.results.split: run for run in runs}
    if len(splits) > 1:
        of_runs = ", ".join(f"{run.path} of {split!r}" for split, run in splits.items())
        raise UserError(f"results of different splits do not make one table: {of_runs}")
    one_teacher = len({run.teacher for run in runs}) == 1
    shared: dict[str, dict[str, Any]] = {}
    for run in runs:
        for row in run.results.rows:
            if _is_shared(row["name"]):
                # of several teachers, the one that was evaluated is no reference for the others' students
                name = row["name"] if one_teacher else f"{row['name']} ({run.title})"
                shared.setdefault(row["name"], {**row, "name": name})
    titles = dict.fromkeys(run.title for run in runs)
    return [*shared.values(), *(_mean_row(title, [run for run in runs if run.title == title]) for title in titles)]


def _mean_row(title: str, runs: Sequence[Measured]) -> dict[str, Any]:
    rows = [run.learner() for run in runs]
    merged = {**rows[0], "name": title, "seeds": len(rows)}
    for key in dict.fromkeys(key for row in rows for key in row if _AVERAGED.search(key)):
        if all(row.get(key) is None for row in rows):
            continue
        values = [_figure(run.path, row, key) for run, row in zip(runs, rows, strict=True)]
        merged[key] = statistics.fmean(values)
        if len(values) > 1:
            merged[f"{key}_std"] = statistics.stdev(values)
    return merged


def _figure(path: Path, row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: {key} of {row['name']!r} is missing, and other seeds have it")
    return value


def differing_machines(runs: Sequence[Measured]) -> list[str]:
    """Return the facts of the machine that are not the same for all runs."""
    return [fact for fact in _OF_MACHINE if len({str(run.results.machine.get(fact)) for run in runs}) > 1]
