"""The common part of all commands: flags, checks, logging, and one line per fault instead of a traceback."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

from lavis_dcd.common.errors import UserError
from lavis_dcd.training.interrupt import Terminated, terminations_raised

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143  # as a shell names the end by SIGTERM: 128 + 15


def job_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of `--cfg-path`, `--options` and `--plugins`, to which a command may add flags."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument(
        "--cfg-path",
        required=True,
        metavar="F",
        help="the job's YAML file: in the current folder, else one that ships with the package, such as "
        "projects/dcd/quickstart.yaml",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="K=V",
        help="settings over those of the file, as in run.max_epoch=3; a key that nothing reads is an error "
        "(in sections of LAVIS's own classes a warning)",
    )
    parser.add_argument(
        "--plugins",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="modules to import, which register further models, tasks, builders, processors or runners",
    )
    return parser


def run_command(program: str, description: str, argv: Sequence[str] | None, evaluate: bool) -> int:
    """Run a job and return the exit status: 0, 2 for what the user can put right, 130 or 143 when stopped.

    130 is for Ctrl-C, 143 for SIGTERM.
    """
    args = job_parser(program, description).parse_args(argv)
    return guarded(lambda: _run(args, evaluate))


def guarded(work: Callable[[], None]) -> int:
    """Call `work`; its user errors, and a disk that takes nothing, become lines on stderr, without a traceback."""
    try:
        with terminations_raised():
            work()
    except UserError as error:
        for line in error.faults:
            sys.stderr.write(f"error: {line}\n")
        return EXIT_USER_ERROR
    except OSError as error:
        way_out = _way_out(error)
        if way_out is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror}; {way_out}\n")
        return EXIT_USER_ERROR
    except Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _way_out(error: OSError) -> str | None:
    """Return the user's way out where a disk takes nothing; None for other faults of the system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space; what was written before stays, and run.resume=auto continues a training"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return "permit it or name another place; outputs go to run.output_dir"
    return None


def _run(args: argparse.Namespace, evaluate: bool) -> None:
    from lavis_dcd.job import run_job

    ready_process()
    run_job(args.cfg_path, args.options, args.plugins, evaluate)


def ready_process() -> None:
    """Set up logging and environment; every command calls it first."""
    set_up_logging()
    # loader workers are forked after the tokenizer has run; it would warn at each of them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # LAVIS's own readers of checkpoints leave it to torch's default that no code in a file runs
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None):
        logging.warning("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored: code in a checkpoint could run")


def set_up_logging() -> None:
    """Send the messages of the first process to stderr; of the others, warnings only."""
    first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.INFO if first else logging.WARNING)
