"""The logs of a running job: log.txt, metrics.jsonl, TensorBoard scalars, and a bar on a terminal."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.progress import progress_bar
from lavis_dcd.common.secrets import hidden
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.reporting.charts import DATA_WAIT, SKIPPED
from lavis_dcd.reporting.metrics_lines import FILE, read_lines
from lavis_dcd.training.devices import Process
from lavis_dcd.training.health import ScoreWatch
from lavis_dcd.training.writing import writing_into

log = logging.getLogger(__name__)

T = TypeVar("T")

WEIGHTS_OF_STEP = "weights_of_step"  # of an evaluation's line: the optimizer steps that the weights had taken


class ScalarMeans:
    """The means of the steps' scalars since the last log line.

    Values stay on their device until `means`, so adding them does not wait for the GPU.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, scalars: Mapping[str, torch.Tensor]) -> None:
        """Add one step's scalars (0-dim tensors)."""
        for name, value in scalars.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, torch.Tensor]:
        """Return the mean of each scalar over the steps that had it."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def finite_means(self, process: Process, step: int, folder: Path) -> dict[str, float]:
        """Return the means over all processes, "loss" first; what is no finite number is left out.

        A batch in which no query has a negative has no score of a hardest negative, so its mean is none.

        Args:
            step, folder: the optimizer step and the run folder, for the error's words.

        Raises:
            UserError: the loss is not finite.
        """
        in_order = dict(sorted(self.means().items(), key=lambda item: (item[0] != "loss", item[0])))
        if not in_order:
            return {}
        values = torch.stack([value.to(process.device) for value in in_order.values()])
        means = dict(zip(in_order, process.mean(values).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"run: the loss is {means['loss']} by step {step}; try a lower run.init_lr, run.grad_clip, or "
                f"run.amp=off (run folder: {folder})"
            )
        return {name: value for name, value in means.items() if math.isfinite(value)}

    @property
    def steps(self) -> int:
        """Return the number of steps added."""
        return max(self._counts.values(), default=0)

    def clear(self) -> None:
        """Start anew."""
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the sums, for a checkpoint."""
        return {
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]], device: torch.device) -> None:
        """Continue the sums of a checkpoint."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])


class DataClock:
    """The share of this process's training time that goes by waiting for batches.

    It is no part of a checkpoint: after a resume it starts at nothing, and no result depends on it.
    """

    def __init__(self) -> None:
        self._waited = self._whole = 0.0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield `batches`, and note the time until each of them."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - begin
            yield batch

    @contextmanager
    def step(self) -> Iterator[None]:
        """Note the time inside: a step, its batches included."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._whole += time.perf_counter() - begin

    def share(self) -> float:
        """Return the share of the steps since the last call that was waiting, 0 to 1, to four digits."""
        share = self._waited / self._whole if self._whole else 0.0
        self._waited = self._whole = 0.0
        return round(min(share, 1.0), 4)


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/` of a run folder.

    Lines of another form than ours (torn by a kill, foreign) are left out when a job is resumed; one line in the log
    says how many.

    Args:
        folder: the run folder.
        resume_step: drop what an interrupted run wrote beyond this step. Evaluations at the step itself are
            dropped too: the resumed job writes them again. None starts an empty log.
        active: False (the processes other than the main one) writes nothing.
        without: splits whose evaluations are dropped, because they are of other data.

    Raises:
        UserError: a file cannot be read or written.
    """

    def __init__(
        self, folder: Path, resume_step: int | None = None, active: bool = True, without: Collection[str] = ()
    ) -> None:
        self._file = folder / FILE if active else None
        self._board = None
        self._kept: set[tuple[Any, ...]] = set()
        if self._file is None:
            return
        with writing_into(folder):
            remaining: list[dict[str, Any]] = []
            if resume_step is not None:
                lines, left_out = read_lines(self._file)
                remaining = [line for line in lines if _stays(line, resume_step, without)]
                if left_out:
                    log.warning("%s: %d lines that no job of ours wrote whole are left out", self._file, left_out)
            with atomic_write(self._file, "w") as handle:
                handle.writelines(json.dumps(line) + "\n" for line in remaining)
            self._kept = {_evaluation(line) for line in remaining if line["kind"] == "eval"}
            self._board = _board(folder / "tensorboard", resume_step)

    def write(self, kind: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Append a line {"kind", "step", "epoch", **values}; its numbers also become TensorBoard scalars.

        An evaluation that the log has kept from before a resume is not repeated.

        Raises:
            UserError: the file cannot be written.
        """
        line = {"kind": kind, "step": step, "epoch": round(epoch, 6), **values}
        if self._file is None or (kind == "eval" and _evaluation(line) in self._kept):
            return
        with writing_into(self._file.parent):
            with self._file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            self._write_scalars(kind, step, values)

    def _write_scalars(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        prefix = "/".join(["train"] if kind == "train" else [str(values["split"]), str(values["model"])])
        for name, value in values.items():
            if _is_number(value) and name != WEIGHTS_OF_STEP:
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Flush and close the files; curves that the disk does not take cost a warning."""
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                log.warning("tensorboard: not all scalars could be written (%s)", error.strerror or error)


def _stays(line: Mapping[str, Any], step: int, without: Collection[str]) -> bool:
    if line["kind"] == "eval" and line["split"] in without:
        return False
    return line["step"] < step or (line["kind"] == "train" and line["step"] == step)


def _evaluation(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["step"], line["split"], line["model"], line.get(WEIGHTS_OF_STEP)


def _board(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an optional dependency, slow to import
    except ImportError:
        log.warning("tensorboard is not installed: no TensorBoard scalars (pip install tensorboard)")
        return None
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)


@contextmanager
def log_file(path: Path, active: bool = True) -> Iterator[None]:
    """Also write the log to `path` while inside; the other handlers stay as they are.

    An exception that leaves the block is written there with its traceback, also by the processes of which the log is
    not kept (`active` False): theirs may be the cause.
    """
    if not active:
        try:
            yield
        except (Exception, SystemExit) as error:
            with suppress(OSError), RunLog(path) as handler:
                handler.write_traceback(error)
            raise
        return
    root, package = logging.getLogger(), logging.getLogger("lavis_dcd")
    level = package.level
    with RunLog(path) as handler:
        root.addHandler(handler)
        if not package.isEnabledFor(logging.INFO):
            package.setLevel(logging.INFO)
        try:
            yield
        except (Exception, SystemExit) as error:
            handler.write_traceback(error)
            raise
        finally:
            root.removeHandler(handler)
            package.setLevel(level)


class RunLog(logging.FileHandler):
    """The log of a run folder: values from the environment are hidden, and a full disk is told of once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_HidingFormatter("%(asctime)s %(levelname)s %(message)s"))
        self._failed = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.close()

    def write_traceback(self, error: BaseException) -> None:
        """Write an error that ends the job, for whoever looks into it; the terminal has its one line."""
        rank = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        trace = (type(error), error, error.__traceback__)
        self.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, f"the job has failed{rank}", (), trace))

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            sys.stderr.write(f"{self.baseFilename}: {sys.exc_info()[1]}; lines of the log are lost\n")


class _HidingFormatter(logging.Formatter):
    @override
    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def progress(total: int, done: int, label: str, active: bool = True) -> AbstractContextManager[tqdm]:
    """Show a bar of a training's steps on a terminal; log lines print above it."""
    return progress_bar(total, "step", done, label, active)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def scalars_of(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the scalars of a model's output: numbers and one-element tensors, detached, as 0-dim tensors."""
    scalars = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            scalars[name] = value.detach().reshape(()).double()
        elif _is_number(value):
            scalars[name] = torch.tensor(float(value), dtype=torch.float64)
    return scalars


class StepLog:
    """Writes a line for every `run.log_freq` steps, and warns of scores that tell of trouble.

    Args:
        folder: the run folder, for messages.
        total_steps: of the whole job, whose last step also ends in a line.
    """

    def __init__(
        self,
        run: RunConfig,
        process: Process,
        folder: Path,
        metrics: MetricsLog,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self._run, self._process, self._folder, self._metrics = run, process, folder, metrics
        self._steps_per_epoch, self._total = steps_per_epoch, total_steps
        self._watch = ScoreWatch()
        self.means, self.clock = ScalarMeans(), DataClock()

    def add(self, report: Mapping[str, torch.Tensor], step: int, lr: float, skipped: int) -> None:
        """Count a step; every process must call it.

        Args:
            report: the step's scalars; none where it was skipped.
            step: where the job stands now.
            lr: at which the step was taken.
            skipped: steps of the job that were.
        """
        self.means.add(report)
        self._watch.note(report)
        if step % self._run.log_freq == 0 or step == self._total:
            self._write(step, lr, skipped)

    def _write(self, step: int, lr: float, skipped: int) -> None:
        means = self.finite_means(step)
        self._watch.see(means, self.means.steps)
        self.means.clear()
        epoch, waited = step / self._steps_per_epoch, self.clock.share()
        self._metrics.write("train", step, epoch, {"lr": lr, **means, DATA_WAIT: waited, SKIPPED: skipped})
        told = {**means, DATA_WAIT: waited, **({SKIPPED: skipped} if skipped else {})}
        shown = " ".join(f"{name} {value:.4g}" for name, value in told.items())
        log.info("epoch %.2f step %d/%d lr %.3g %s", epoch, step, self._total, lr, shown)

    def finite_means(self, step: int) -> dict[str, float]:
        """Return the means since the last line over all processes, which all must call.

        Raises:
            UserError: the loss is not finite.
        """
        return self.means.finite_means(self._process, step, self._folder)
