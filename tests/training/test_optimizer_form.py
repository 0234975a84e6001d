from dataclasses import replace

import pytest
import torch

from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.optimizer_form import OptimizerForm
from lavis_dcd.training.step import make_optimizer, make_scheduler


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)

    def head_parameter_names(self):
        return {"head.weight", "head.bias"}


RUN = RunConfig(init_lr=0.1, min_lr=0.01, warmup_steps=2)
SCALER = {"scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}


def states(steps, run=RUN):
    """The states of an optimizer and its schedule after so many steps, as a checkpoint has them."""
    torch.manual_seed(0)
    model = Model()
    optimizer = make_optimizer(model, run)
    scheduler = make_scheduler(optimizer, run, 5)
    for _ in range(steps):
        model.head(model.base(torch.ones(4, 2))).sum().backward()
        optimizer.step()
        scheduler.step()
    content = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": {}}
    return {**content, "position": {"global_step": steps}}


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("lr_sched", ["linear_warmup_linear", "cosine", "constant"])
def test_what_an_optimizer_leaves_is_of_its_form(steps, lr_sched):
    run = replace(RUN, lr_sched=lr_sched)
    OptimizerForm.of(run, Model()).check(states(steps, run))


def test_skipped_steps_leave_the_schedule_behind():
    OptimizerForm.of(RUN, Model()).check({**states(3), "position": {"global_step": 9}})
    with pytest.raises(ValueError, match=r"scheduler\.last_epoch: 3 is no whole number from 0 to 2"):
        OptimizerForm.of(RUN, Model()).check({**states(3), "position": {"global_step": 2}})


def test_a_parameter_without_a_gradient_has_no_entry():
    content = states(2)
    del content["optimizer"]["state"][3]
    content["optimizer"]["state"][2] = {}
    OptimizerForm.of(RUN, Model()).check(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", 0.0), ("scale", float("nan")), ("scale", "1"), ("growth_interval", 0), ("_growth_tracker", -1),
     ("growth_factor", None)],
)  # fmt: skip
def test_a_gradient_scaler_s_values(key, value):
    form = OptimizerForm.of(RunConfig(init_lr=0.1, min_lr=0.01, warmup_steps=2, amp="fp16", device="cuda"), Model())
    form.check({**states(1), "scaler": SCALER})
    with pytest.raises(ValueError, match=rf"scaler\.{key}"):
        form.check({**states(1), "scaler": {**SCALER, key: value}})
    with pytest.raises(ValueError, match="scaler lacks"):
        form.check({**states(1), "scaler": {}})
