"""What `run.strategy: fsdp` saves: memory of one process among several that train a METER with learning towers.

Weights and inputs are random, pictures small and batches of two, so that nearly all memory is that of parameters,
gradients and the optimizer. `held` is what a process has of these between two steps; `peak` is the most that it had
resident in a step, less what it had before the model was built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import PeakMemory, parsed, parser, progress, report, resident_memory

STRATEGIES = {"ddp": "ddp", "root": "fsdp, the root alone", "fsdp": "fsdp, a unit for each tower's layer"}
SIZES = {"tiny": (32, 1, 2), "mid": (512, 8, 8)}  # width, layers of a tower, heads
SIDE, WORDS, STEPS = 64, 8000, 3
COLUMNS = {
    "row": "strategy|s", "parameters": "parameters, M|.1f", "held_mb": "held MB|,.0f", "peak_mb": "peak MB|,.0f",
    "seconds": "s/step|.2f",
}  # fmt: skip


def section(size: str, folder: Path) -> dict[str, Any]:
    """The ``model:`` section; ``folder`` gets a vocabulary."""
    width, layers, heads = SIZES[size]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(WORDS - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = {"vocab_size": WORDS, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * width, "max_position_embeddings": 32}  # fmt: skip
    return {
        "arch": "meter_retrieval", "load_finetuned": False,
        "vision": {"backbone": "clip_vit", "image_size": SIDE, "patch_size": 32, "width": width, "layers": layers,
                   "heads": heads},
        "text": {"family": "bert", "name": str(folder / "vocab.txt"), "max_length": 16, "config": text},
        "fusion": {"width": width, "layers": 6, "heads": heads},
    }  # fmt: skip


def work(strategy: str, size: str, folder: Path) -> None:
    """One process's part, under torchrun; each writes its figures."""
    import torch

    from lavis_dcd.common.processes import leave_group
    from lavis_dcd.config.run_section import RunConfig
    from lavis_dcd.models.building import build_matcher
    from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask
    from lavis_dcd.training.devices import this_process
    from lavis_dcd.training.step import Stepper
    from lavis_dcd.training.strategy import local, make_strategy

    run = RunConfig(device="cpu", warmup=0)
    place = this_process(run)
    before = resident_memory()
    torch.manual_seed(0)
    model = build_matcher(section(size, folder), "model").train()
    if strategy == "root":
        model.sharding_units = list
    trained = make_strategy("ddp" if strategy == "ddp" else "fsdp", model, place)
    trained.wrap()
    stepper = Stepper(DcdRetrievalTask(run), trained, run, STEPS)
    texts = [f"word{i + 2 * place.rank} word7 word9" for i in range(2)]
    batch = {"image": torch.randn(2, 3, SIDE, SIDE), "text_input": texts, "image_id": torch.arange(2) + 2 * place.rank}
    stepper.step(iter([batch]), 1, 0, {})  # makes the optimizer's state
    begin = time.perf_counter()
    with PeakMemory() as memory:
        for number in range(1, STEPS):
            stepper.step(iter([batch]), 1, number, {})
    held = [local(p) for p in model.parameters()]
    held += [local(t) for state in stepper.optimizer.state.values() for t in state.values()]
    found = {
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "held_mb": sum(t.nbytes for t in held) / 1e6,
        "peak_mb": (memory.start + memory.extra - before) / 1e6,
        "seconds": (time.perf_counter() - begin) / (STEPS - 1),
    }
    (folder / f"{place.rank}.json").write_text(json.dumps(found))
    leave_group()


def measure(strategy: str, size: str, processes: int) -> dict[str, Any]:
    """The row of a strategy: of all processes the largest figures."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*torchrun, str(Path(__file__)), "--work", strategy, "--size", size, "--folder", folder]
        # freed memory goes back to the system at once: what glibc would keep of it hides the differences
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the measuring processes failed:\n{done.stderr}")
        found = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    return {"row": STRATEGIES[strategy], **{key: max(one[key] for one in found) for key in found[0]}}


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    of = parser(__doc__)
    of.add_argument("--processes", type=int, default=2, metavar="N", help="processes that train (default: 2)")
    of.add_argument("--size", choices=SIZES, default="mid", help="of the model (default: mid, 107 M parameters)")
    of.add_argument("--work", choices=STRATEGIES, help="be one of the processes")
    of.add_argument("--folder", type=Path, help="for --work: where its figures go")
    options = parsed(of, argv)
    if options.work:
        work(options.work, options.size, options.folder)
        return 0
    if options.processes < 2:
        of.error(f"--processes: {options.processes}, at least 2 are needed")
    rows = []
    for strategy in STRATEGIES:
        rows.append(measure(strategy, options.size, options.processes))
        progress(f"{strategy}: {rows[-1]['peak_mb']:,.0f} MB")
    report("sharding", {"processes": options.processes, "size": options.size}, rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
