"""The form of the optimizer's state in a job, by which the one in a checkpoint is checked before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lavis_dcd.common.texts import shown
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.saved_state import as_integer, as_mapping, as_number, as_tensor, is_finite, same
from lavis_dcd.training.step import make_optimizer, make_scheduler

_SCHEDULER = ("base_lrs", "last_epoch", "_step_count", "_last_lr")
_SCALER = ("scale", "growth_factor", "backoff_factor")


@dataclass(frozen=True)
class OptimizerForm:
    """The form that the optimizer's, the schedule's and the scaler's states have in a job.

    Args:
        optimizer: a state before the first step.
        parameters: what learns, by its number in that state.
        scheduler: a state before the first step.
        scales: a gradient scaler is in use.
    """

    optimizer: Mapping[str, Any]
    parameters: Sequence[nn.Parameter]
    scheduler: Mapping[str, Any]
    scales: bool

    @classmethod
    def of(cls, run: RunConfig, model: nn.Module) -> OptimizerForm:
        """Return the form for a job that trains `model`.

        Raises:
            UserError: nothing is trainable.
        """
        optimizer = make_optimizer(model, run)
        scheduler = make_scheduler(optimizer, run, 1)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return cls(optimizer.state_dict(), parameters, scheduler.state_dict(), run.amp == "fp16")

    def check(self, content: Mapping[str, Any]) -> None:
        """Check the states of a checkpoint's content, which `check_content` has taken."""
        as_mapping(content["optimizer"], "optimizer", ("state", "param_groups"))
        self._check_groups(content["optimizer"]["param_groups"])
        self._check_entries(as_mapping(content["optimizer"]["state"], "optimizer.state"))
        self._check_scheduler(content["scheduler"], content["position"]["global_step"])
        if self.scales:
            self._check_scaler(content["scaler"])

    def _check_groups(self, groups: Any) -> None:
        wanted = self.optimizer["param_groups"]
        if not isinstance(groups, list) or len(groups) != len(wanted):
            raise ValueError(f"optimizer.param_groups: {shown(groups)} are not {len(wanted)} groups")
        for number, (group, own) in enumerate(zip(groups, wanted, strict=True)):
            name = f"optimizer.param_groups.{number}"
            as_mapping(group, name, own)
            # the checkpoint's own rate is that of its step; all else is the configuration's, which is the same
            as_number(group["lr"], f"{name}.lr", 0, max(own["initial_lr"], own["lr"]) * (1 + 1e-9))
            for key, value in own.items():
                if key != "lr" and not same(group[key], value):
                    raise ValueError(f"{name}.{key}: {shown(group[key])}, the job has {shown(value)}")

    def _check_entries(self, state: Mapping[Any, Any]) -> None:
        for number, entry in state.items():
            if type(number) is not int or not 0 <= number < len(self.parameters):
                raise ValueError(f"optimizer.state: {shown(number)} is the number of no parameter")
            name, parameter = f"optimizer.state.{number}", self.parameters[number]
            if not as_mapping(entry, name):
                continue
            as_mapping(entry, name, ("step", "exp_avg", "exp_avg_sq"))
            for key, shape in (("step", torch.Size()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
                dtype = torch.float32 if key == "step" else parameter.dtype
                tensor = as_tensor(entry[key], f"{name}.{key}", shape, dtype)
                if not is_finite(tensor) or (key != "exp_avg" and bool((tensor < 0).any())):
                    raise ValueError(f"{name}.{key} has values that no optimizer leaves")

    def _check_scheduler(self, state: Mapping[str, Any], now: int) -> None:
        if lacking := [key for key in _SCHEDULER if key not in state]:
            raise ValueError(f"scheduler lacks {', '.join(lacking)}")
        if foreign := [key for key in state if key not in self.scheduler]:
            raise ValueError(f"scheduler.{shown(foreign[0])} is none of its values")
        rates = self.scheduler["base_lrs"]
        as_integer(state["last_epoch"], "scheduler.last_epoch", 0, now)
        as_integer(state["_step_count"], "scheduler._step_count", state["last_epoch"] + 1, state["last_epoch"] + 1)
        last = state["_last_lr"]
        if not isinstance(last, list) or len(last) != len(rates):
            raise ValueError(f"scheduler._last_lr: {shown(last)} are not {len(rates)} rates")
        for rate, most in zip(last, rates, strict=True):
            as_number(rate, "scheduler._last_lr", 0, most * (1 + 1e-9))
        for key, value in self.scheduler.items():
            if key in state and key not in _SCHEDULER[1:] and not same(state[key], value):
                raise ValueError(f"scheduler.{key}: {shown(state[key])}, the job has {shown(value)}")

    def _check_scaler(self, state: Mapping[str, Any]) -> None:
        as_mapping(state, "scaler", (*_SCALER, "growth_interval", "_growth_tracker"))
        for key in _SCALER:
            as_number(state[key], f"scaler.{key}", 1e-30, 1e30)
        as_integer(state["growth_interval"], "scaler.growth_interval", 1)
        as_integer(state["_growth_tracker"], "scaler._growth_tracker", 0)
