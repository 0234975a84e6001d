"""`python -m lavis_dcd COMMAND`: the commands that LAVIS has no entry point for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lavis_dcd.common.streams import kept_streams

# name: the module whose main(argv) runs it, and what it does
COMMANDS = {
    "mine": ("lavis_dcd.mine", "let the teacher of a distillation job score candidates once, into a score bank"),
}
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; without one, list them."""
    args = list(sys.argv[1:] if argv is None else argv)
    name, *rest = args or [""]
    with kept_streams():
        if name in ("-h", "--help"):
            sys.stdout.write(usage())
            return 0
        if name not in COMMANDS:
            sys.stderr.write(f"error: {name!r} is no command\n{usage()}" if args else usage())
            return EXIT_USAGE
    status: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return status


def usage() -> str:
    """Return the commands, a line each."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {words}" for name, (_, words) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m lavis_dcd COMMAND ... (python -m lavis_dcd COMMAND --help tells more)", "", *lines,
         "", "training and evaluation have commands of their own: python -m lavis.train, python -m lavis.evaluate", ""]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
