"""Pack a trained model into the half-precision file that ships as the quickstart's teacher.

python tools/pack_teacher.py output/quickstart_teacher/<job>/model.pth lavis_dcd/assets/quickstart docs/quickstart
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save

from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.tensor_files import load_tensors


def pack(source: Path, folder: Path, logs: Path) -> None:
    """Write `source` as `folder/teacher.safetensors` with its configuration, and its run's log into `logs`."""
    content = load_tensors(source)
    tensors = {k: t.half() if t.is_floating_point() else t for k, t in content["model"].items()}
    metadata = {"arch": content["arch"], "config": json.dumps(content["config"])}
    with atomic_write(folder / "teacher.safetensors") as handle:
        handle.write(save({k: t.contiguous() for k, t in tensors.items()}, metadata))
    with atomic_write(logs / "teacher_log.jsonl") as handle:
        handle.write((source.parent / "metrics.jsonl").read_bytes())


if __name__ == "__main__":
    pack(*map(Path, sys.argv[1:4]))
