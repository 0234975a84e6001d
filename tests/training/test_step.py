import math

import pytest
import torch
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.step import make_optimizer, make_scheduler, parameter_groups, rate_factor


def test_groups_split_by_head_and_by_decay(stubs):
    model = stubs.Learner()
    heads = model.head_parameter_names()
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, 5.0, 0.01, heads)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert held == {
        "base/decay": {"encoder.weight"},
        "base/no_decay": {"encoder.bias", "norm.weight", "norm.bias"},
        "head/decay": {"head.weight"},
        "head/no_decay": {"head.bias"},
    }
    assert [group["lr"] for group in groups.values()] == [1e-3, 1e-3, 5e-3, 5e-3]
    assert [group["weight_decay"] for group in groups.values()] == [0.01, 0, 0.01, 0]


def test_a_model_without_heads_has_base_groups_only():
    optimizer = make_optimizer(nn.Linear(2, 2), RunConfig())
    assert [group["name"] for group in optimizer.param_groups] == ["base/decay", "base/no_decay"]
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-8


def test_nothing_trainable_is_an_error():
    with pytest.raises(UserError, match="trainable"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3, 5.0, 0.01)


def test_linear_schedule():
    factor = rate_factor(total=10, warmup=4)
    expected = [0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert [factor(step) for step in range(11)] == pytest.approx(expected)


def test_floor_cosine_and_constant():
    assert rate_factor(10, 0, floor=0.1)(5) == pytest.approx(0.55)
    assert rate_factor(10, 0, floor=0.1)(50) == pytest.approx(0.1)
    cosine = rate_factor(8, 0, shape="cosine")
    assert [cosine(step) for step in range(8)] == pytest.approx(
        [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8)]
    )
    assert rate_factor(8, 0, shape="linear_warmup_cosine_lr")(3) == cosine(3)
    constant = rate_factor(8, 1, shape="constant")
    assert [constant(step) for step in (0, 1, 7)] == [0.5, 1, 1]


def test_every_group_keeps_its_ratio(stubs):
    run = RunConfig(init_lr=1e-3, min_lr=1e-4, warmup=0.2)
    optimizer = make_optimizer(stubs.Learner(), run)
    scheduler = make_scheduler(optimizer, run, total=20)
    seen = []
    for _ in range(20):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([rates[0], rates[0], 5 * rates[0], 5 * rates[0]])
        seen.append(rates[0])
        optimizer.step()
        scheduler.step()
    assert seen.index(max(seen)) == 4 and max(seen) == pytest.approx(1e-3)
    assert seen[-1] == pytest.approx(1e-4 + 9e-4 / 16)


def test_warmup_steps_win_over_the_fraction(stubs):
    run = RunConfig(init_lr=1.0, warmup=0.5, warmup_steps=1)
    optimizer = make_optimizer(stubs.Learner(), run)
    make_scheduler(optimizer, run, total=10)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(optimizer, torch.optim.AdamW)
