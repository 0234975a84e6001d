"""Seeds: the same draws as torch's own seeding, and nothing that piles up."""

import random

import numpy as np
import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import (
    LARGEST_SEED,
    check_rng_state,
    rng_state,
    seed_everything,
    seed_fault,
    seed_for,
    seed_host,
)


def draws() -> tuple[float, float, torch.Tensor]:
    return random.random(), float(np.random.rand()), torch.rand(3)


def test_both_ways_draw_what_torchs_own_seed_draws():
    torch.manual_seed(7)
    expected = torch.rand(3)
    seen = []
    for seed in (seed_everything, seed_host):
        seed(7)
        seen.append(draws())
    assert seen[0][:2] == seen[1][:2]
    assert torch.equal(seen[0][2], expected) and torch.equal(seen[1][2], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with an accelerator the calls are made at once")
def test_seeding_without_an_accelerator_leaves_no_calls_behind():
    before = len(torch.cuda._queued_calls)
    for step in range(100):
        seed_everything(seed_for("step", step))
        seed_host(seed_for("sample", step))
    assert len(torch.cuda._queued_calls) == before


def test_the_check_of_a_state_draws_nothing():
    seed_host(3)
    state = rng_state()
    check_rng_state(state)
    found = draws()
    seed_host(3)
    assert all(
        torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(found, draws(), strict=True)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"python": None},
        {"python": (3, (1, 2), None)},
        {"python": (3, (2**32,) * 624 + (1,), None)},
        {"python": (3, (1,) * 624 + (999,), None)},
        {"python": (3, (1,) * 625, "x")},
        {"numpy": ("MT19937", torch.zeros(624, dtype=torch.int64), 625, 0, 0.0)},
        {"numpy": ("MT19937", torch.zeros(623, dtype=torch.int64), 1, 0, 0.0)},
        {"numpy": ("MT19937", torch.full((624,), -1), 1, 0, 0.0)},
        {"numpy": ("PCG64", torch.zeros(624, dtype=torch.int64), 1, 0, 0.0)},
        {"numpy": ("MT19937", torch.zeros(624, dtype=torch.int64), 1, 0, float("nan"))},
        {"torch": torch.zeros(10, dtype=torch.uint8)},
        {"torch": torch.get_rng_state().float()},
        {"torch": [1, 2]},
        {"cuda": None},
        {"cuda": [1]},
    ],
)
def test_no_state_of_the_generators(change):
    with pytest.raises(ValueError, match="is no state of"):
        check_rng_state({**rng_state(), **change})


@pytest.mark.parametrize("seed", [-1, 2**64, "seven", 1.5, None])
def test_what_is_no_seed_is_one_line(seed):
    with pytest.raises(UserError, match=r"run\.seed: .* is no seed; give a whole number from 0 to 4,294,967,295"):
        seed_everything(seed)


@pytest.mark.parametrize("seed", [0, LARGEST_SEED])
def test_the_bounds_of_a_seed_are_numpys_and_torchs(seed):
    assert seed_fault(seed, "run.seed") is None
    np.random.seed(seed)
    torch.manual_seed(seed)
    assert "is no seed" in seed_fault(LARGEST_SEED + 1, "run.seed")
    with pytest.raises(ValueError):
        np.random.seed(LARGEST_SEED + 1)
