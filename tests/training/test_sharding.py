"""Sharding in a group of one process: the same tensors of torch's, none of them cut."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.devices import Process, wrap_for_training
from lavis_dcd.training.health import gradient_norm
from lavis_dcd.training.sharding import (
    is_sharded,
    kept_whole,
    learning_units,
    load_model,
    load_optimizer,
    shard,
    unsharded,
    whole,
)

CPU = torch.device("cpu")


class Model(nn.Module):
    """Three layers of a stack, one of them frozen, a frozen table and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers[1].requires_grad_(False)
        self.table = nn.Parameter(torch.randn(5, 4), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def sharding_units(self) -> list[nn.Module]:
        return list(self.layers)

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = layer(rows).tanh()
        return self.scale * rows

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.embed(rows + self.table[0]).square().mean()


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def pair(group) -> tuple[Model, Model]:
    """A plain model and its sharded twin."""
    torch.manual_seed(0)
    plain, sharded = Model(), Model()
    sharded.load_state_dict(plain.state_dict())
    shard(sharded, CPU, 1)
    return plain, sharded


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> torch.Tensor:
    model(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).backward()
    norm = gradient_norm([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    optimizer.zero_grad()
    return norm


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def test_units_are_those_in_which_something_learns_and_nothing_is_shared():
    model = Model()
    assert learning_units(model) == [model.layers[0], model.layers[2]]
    model.elsewhere = model.layers[2].weight
    assert learning_units(model) == [model.layers[0]]
    model.again = model.layers[0]
    assert learning_units(model) == []
    assert learning_units(nn.Linear(2, 2)) == []


def test_what_learns_is_sharded_but_for_scalars(pair):
    names = {name for name, p in pair[1].named_parameters() if isinstance(p, DTensor)}
    assert names == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    learning = [p for p in pair[1].parameters() if p.requires_grad]
    assert [p.shape for p in kept_whole(learning)] == [torch.Size([])]
    assert [is_sharded(model) for model in pair] == [False, True]


def test_steps_norms_and_states_are_those_of_the_plain_model(pair):
    optimizers = [adamw(model) for model in pair]
    for seed in range(3):
        expected, found = (step(model, optimizer, seed) for model, optimizer in zip(pair, optimizers, strict=True))
        torch.testing.assert_close(found, expected)
    expected, found = (whole(model.state_dict()) for model in pair)
    assert list(found) == list(expected) and not any(isinstance(value, DTensor) for value in found.values())
    torch.testing.assert_close(found, expected)
    states = [whole(optimizer.state_dict()) for optimizer in optimizers]
    torch.testing.assert_close(states[1]["state"], states[0]["state"])
    assert states[1]["param_groups"] == states[0]["param_groups"]
    left = whole(pair[1].state_dict(), keep=False)
    assert left["layers.0.weight"] is None and left["table"] is not None


def test_states_of_either_kind_load_into_the_other(pair):
    plain, sharded = pair
    trained = Model()
    optimizer = adamw(trained)
    step(trained, optimizer, 0)
    others = [adamw(model) for model in pair]
    load_model(sharded, trained.state_dict())
    load_optimizer(others[1], copy.deepcopy(optimizer.state_dict()))
    load_model(plain, whole(sharded.state_dict()))
    load_optimizer(others[0], copy.deepcopy(whole(others[1].state_dict())))
    for model, own in ((trained, optimizer), (plain, others[0]), (sharded, others[1])):
        step(model, own, 1)
    for model in pair:
        torch.testing.assert_close(whole(model.state_dict()), trained.state_dict())


def test_unsharded_any_method_runs_before_the_first_step_and_after_it(pair):
    plain, sharded = pair
    rows = torch.randn(2, 4)
    optimizers = [adamw(model) for model in pair]
    seen = []
    for seed in range(2):
        with unsharded(sharded), torch.no_grad():
            assert not any(isinstance(p, DTensor) for p in sharded.parameters())
            torch.testing.assert_close(sharded.embed(rows), plain.embed(rows))
            torch.testing.assert_close(sharded.layers[2](rows), plain.layers[2](rows))
            seen.append([(p.data_ptr(), p._version) for p in sharded.parameters() if p.requires_grad])
        assert any(isinstance(p, DTensor) for p in sharded.parameters())
        for model, optimizer in zip(pair, optimizers, strict=True):
            step(model, optimizer, seed)
    assert all(one != other for one, other in zip(*seen, strict=True))  # no two sessions' weights look the same
    with unsharded(plain):
        pass


def test_one_process_keeps_the_plain_model(caplog):
    model = Model()
    with caplog.at_level(logging.INFO, "lavis_dcd"):
        assert wrap_for_training(model, Process(CPU), "fsdp") is model
    assert [record.getMessage() for record in caplog.records] == [
        "run.strategy: fsdp has nothing to share out with one process; the model stays whole"
    ]
    assert not any(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("make", [lambda keys: RunConfig(**keys), lambda keys: parse(RunConfig, keys, "run")])
def test_an_unknown_strategy_is_told(make):
    with pytest.raises(UserError) as caught:
        make({"strategy": "zero"})
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith("run.strategy: 'zero' ")
    assert make({}).strategy == "ddp"
