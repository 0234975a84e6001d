"""Four steps in each of two processes; the second process's batches 1 and 2 are broken. Writes what happened."""

import importlib.util
import json
import sys
from pathlib import Path

import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import leave_group
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.devices import this_process
from lavis_dcd.training.step import Stepper
from lavis_dcd.training.strategy import make_strategy


def main() -> None:
    torch.set_num_threads(1)
    path = Path(__file__).with_name("stub_job.py")
    spec = importlib.util.spec_from_file_location("runner_stub_job", path)
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    run = RunConfig(init_lr=0.05, device="cpu")
    process = this_process(run)
    model = stubs.Learner()
    strategy = make_strategy("ddp", model, process)
    strategy.wrap()
    stepper = Stepper(stubs.Task(), strategy, run, total_steps=10)
    taken, error = [], ""
    for number in range(4):
        ids = torch.arange(4) + 100 * process.rank + 10 * number
        image = torch.randn(4, stubs.WIDTH, generator=torch.Generator().manual_seed(int(ids[0])))
        if process.rank == 1 and number in (1, 2):
            image[0, 0] = float("nan")
        batch = {"image": image, "target": torch.zeros(4), "image_id": ids}
        taken.append(bool(stepper.step(iter([batch]), 1, number, {})))
        try:
            stepper.health.check(2, number + 1, Path(sys.argv[1]), None)
        except UserError as stopped:
            error = str(stopped)
    weights = {name: value.tolist() for name, value in model.named_parameters()}
    found = {"taken": taken, "skipped": stepper.health.skipped, "error": error, "weights": weights}
    (Path(sys.argv[1]) / f"{process.rank}.json").write_text(json.dumps(found))
    leave_group()


if __name__ == "__main__":
    main()
