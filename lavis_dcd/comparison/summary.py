"""The table and the report of a comparison, from the results of runs that are done."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import MANIFEST, Identity, Manifest
from lavis_dcd.comparison.records import Finished, check_one_test_set
from lavis_dcd.reporting.means import Measured, comparison_rows, differing_machines
from lavis_dcd.reporting.memorised import Memorised
from lavis_dcd.reporting.report import write_report
from lavis_dcd.reporting.results import RESULTS, Results
from lavis_dcd.reporting.table import format_table
from lavis_dcd.training.run_folder import write_config, write_results

log = logging.getLogger(__name__)

_KIND, _FORMAT = "comparison", 1


def summarise(home: Path, title: str, finished: Sequence[Finished], config: Mapping[str, Any]) -> Path:
    """Write one table and report of all runs in ``home``: means over seeds, ``<metric>_std`` their standard deviation.

    Args:
        finished: in the table's order.

    Returns:
        the path of the report.

    Raises:
        UserError: the files of a run are not those that it left; runs that do not make one table.
    """
    finished = [run.checked_again() for run in finished]
    runs = [_measured(run) for run in finished]
    rows, first = comparison_rows(runs), runs[0].results
    check_one_test_set(finished, first.split)
    machine = dict(first.machine)
    if differing := differing_machines(runs):
        log.warning("the runs were not measured on one machine (%s): do not compare times", ", ".join(differing))
        machine["machines"] = f"several, which differ in {', '.join(differing)}: do not compare times"
    (home / MANIFEST).unlink(missing_ok=True)
    write_config(home, config)
    one_teacher = len({run.teacher for run in runs}) == 1
    memorised = Memorised.parse(first.memorised) if first.memorised and one_teacher else None
    write_results(home, title, {first.split: rows}, first.gallery, machine, memorised=memorised)
    seeds = len({run.variant.seed for run in finished})
    of_seeds = f"means of {seeds} seeds" if seeds > 1 else "one seed"
    log.info("results on %s, %s:\n%s", first.split, of_seeds, format_table(rows))
    report = write_report(home)
    of_runs = Identity({run.variant.folder: run.manifest.identity.key for run in finished})
    files = ("config.yaml", RESULTS, report.name)
    Manifest.of(home, files, kind=_KIND, format=_FORMAT, identity=of_runs).write(home)
    return report


def _measured(run: Finished) -> Measured:
    path = run.folder / RESULTS
    if RESULTS not in run.manifest.files:
        raise UserError(f"{run.variant.words}: it left no {path}; name a split in run.test_splits or run.valid_splits")
    return Measured(run.variant.title, Results.read(path), path, run.teacher)
