"""Seeds: the same draws as torch's own seeding, and nothing that piles up."""

import random

import numpy as np
import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import LARGEST_SEED, seed_everything, seed_fault, seed_for, seed_host


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
