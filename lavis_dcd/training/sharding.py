"""`run.strategy: fsdp`: torch's `fully_shard` on what learns, and whole tensors in and out of it.

The root holds what its units do not, and stays gathered from the forward pass to the end of the backward pass: its
parts may be run by any method of the model, any number of times. A unit is gathered for its own `forward` and its part
of the backward pass alone, so it must run nowhere else, and equally often in every process.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

logger = logging.getLogger(__name__)


def shard(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Spread what learns over the processes, in place. Every process must call it, with the same weights.

    Frozen parameters stay whole, for teachers outside the module tree may share them; so do 0-dim ones (a logit
    scale), which `fully_shard` does not take: see `kept_whole`.

    Args:
        model: its `sharding_units()`, where it has that method, names the units; else there is the root alone.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    kept = {p for p in model.parameters() if not (p.requires_grad and p.dim())}
    units = learning_units(model)
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    # Backward, a unit fetches the one before it, the first and the root none. By default torch follows the last forward
    # passes, of which an evaluation may have run more in one process than in another: their collectives would not meet.
    model.set_modules_to_backward_prefetch([model])
    for earlier, unit in zip([*units[:1], *units], units, strict=False):
        unit.set_modules_to_backward_prefetch([earlier])
    _settle(model)
    total = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
    logger.info("fsdp: %s parameters over %d processes, %d units and the root", f"{total:,}", world_size, len(units))


def learning_units(model: nn.Module) -> list[nn.Module]:
    """The units that `model.sharding_units()` names, without those in which nothing learns.

    Nor does one count that has a parameter in common with something else: both would hold it.
    """
    everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = []
    for unit in getattr(model, "sharding_units", list)():
        inside = Counter(id(p) for _, p in unit.named_parameters(remove_duplicate=False))
        alone = all(everywhere[key] == count for key, count in inside.items())
        if alone and any(p.requires_grad and p.dim() for p in unit.parameters()):
            found.append(unit)
    return found


def _settle(model: nn.Module) -> None:
    """Make `model` the root. Torch takes whatever runs first for it, which a unit would be in an evaluation."""
    register_fsdp_forward_method(model, "extra_repr")  # a method that does nothing
    model.extra_repr()
    del model.extra_repr
    model.reshard()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """With every parameter whole in every process, for evaluations: any method may be called, or none, in any process.

    All must enter and leave. `state_dict()` ends it, as torch has it. A model that is not sharded stays as it is.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        if part is not model:
            part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    if parts:
        # gathered anew into the same memory, which would look like the weights of last time
        increment_version([p for p in model.parameters() if p.requires_grad])
    try:
        yield
    finally:
        for part in parts:
            if part is not model:
                part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called with this very model."""
    return isinstance(model, FSDPModule)


def kept_whole(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are not sharded; of what learns in a sharded model, torch averages all gradients but theirs."""
    return [p for p in parameters if not isinstance(p, DTensor)]


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor: the tensor itself where it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def whole(value: Any, keep: bool = True) -> Any:
    """`value` with a whole tensor, on the CPU, for every sharded one in its dicts, lists and tuples.

    Every process must call it. One tensor at a time is gathered.

    Args:
        keep: without it None stands for those, which then take no memory.
    """
    if isinstance(value, DTensor):
        found = value.full_tensor()
        return found.cpu() if keep else None
    if isinstance(value, dict):
        return type(value)((key, whole(item, keep)) for key, item in value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(whole(item, keep) for item in value)
    return value


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state, the same in every process, into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state, the same in every process, into the optimizer of a model that may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {key: _like(value, parameters[index]) for key, value in of_parameter.items()}
        for index, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _like(value: Any, model: Tensor | None) -> Any:
    """This process's part of `value`, where `model` is sharded and of its shape."""
    if not isinstance(model, DTensor) or not isinstance(value, Tensor) or value.shape != model.shape:
        return value
    # every process has the whole of it: nothing needs sending, but a part that is a view would keep it all in memory
    part = distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
    return part.clone()
