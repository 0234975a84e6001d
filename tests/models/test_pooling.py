"""Poolings against loops over tokens."""

import math
import typing

import pytest
import torch
from torch import nn

from lavis_dcd.models.pooling import POOLINGS, PoolingName, drop_tokens

HEADS = 3


def tokens_and_mask(rows: int = 4, length: int = 5, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(rows, length, width, generator=generator)
    return tokens, torch.arange(length) < torch.tensor([5, 3, 1, 4])[:rows, None]


def slowly(pooling: nn.Module, kind: str, row: torch.Tensor) -> list[float]:
    """Pooled ``row [n, D]`` of real tokens alone, a channel at a time."""
    columns = list(zip(*row.tolist(), strict=True))
    mean = [sum(column) / len(column) for column in columns]
    if kind == "cls":
        return row[0].tolist()
    if kind == "mean":
        return mean
    if kind == "mean_max":
        return mean + [max(column) for column in columns]
    learned = pooling if kind == "attention" else pooling.attention
    first, _, second = learned.score
    heads = []
    for head in range(HEADS):
        scores = [
            float(second.weight[head] @ torch.tanh(first.weight @ token + first.bias) + second.bias[head])
            for token in row
        ]
        total = sum(math.exp(score) for score in scores)
        heads += [
            sum(math.exp(score) / total * value for score, value in zip(scores, column, strict=True))
            for column in columns
        ]
    return heads if kind == "attention" else mean + heads


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(POOLINGS))
@pytest.mark.parametrize("masked", [True, False])
def test_pooling_equals_a_loop_over_real_tokens(kind, masked):
    torch.manual_seed(0)
    pooling = POOLINGS[kind](6, HEADS)
    tokens, mask = tokens_and_mask()
    pooled = pooling(tokens, mask if masked else None)
    rows = [row[kept] if masked else row for row, kept in zip(tokens, mask, strict=True)]
    expected = torch.tensor([slowly(pooling, kind, row) for row in rows])
    assert pooled.shape == (4, pooling.out_width)
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=1e-5)


def test_the_configuration_names_exactly_the_poolings_there_are():
    assert set(typing.get_args(PoolingName)) == set(POOLINGS)


def test_dropped_tokens_are_real_ones_and_one_stays():
    torch.manual_seed(4)
    _, mask = tokens_and_mask()
    draws = torch.stack([drop_tokens(mask, 0.4) for _ in range(3000)])
    assert not draws[:, ~mask].any()
    assert draws.any(dim=2).all()
    # of 5 tokens each stays with probability 0.6, or 0.4^5 of the time all do
    assert float(draws[:, 0].float().mean()) == pytest.approx(0.6 + 0.4**5, abs=0.02)
