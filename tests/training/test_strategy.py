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
from lavis_dcd.training.devices import Process
from lavis_dcd.training.strategy import DataParallel, FullyShard, Strategy, kept_whole, learning_units, make_strategy

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
def pair(group) -> tuple[Strategy, Strategy]:
    """The strategies of a plain model and of its sharded twin."""
    torch.manual_seed(0)
    plain, sharded = Model(), Model()
    sharded.load_state_dict(plain.state_dict())
    strategies = Strategy(plain, Process(CPU)), FullyShard(sharded, Process(CPU))
    for strategy in strategies:
        strategy.wrap()
    return strategies


def step(strategy: Strategy, optimizer: torch.optim.Optimizer, seed: int) -> torch.Tensor:
    model = strategy.model
    model(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).backward()
    norm = strategy.gradient_norm([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    optimizer.zero_grad()
    return norm


def adamw(strategy: Strategy) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in strategy.model.parameters() if p.requires_grad], lr=0.1)


def test_units_are_those_in_which_something_learns_and_nothing_is_shared():
    model = Model()
    assert learning_units(model) == [model.layers[0], model.layers[2]]
    model.elsewhere = model.layers[2].weight
    assert learning_units(model) == [model.layers[0]]
    model.again = model.layers[0]
    assert learning_units(model) == []
    assert learning_units(nn.Linear(2, 2)) == []


def test_what_learns_is_sharded_but_for_scalars(pair):
    names = {name for name, p in pair[1].bare_model.named_parameters() if isinstance(p, DTensor)}
    assert names == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    learning = [p for p in pair[1].bare_model.parameters() if p.requires_grad]
    assert [p.shape for p in kept_whole(learning)] == [torch.Size([])]


def test_steps_norms_and_states_are_those_of_the_plain_model(pair):
    optimizers = [adamw(strategy) for strategy in pair]
    for seed in range(3):
        expected, found = (
            step(strategy, optimizer, seed) for strategy, optimizer in zip(pair, optimizers, strict=True)
        )
        torch.testing.assert_close(found, expected)
    expected, found = (weights(strategy) for strategy in pair)
    assert list(found) == list(expected) and not any(isinstance(value, DTensor) for value in found.values())
    torch.testing.assert_close(found, expected)
    states = [strategy.whole(optimizer.state_dict()) for strategy, optimizer in zip(pair, optimizers, strict=True)]
    torch.testing.assert_close(states[1]["state"], states[0]["state"])
    assert states[1]["param_groups"] == states[0]["param_groups"]
    elsewhere = FullyShard(pair[1].bare_model, Process(CPU, rank=1))
    left = elsewhere.whole(pair[1].bare_model.state_dict())
    assert left["layers.0.weight"] is None and left["table"] is not None


def test_states_of_either_kind_load_into_the_other(pair):
    plain, sharded = pair
    trained = Strategy(Model(), Process(CPU))
    optimizer = adamw(trained)
    step(trained, optimizer, 0)
    others = [adamw(strategy) for strategy in pair]
    sharded.load_model(trained.bare_model.state_dict())
    sharded.load_optimizer(others[1], copy.deepcopy(optimizer.state_dict()))
    plain.load_model(weights(sharded))
    plain.load_optimizer(others[0], copy.deepcopy(sharded.whole(others[1].state_dict())))
    for strategy, own in ((trained, optimizer), (plain, others[0]), (sharded, others[1])):
        step(strategy, own, 1)
    for strategy in pair:
        torch.testing.assert_close(weights(strategy), trained.bare_model.state_dict())


def weights(strategy: Strategy) -> dict[str, torch.Tensor]:
    return strategy.whole(strategy.bare_model.state_dict())


def test_unsharded_any_method_runs_before_the_first_step_and_after_it(pair):
    plain, sharded = (strategy.bare_model for strategy in pair)
    rows = torch.randn(2, 4)
    optimizers = [adamw(strategy) for strategy in pair]
    seen = []
    for seed in range(2):
        with pair[1].unsharded(), torch.no_grad():
            assert not any(isinstance(p, DTensor) for p in sharded.parameters())
            torch.testing.assert_close(sharded.embed(rows), plain.embed(rows))
            torch.testing.assert_close(sharded.layers[2](rows), plain.layers[2](rows))
            seen.append([(p.data_ptr(), p._version) for p in sharded.parameters() if p.requires_grad])
        assert any(isinstance(p, DTensor) for p in sharded.parameters())
        for strategy, optimizer in zip(pair, optimizers, strict=True):
            step(strategy, optimizer, seed)
    assert all(one != other for one, other in zip(*seen, strict=True))  # no two sessions' weights look the same
    with pair[0].unsharded():
        pass


def test_the_strategy_follows_from_its_name_and_the_processes():
    two = Process(CPU, world_size=2)
    assert [type(make_strategy(name, Model(), two)) for name in ("ddp", "fsdp")] == [DataParallel, FullyShard]


def test_one_process_keeps_the_plain_model(caplog):
    strategy = make_strategy("fsdp", Model(), Process(CPU))
    with caplog.at_level(logging.INFO, "lavis_dcd"):
        strategy.wrap()
    assert type(strategy) is Strategy and strategy.model is strategy.bare_model
    assert [record.getMessage() for record in caplog.records] == [
        "run.strategy: fsdp has nothing to share out with one process; the model stays whole"
    ]
    assert not any(isinstance(p, DTensor) for p in strategy.model.parameters())


def test_an_unknown_strategy_is_told():
    with pytest.raises(UserError) as caught:
        parse(RunConfig, {"strategy": "zero"}, "run")
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith("run.strategy: 'zero' ")
    assert parse(RunConfig, {}, "run").strategy == "ddp"
