"""The common part of all commands: flags, checks, logging, and one line per fault instead of a traceback."""

from __future__ import annotations

import argparse
import atexit
import getpass
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from lavis_dcd.common.faults import user_lines
from lavis_dcd.common.streams import KeptStream, kept_streams
from lavis_dcd.training.interrupt import Terminated, terminations_raised

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


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
    """Run a job and return the exit status: 0, 2 for what the user can put right, 129, 130 or 143 when stopped.

    130 is for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP (the terminal or the connection was closed).
    """
    args = job_parser(program, description).parse_args(argv)
    return guarded(lambda: _run(args, evaluate))


def guarded(work: Callable[[], None]) -> int:
    """Call `work` and return the exit status; what the user can put right becomes a line each on stderr.

    That is every `UserError`, what the system refuses (a full disk, a lost one, no memory), and a plug-in that calls
    `sys.exit`. Where there is a run folder, its log.txt has the traceback. Any other exception is a bug, and passes.
    """
    with kept_streams():
        try:
            with terminations_raised():
                work()
        except Terminated as stop:
            return stop.status
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except BaseException as error:
            lines = user_lines(error)
            if lines is None:
                sys.excepthook = _hiding_excepthook
                raise
            for line in lines:
                sys.stderr.write(f"error: {line}\n")
            return EXIT_USER_ERROR
    return 0


def _hiding_excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, without the values that came from the environment."""
    if sys.stderr is not None:
        KeptStream(sys.stderr).write("".join(traceback.format_exception(kind, error, trace)))


def _run(args: argparse.Namespace, evaluate: bool) -> None:
    ready_process()
    from lavis_dcd.job import run_job

    run_job(args.cfg_path, args.options, args.plugins, evaluate)


def ready_process() -> None:
    """Set up logging and environment; every command calls it first, before it imports LAVIS."""
    set_up_logging()
    _make_up_for_a_user()
    # loader workers are forked after the tokenizer has run; it would warn at each of them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # LAVIS's own readers of checkpoints leave it to torch's default that no code in a file runs
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None):
        logging.warning("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored: code in a checkpoint could run")


def _make_up_for_a_user() -> None:
    """Let imports pass in a container that runs under a number without a name or a home folder.

    torch's import fails for the name; transformers makes a folder called `~` for the home.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        cache = os.environ.get("LAVIS_CACHE")
        if cache is None:
            cache = tempfile.mkdtemp(prefix="lavis-dcd-")
            atexit.register(shutil.rmtree, cache, ignore_errors=True)
        for name in ("HF_HOME", "TORCH_HOME"):
            os.environ.setdefault(name, str(Path(cache) / name.lower()))


def set_up_logging() -> None:
    """Send the messages of the first process to stderr; of the others, warnings only."""
    first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.INFO if first else logging.WARNING)
