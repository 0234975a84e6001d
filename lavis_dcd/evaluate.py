"""The command `python -m lavis.evaluate --cfg-path F`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lavis_dcd.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate the model that a job describes, without training. Returns the exit status."""
    return run_command("lavis.evaluate", "Evaluate what a YAML job describes.", argv, evaluate=True)


if __name__ == "__main__":
    sys.exit(main())
