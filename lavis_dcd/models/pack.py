"""Packs a trained model into the half-precision file that ships as the quickstart's teacher.

python -m lavis_dcd.models.pack output/quickstart_teacher/<job>/model.pth lavis_dcd/assets/quickstart
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save

from lavis_dcd.common.files import atomic_write, load_tensors


def pack(source: Path, folder: Path) -> None:
    """``source`` as ``folder/teacher.safetensors`` with its configuration, and its run's log beside it."""
    content = load_tensors(source)
    tensors = {k: t.half() if t.is_floating_point() else t for k, t in content["model"].items()}
    metadata = {"arch": content["arch"], "config": json.dumps(content["config"])}
    with atomic_write(folder / "teacher.safetensors") as handle:
        handle.write(save({k: t.contiguous() for k, t in tensors.items()}, metadata))
    with atomic_write(folder / "teacher_log.jsonl") as handle:
        handle.write((source.parent / "metrics.jsonl").read_bytes())


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
