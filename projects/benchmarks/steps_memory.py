"""Whether a long training job grows: resident memory along thousands of quickstart steps, which should stay level.

The quickstart's job as it ships, with its teacher, losses, logs and checkpoints, on small batches of few scenes, so
that ten thousand steps take minutes. Memory is read at log lines, after freed memory is given back to the system. What
comes before the first of the lines (imports, the bank of features, the optimizer's state) is not counted.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from typing import Any

from measuring import in_child, parsed, parser, progress, report, resident_memory

from lavis_dcd.common.errors import UserError

LIMIT_MB = 20
COLUMNS = {"step": "step|,d", "resident_mb": "resident MB|,.1f", "growth_mb": "growth MB|+.1f"}


class MemoryAtLogLines(logging.Handler):
    """Reads the memory whenever the trainer logs a window of steps."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.rows: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("epoch %.2f step"):
            step, resident = record.args[1], resident_memory() / 1e6
            first = self.rows[0]["resident_mb"] if self.rows else resident
            self.rows.append({"step": step, "resident_mb": resident, "growth_mb": resident - first})
            progress(f"step {step:,}: {resident:,.1f} MB")


def measure(steps: int, every: int, batch_size: int, scenes: int, workers: int) -> list[dict[str, Any]]:
    """A row per `every` steps; to be called in a process of its own."""
    from lavis_dcd.job import run_job

    handler, trainer_log = MemoryAtLogLines(), logging.getLogger("lavis_dcd.training.logs")
    trainer_log.addHandler(handler)
    trainer_log.setLevel(logging.INFO)
    scene_options = {"train": scenes, "val": 12, "test": 12}
    run_options = {
        "device": "cpu", "max_epoch": steps, "max_steps": steps, "batch_size_train": batch_size,
        "num_workers": workers, "log_freq": every, "save_every": max(1, steps // 5), "valid_splits": [],
        "evaluate_before": False, "evaluate_teacher": False, "report": False,
    }  # fmt: skip
    options = [f"datasets.shape_scenes.build_info.scenes.{key}={value}" for key, value in scene_options.items()]
    options += [f"run.{key}={value}" for key, value in run_options.items()]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        run_job("projects/dcd/quickstart.yaml", options, (), evaluate=False)
    return handler.rows


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    of = parser(__doc__)
    of.add_argument("--steps", type=int, default=10_000, metavar="N", help="optimizer steps (default: 10,000)")
    of.add_argument("--every", type=int, default=500, metavar="N", help="steps between two readings (default: 500)")
    of.add_argument("--batch-size", type=int, default=4, metavar="N", help="captions in a step (default: 4)")
    of.add_argument("--scenes", type=int, default=300, metavar="N", help="training pictures (default: 300)")
    of.add_argument("--workers", type=int, default=0, metavar="N", help="loader workers (default: 0)")
    options = parsed(of, argv)
    if options.steps < 2 * options.every:
        of.error(f"--steps: {options.steps} gives no two readings at --every {options.every}")
    settings = {
        "steps": options.steps, "batch size": options.batch_size, "scenes": options.scenes, "workers": options.workers
    }  # fmt: skip
    try:
        rows = in_child(measure, options.steps, options.every, options.batch_size, options.scenes, options.workers)
    except UserError as error:
        of.error(str(error))
    report("steps_memory", settings, rows, COLUMNS, options.json)
    grown = rows[-1]["growth_mb"]
    progress(f"grown by {grown:.1f} MB, limit {LIMIT_MB} MB")
    return int(grown > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
