"""Runs a small job in a process of its own and lets a fault happen at a chosen moment of it.

The processes are forked from one that has imported everything, so that a run takes seconds. A fault is a kind at the
n-th time that a site of the program is reached; it happens inside the real code, which knows nothing of it.
"""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB = {
    "cfg_path": "projects/dcd/quickstart.yaml",
    "steps": 8,
    "save_every": 2,
    "options": [
        "run.job_id=job", "run.max_steps=8", "run.save_every=2", "run.batch_size_train=10", "run.batch_size_eval=20",
        "run.log_freq=2", "run.k_test=4", "run.num_threads=1", "run.cache_features=disk", "run.batch_by=null",
        "datasets.shape_scenes.build_info.scenes.train=24", "datasets.shape_scenes.build_info.scenes.val=8",
        "datasets.shape_scenes.build_info.scenes.test=8",
    ],
}  # fmt: skip
MINING = ["model.candidates.bank.shortlist=4", "model.candidates.bank.random=2", "model.candidates.bank.keep=6",
          "model.selection.hard_negatives=4"]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """``kind`` at the ``number``-th time (from 1) that ``site`` is reached."""

    site: str
    number: int
    kind: str

    def __str__(self) -> str:
        return f"{self.site}-{self.number}-{self.kind}"


def happen(kind: str) -> None:
    """The fault itself, in this process."""
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
    if kind in signals:
        os.kill(os.getpid(), signals[kind])
    elif kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif kind == "read-only":
        raise OSError(errno.EROFS, "Read-only file system")
    else:
        raise RuntimeError("injected")


def sites() -> dict[str, tuple[Any, str, bool]]:
    """By name: the object and attribute of the function, and whether the fault comes in the middle of its writing.

    "sample" is reached in the loader's worker, which is where the fault then happens.
    """
    from lavis_dcd.banks import shards
    from lavis_dcd.banks.score_bank import ScoreBank
    from lavis_dcd.mining.work_folder import WorkFolder
    from lavis_dcd.training import best_checkpoint as evaluations
    from lavis_dcd.training import checkpoint, trainer
    from lavis_dcd.training.sampler import SeededDataset
    from lavis_dcd.training.step import Stepper

    return {
        "step": (Stepper, "step", False),
        "checkpoint": (checkpoint, "save", True),
        "features": (shards, "_save", True),
        "evaluation": (evaluations.Evaluations, "_measure", False),
        "report": (trainer, "write_report", True),
        "sample": (SeededDataset, "__getitem__", False),
        "mining": (WorkFolder, "keep", True),
        "bank": (ScoreBank, "save", True),
    }


def install(fault: Fault) -> None:
    """The fault waits for its moment; in the middle of writing means at the n-th flush of a file to the disk."""
    owner, name, writing = sites()[fault.site]
    real, reached = getattr(owner, name), 0

    @functools.wraps(real)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached != fault.number:
            return real(*args, **kwargs)
        if writing:
            with _during_the_next_write(fault.kind):
                return real(*args, **kwargs)
        happen(fault.kind)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


class _during_the_next_write:  # noqa: N801  reads as the words of a sentence
    """Inside, the first renaming of what was written to its final name meets the fault instead."""

    def __init__(self, kind: str) -> None:
        self.kind, self._real = kind, {name: getattr(os, name) for name in ("replace", "rename")}

    def __enter__(self) -> None:
        for name, real in self._real.items():
            setattr(os, name, functools.partial(self._meet, real))

    def _meet(self, real: Callable[..., None], *args: Any, **more: Any) -> None:
        self.__exit__()
        happen(self.kind)
        real(*args, **more)  # a signal that the program answers lets it go on

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)


def _body(folder: str, command: str, options: list[str], fault: Fault | None) -> None:
    """In the forked process: the door's own main, and its status as the process's."""
    os.chdir(folder)
    os.environ["LAVIS_CACHE"] = str(Path(folder) / "cache")
    with open("err.txt", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    multiprocessing.set_start_method("fork", force=True)  # a loader's workers meet the fault, too
    if fault is not None:
        install(fault)
    from lavis_dcd import mine, train

    door = mine if command == "mine" else train
    status = door.main(["--cfg-path", JOB["cfg_path"], "--options", *JOB["options"], *options])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(folder: Path, command: str = "train", options: list[str] = (), fault: Fault | None = None) -> int:
    """The exit status of a job in ``folder``, negative for the signal that ended it; its log goes to ``err.txt``.

    Raises:
        TimeoutError: after five minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _context().Process(target=_body, args=(str(folder), command, list(options), fault))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{fault} hangs:\n{(folder / 'err.txt').read_text()[-2000:]}")
    return process.exitcode


@functools.cache
def _context() -> Any:
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lavis", "lavis_dcd.job", "lavis_dcd.train", "lavis_dcd.mine",
                                    "lavis_dcd.tasks.dcd_retrieval", "lavis_dcd.runners.runner_dcd"])  # fmt: skip
    return context


Run = Callable[..., int]
