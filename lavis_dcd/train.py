"""The door of training: `python -m lavis.train --cfg-path F`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lavis_dcd.cli import run_door


def main(argv: Sequence[str] | None = None) -> int:
    """Train what a job describes, and evaluate it. Returns the exit status."""
    return run_door("lavis.train", "Train (and evaluate) what a YAML job describes.", argv, evaluate=False)


if __name__ == "__main__":
    sys.exit(main())
