"""The optimizer, its learning rates, and one step of it: micro-batches, precision, clipping, and the step's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import seed_everything, seed_for
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.learner import as_learner
from lavis_dcd.training.contracts import TrainTask
from lavis_dcd.training.devices import autocast, to_device
from lavis_dcd.training.health import Health, LiveBuffers, blame
from lavis_dcd.training.logs import scalars_of
from lavis_dcd.training.strategy import Strategy

_LAVIS_NAMES = {"linear_warmup_cosine_lr": "cosine", "constant_lr": "constant"}


def parameter_groups(
    model: nn.Module, lr: float, head_multiplier: float, weight_decay: float, heads: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return AdamW's groups: (base | head) x (decay | no decay), empty ones left out.

    Args:
        model: only parameters with `requires_grad` are taken.
        lr: the base rate; heads learn at `lr * head_multiplier`.
        weight_decay: for matrices and higher; biases and norms (one dimension or none) have 0.
        heads: names, as in `model.named_parameters()`, of the parameters of the head groups.

    Raises:
        UserError: nothing is trainable.
    """
    heads = set(heads)
    groups: dict[str, dict[str, Any]] = {}
    for side, rate in (("base", lr), ("head", lr * head_multiplier)):
        for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            name = f"{side}/{kind}"
            groups[name] = {"name": name, "params": [], "lr": rate, "weight_decay": decay}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            side = "head" if name in heads else "base"
            kind = "decay" if parameter.ndim > 1 else "no_decay"
            groups[f"{side}/{kind}"]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise UserError("model: no parameter is trainable, so there is nothing to train (run.evaluate=true evaluates)")
    return filled


def make_optimizer(model: nn.Module, run: RunConfig) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`; the heads are those of the model's `head_parameter_names()`."""
    heads = as_learner(model).head_parameter_names()
    groups = parameter_groups(model, run.init_lr, run.head_lr_multiplier, run.weight_decay, heads)
    return torch.optim.AdamW(groups, lr=run.init_lr, betas=(run.betas[0], run.betas[1]), eps=run.eps)


def rate_factor(
    total: int, warmup: int, floor: float = 0.0, shape: str = "linear_warmup_linear"
) -> Callable[[int], float]:
    """Return the factor on every group's rate at optimizer step 0, 1, ..., total - 1.

    It rises linearly over `warmup` steps, is 1 at step `warmup`, and then falls towards `floor`, which it
    would reach at step `total`, the first that is not taken: no step is spent at a rate of 0.

    Args:
        floor: the smallest factor after the warm-up (min_lr / init_lr).
        shape: "linear_warmup_linear", "cosine" (warm-up, then half a cosine) or "constant" (warm-up, then 1).
    """
    shape = _LAVIS_NAMES.get(shape, shape)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(0.0, (total - step) / max(1, total - warmup))
        if shape == "constant":
            return 1.0
        if shape == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
        return floor + (1 - floor) * left

    return factor


def make_scheduler(optimizer: torch.optim.Optimizer, run: RunConfig, total: int) -> LambdaLR:
    """Return a per-step schedule over `total` optimizer steps in which every group keeps its ratio to the others."""
    warmup = run.warmup_steps if run.warmup_steps is not None else round(run.warmup * total)
    return LambdaLR(optimizer, rate_factor(total, min(warmup, total), run.min_lr / run.init_lr, run.lr_sched))


class Progress(TypedDict, total=False):
    """The job's position, which every sample of a step carries: LAVIS's own three, and the share that is done."""

    epoch: int
    iters: int
    num_iters_per_epoch: int
    progress: float


class Stepper:
    """The optimizer, its schedule and its scaler, and a step that uses them.

    Args:
        task: its `train_step` gives the loss.
        strategy: how the processes train the model, which is wrapped.
        total_steps: of the whole job, for the schedule.

    Raises:
        UserError: nothing is trainable.
    """

    def __init__(self, task: TrainTask, strategy: Strategy, run: RunConfig, total_steps: int) -> None:
        self._task, self._strategy, self._run = task, strategy, run
        self._process = strategy.process
        self.optimizer = make_optimizer(strategy.bare_model, run)
        self.scheduler = make_scheduler(self.optimizer, run, total_steps)
        self.scaler = torch.amp.GradScaler(self._process.device.type, enabled=run.amp == "fp16")
        self.health = Health(self._process)
        self._buffers = LiveBuffers(strategy.bare_model)

    @property
    def lr(self) -> float:
        """The learning rate of the first group, at which the next step will be taken."""
        return self.optimizer.param_groups[0]["lr"]

    def step(
        self, batches: Iterator[Mapping[str, Any]], size: int, number: int, progress: Progress
    ) -> dict[str, torch.Tensor]:
        """Take `size` micro-batches and one optimizer step whose gradient is their mean.

        Where the loss or the gradient is NaN or infinite in any process, all skip the step: weights, optimizer,
        schedule and the model's buffers stay as they were, and `health` counts it.

        Every generator is seeded from (seed, step, micro-batch, process) before each forward pass, so what
        dropout draws does not depend on what ran before.

        Args:
            number: the optimizer step, counted over the whole job.
            progress: more entries of the samples.

        Returns:
            The mean over the micro-batches of every scalar in the model's output; "grad_norm" when clipping.
            Nothing where the step is skipped.
        """
        reports, image_ids = [], []
        self._strategy.before_step(self._buffers.live().values())
        self._buffers.remember()
        for micro in range(size):
            samples = to_device(next(batches), self._process.device)
            samples.update(progress)
            samples["draw_seed"] = seed_for(self._run.seed, "draws", number, micro)
            image_ids.append(samples.get("image_id"))
            seed_everything(seed_for(self._run.seed, "step", number, micro, self._process.rank))
            with self._strategy.gradient_exchange(last=micro == size - 1):
                reports.append(self._backward(samples, size))
        means = self._means(reports)
        norm = self._gradient_norm()
        # one flag crosses from the device, and between the processes, in each step
        if self._process.any(not bool(torch.isfinite(means["loss"] + norm))):
            scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
            self.health.skip(number, blame(reports, image_ids, self.optimizer), scale)
            self._drop()
            return {}
        self.health.took(number)
        return means | self._update(norm)

    def _backward(self, samples: dict[str, Any], size: int) -> dict[str, torch.Tensor]:
        with autocast(self._run, self._process.device):
            output = self._task.train_step(self._strategy.model, samples)
        if isinstance(output, torch.Tensor):
            output = {"loss": output}
        self.scaler.scale(output["loss"] / size).backward()
        return scalars_of(output)

    def _means(self, reports: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        device, names = self._process.device, {name: None for report in reports for name in report}
        return {
            name: torch.stack([report[name].to(device) for report in reports if name in report]).mean()
            for name in names
        }

    def _gradient_norm(self) -> torch.Tensor:
        parameters = self._parameters()
        self._strategy.complete_gradients(parameters)
        self.scaler.unscale_(self.optimizer)
        return self._strategy.gradient_norm(parameters)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _update(self, norm: torch.Tensor) -> dict[str, torch.Tensor]:
        report = {}
        if self._run.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters(), self._run.grad_clip, norm)
            report["grad_norm"] = norm.double()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return report

    def _drop(self) -> None:
        self.scaler.update()  # lowers the scale where that is what overflowed
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint's "optimizer", "scheduler", "scaler" and "health". Every process must call it.

        Of a sharded model the main process alone has the optimizer's tensors.
        """
        return {
            "optimizer": self._strategy.whole(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._strategy.load_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.health.load_state_dict(state["health"])
