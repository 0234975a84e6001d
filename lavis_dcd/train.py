"""The command `python -m lavis.train --cfg-path F`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lavis_dcd.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate the model that a job describes. Returns the exit status."""
    return run_command("lavis.train", "Train (and evaluate) what a YAML job describes.", argv, evaluate=False)


if __name__ == "__main__":
    sys.exit(main())
