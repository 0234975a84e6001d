"""Seeds: the same draws as torch's own seeding, and nothing that piles up."""

import random

import numpy as np
import pytest
import torch

from lavis_dcd.common.seeding import seed_everything, seed_for, seed_host


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
