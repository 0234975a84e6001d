"""`run.strategy`: how several processes train one model; `plain` with one process, `ddp`, or `fsdp`.

Under `fsdp` (torch's `fully_shard`) the root holds what its units do not, and stays gathered from the forward pass to
the end of the backward pass: its parts may be run by any method of the model, any number of times. A unit is gathered
for its `forward` and its part of the backward pass alone, so it must run nowhere else, and equally often in every
process.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lavis_dcd.matching.learner import as_learner
from lavis_dcd.training.devices import Process, map_leaves

log = logging.getLogger(__name__)


class Strategy:
    """One process trains the model as it is.

    Args:
        model: the model itself.
        process: this process among those that train.
        name: `run.strategy`.
    """

    def __init__(self, model: nn.Module, process: Process, name: str = "ddp") -> None:
        self.bare_model, self.process, self.name = model, process, name
        self.model = model  # as it trains: what `wrap` makes of it

    def wrap(self) -> None:
        """Make the model ready to train. Every process must call it, with the same weights."""
        if self.name == "fsdp":
            log.info("run.strategy: fsdp has nothing to share out with one process; the model stays whole")

    def before_step(self, buffers: Iterable[Tensor]) -> None:
        """Give all processes the main one's buffers, where the wrapped model's forward pass does not do so."""

    def gradient_exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch; gradients cross the processes in the `last` of a step alone."""
        return nullcontext()

    def complete_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average over the processes the gradients that the backward pass has not."""

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the 2-norm of all gradients together, 0-dim; NaN or infinite where any of them is.

        A gradient whose norm overflows counts as infinite: its square would stay in the optimizer's state for good.
        Every process must call it.
        """
        return local_norm(parameters)

    def unsharded(self) -> AbstractContextManager[None]:
        """Return a context in which every parameter is whole; all processes must enter and leave."""
        return nullcontext()

    def whole(self, state: Any) -> Any:
        """Return `state` with whole tensors in its containers, in the main process. Every process must call it."""
        return state

    def load_model(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole state, the same in every process."""
        self.bare_model.load_state_dict(state)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a whole state of the model's optimizer, the same in every process."""
        optimizer.load_state_dict(state)


class DataParallel(Strategy):
    """Every process holds the whole model, inside DistributedDataParallel."""

    @override
    def wrap(self) -> None:
        device, unused = self.process.device, as_learner(self.bare_model).find_unused_parameters
        ids = [device.index] if device.type == "cuda" else None
        self.model = DistributedDataParallel(self.bare_model, device_ids=ids, find_unused_parameters=bool(unused))

    @override
    def gradient_exchange(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.model.no_sync()  # type: ignore[operator]  # nn.Module hides DDP's


class FullyShard(Strategy):
    """Every process holds a part of what learns, sharded in place.

    torch.distributed.checkpoint.state_dict does not fit the states of its optimizer: its functions take a step with an
    optimizer that has no state yet, so that AdamW would count one step more; they refuse to load where a parameter has
    never had a gradient; and they name the entries after the parameters, which is another format than `ddp`'s.
    """

    @override
    def wrap(self) -> None:
        shard(self.bare_model, self.process.device, self.process.world_size)

    @override
    def before_step(self, buffers: Iterable[Tensor]) -> None:
        self.process.share_tensors(buffers)

    @override
    def gradient_exchange(self, last: bool) -> AbstractContextManager[Any]:
        _fsdp(self.model).set_requires_gradient_sync(last)
        return nullcontext()

    @override
    def complete_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self.process.average_gradients(kept_whole(parameters))

    @override
    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        sharded = local_norm([p for p in parameters if isinstance(p, DTensor)])
        total = sharded.to(self.process.device).double().square()
        dist.all_reduce(total)
        return (total + local_norm(kept_whole(parameters)).double().square()).sqrt().float()

    @override
    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Any method of the model may be called inside, or none, in any process. `state_dict()` ends it."""
        root = self.bare_model
        parts = [module for module in root.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            if part is not root:
                part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        if parts:
            # gathered anew into the same memory, which would look like the weights of last time
            increment_version([p for p in root.parameters() if p.requires_grad])
        try:
            yield
        finally:
            for part in parts:
                if part is not root:
                    part.set_reshard_after_forward(True, recurse=False)
                part.reshard()

    @override
    def whole(self, state: Any) -> Any:
        """One tensor at a time is gathered; None stands for it in the processes other than the main one."""
        return map_leaves(state, self._gathered)

    @torch.no_grad()
    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        gathered = value.full_tensor()
        return gathered.cpu() if self.process.is_main else None

    @override
    def load_model(self, state: Mapping[str, Tensor]) -> None:
        now = self.bare_model.state_dict()
        self.bare_model.load_state_dict({name: _part_like(now.get(name), value) for name, value in state.items()})

    @override
    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        entries = {
            index: {key: _part_like(parameters[index], value) for key, value in of_parameter.items()}
            for index, of_parameter in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": entries})


def make_strategy(name: str, model: nn.Module, process: Process) -> Strategy:
    """Return the strategy that `run.strategy` names ("ddp" or "fsdp"), or the plain one for a single process."""
    kind = {"ddp": DataParallel, "fsdp": FullyShard}[name] if process.world_size > 1 else Strategy
    return kind(model, process, name)


def shard(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Spread what learns over the processes, in place. Every process must call it, with the same weights.

    Frozen parameters stay whole, for teachers outside the module tree may share them; so do 0-dim ones (a logit
    scale), which `fully_shard` does not take: see `kept_whole`.

    Args:
        model: its `sharding_units()` names the units; by default there is the root alone.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    ignored = {p for p in model.parameters() if not (p.requires_grad and p.dim())}
    units = learning_units(model)
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    # Backward, a unit fetches the one before it, the first and the root none. By default torch follows the last forward
    # passes, of which an evaluation may have run more in one process than in another: their collectives would not meet.
    _fsdp(model).set_modules_to_backward_prefetch([_fsdp(model)])
    for earlier, unit in zip([*units[:1], *units], units, strict=False):
        _fsdp(unit).set_modules_to_backward_prefetch([_fsdp(earlier)])
    _make_root(model)
    total = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
    log.info("fsdp: %s parameters over %d processes, %d units and the root", f"{total:,}", world_size, len(units))


def learning_units(model: nn.Module) -> list[nn.Module]:
    """Return the units that `model.sharding_units()` names, without those in which nothing learns.

    A unit that has a parameter in common with something else is left out as well: both would hold it.
    """
    everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    units = []
    for unit in as_learner(model).sharding_units():
        inside = Counter(id(p) for _, p in unit.named_parameters(remove_duplicate=False))
        alone = all(everywhere[key] == count for key, count in inside.items())
        if alone and any(p.requires_grad and p.dim() for p in unit.parameters()):
            units.append(unit)
    return units


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)  # `fully_shard` has changed its class
    return module


def _make_root(model: nn.Module) -> None:
    # torch takes whatever runs first for the root, which would be a unit in an evaluation; it has no public way to say
    # so but a registered method, and `extra_repr` does nothing
    register_fsdp_forward_method(model, "extra_repr")
    model.extra_repr()
    del model.extra_repr
    _fsdp(model).reshard()


def kept_whole(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that are not sharded; torch averages the gradients of all others in a sharded model."""
    return [p for p in parameters if not isinstance(p, DTensor)]


def local(value: Tensor) -> Tensor:
    """Return this process's part of a tensor: the tensor itself where it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def local_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the 2-norm of what this process holds of the gradients."""
    norm = nn.utils.get_total_norm([local(p.grad) for p in parameters if p.grad is not None])
    return norm.to(parameters[0].device) if len(parameters) else norm


def _part_like(model: Tensor | None, value: Any) -> Any:
    """Return this process's part of `value`, where `model` is sharded and of its shape."""
    if not isinstance(model, DTensor) or not isinstance(value, Tensor) or value.shape != model.shape:
        return value
    # every process has the whole of it: nothing needs sending, but a part that is a view would keep it all in memory
    part = distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
    return part.clone()
