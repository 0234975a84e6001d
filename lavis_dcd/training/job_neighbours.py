"""The neighbours of a job's training pictures: found once, kept in its run folder, the same after a resume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import rng_state, set_rng_state
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.neighbours import NeighbourTable
from lavis_dcd.training.checkpoint import Checkpoint
from lavis_dcd.training.devices import Process
from lavis_dcd.training.neighbourhoods import Neighbourhoods
from lavis_dcd.training.resume_checks import neighbours_line
from lavis_dcd.training.training_state import from_main
from lavis_dcd.training.writing import writing_into

log = logging.getLogger(__name__)

FILE = "neighbours.safetensors"
# with these in run.resume_force, a resumed job has other neighbours
_CHANGES = {"teacher", "data"}


def job_neighbourhoods(
    run: RunConfig, folder: Path, process: Process, continued: Checkpoint | None, find: Callable[[], NeighbourTable]
) -> Neighbourhoods | None:
    """Return the neighbourhoods that ``run.batches`` makes batches of, None where it makes none. All processes call.

    A job that goes on takes the table that its run folder keeps: found anew, perhaps on another machine, near ties may
    stand in another order, and so would its batches.

    Args:
        folder: the run folder.
        continued: the checkpoint that training goes on from.
        find: finds the neighbours; the main process calls.

    Raises:
        UserError: the neighbours cannot be found or kept, or are others than those of the checkpoint.
    """
    batches = run.neighbourhoods
    if batches is None:
        return None
    table = from_main(process, lambda: _table(run, folder / FILE, continued, find))
    return Neighbourhoods(table, batches.size, batches.share)


def _table(
    run: RunConfig, path: Path, continued: Checkpoint | None, find: Callable[[], NeighbourTable]
) -> NeighbourTable:
    before = None if continued is None else continued.content.get("neighbours")
    changed = bool(_CHANGES & set(run.resume_force))
    if before is not None and not changed and (kept := _kept(path, before)) is not None:
        return kept
    state = rng_state()
    try:
        table = find()
    finally:
        set_rng_state(state)
    line = None if continued is None else neighbours_line(before, table.digest())
    if line is not None and not changed:
        raise UserError(
            f"run.resume: {line}: {path} is gone or damaged, and was made anew otherwise than before; put it back, or "
            "continue with run.resume_force=[data]"
        )
    if line is not None:
        log.warning("run.resume: %s (run.resume_force)", line)
    with writing_into(path.parent):
        table.save(path)
    return table


def _kept(path: Path, digest: str) -> NeighbourTable | None:
    """Return the table in a file; None where there is none, or another one."""
    if not path.exists():
        return None
    try:
        table = NeighbourTable.load(path)
    except ValueError as error:
        log.warning("%s: the neighbours are found anew (%s)", path, error)
        return None
    return table if table.digest() == digest else None
