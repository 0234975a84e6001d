"""The optimizer's parameter groups and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lavis_dcd.common.errors import UserError
from lavis_dcd.runners.config import RunConfig

_LAVIS_NAMES = {"linear_warmup_cosine_lr": "cosine", "constant_lr": "constant"}


def parameter_groups(
    model: nn.Module, lr: float, head_multiplier: float, weight_decay: float, heads: Collection[str] = ()
) -> list[dict]:
    """AdamW's groups: (base | head) x (decay | no decay), empty ones left out.

    Args:
        model: only parameters with `requires_grad` are taken.
        lr: the base rate; heads learn at `lr * head_multiplier`.
        weight_decay: for matrices and higher; biases and norms (one dimension or none) have 0.
        heads: names, as in `model.named_parameters()`, of the parameters of the head groups.

    Raises:
        UserError: nothing is trainable.
    """
    heads = set(heads)
    groups: dict[str, dict] = {}
    for part, rate in (("base", lr), ("head", lr * head_multiplier)):
        for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            name = f"{part}/{kind}"
            groups[name] = {"name": name, "params": [], "lr": rate, "weight_decay": decay}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "head" if name in heads else "base"
            kind = "decay" if parameter.ndim > 1 else "no_decay"
            groups[f"{part}/{kind}"]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise UserError(
            "model: no parameter is trainable, so there is nothing to train (run.evaluate=true evaluates)"
        )
    return filled


def make_optimizer(model: nn.Module, run: RunConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the heads are `model.head_parameter_names()` where the model has it."""
    names = getattr(model, "head_parameter_names", set)
    groups = parameter_groups(model, run.init_lr, run.head_lr_multiplier, run.weight_decay, names())
    return torch.optim.AdamW(groups, lr=run.init_lr, betas=tuple(run.betas), eps=run.eps)


def rate_factor(
    total: int, warmup: int, floor: float = 0.0, shape: str = "linear_warmup_linear"
) -> Callable[[int], float]:
    """The factor on every group's rate at optimizer step 0, 1, ..., total - 1.

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
    """A per-step schedule over `total` optimizer steps in which every group keeps its ratio to the others."""
    warmup = run.warmup_steps if run.warmup_steps is not None else round(run.warmup * total)
    return LambdaLR(optimizer, rate_factor(total, min(warmup, total), run.min_lr / run.init_lr, run.lr_sched))
