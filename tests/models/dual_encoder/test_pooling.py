"""Poolings against loops over tokens; heads against the arithmetic their docstring states."""

import dataclasses
import math
import typing

import pytest
import torch
from torch import nn

from lavis_dcd.matching.features import TextFeatures
from lavis_dcd.models.dual_encoder.config import HeadConfig, Pooling
from lavis_dcd.models.dual_encoder.pooling import POOLINGS, EmbeddingHead, drop_tokens

HEADS = 3
PLAIN = HeadConfig(dim=4, hidden=6, dropout=0.0, hidden_dropout=0.0, token_dropout=0.0, pooling_heads=HEADS)


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
    assert set(typing.get_args(Pooling)) == set(POOLINGS)


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(POOLINGS))
def test_padding_changes_no_embedding(kind):
    torch.manual_seed(1)
    head = EmbeddingHead(6, kind, PLAIN).eval()
    tokens, mask = tokens_and_mask()
    longer = torch.cat([tokens.masked_fill(~mask[..., None], 1e4), torch.full((4, 3, 6), -1e4)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(head(TextFeatures(longer, longer_mask)), head(TextFeatures(tokens, mask)))
    torch.testing.assert_close(head(TextFeatures(tokens[2:3, :1])), head(TextFeatures(tokens, mask))[2:3])


@torch.no_grad()
def test_head_is_norm_linear_gelu_linear_to_length_one():
    torch.manual_seed(2)
    head = EmbeddingHead(6, "mean", PLAIN).eval()
    tokens, mask = tokens_and_mask()
    norm, _, first, _, _, last = head.projection
    for row, kept, found in zip(tokens, mask, head(TextFeatures(tokens, mask)), strict=True):
        mean = row[kept].mean(dim=0)
        normal = (mean - mean.mean()) / (mean.var(unbiased=False) + norm.eps).sqrt()
        hidden = first.weight @ normal + first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        vector = last.weight @ hidden + last.bias
        torch.testing.assert_close(found, vector / vector.square().sum().sqrt())


@torch.no_grad()
def test_no_hidden_layer_is_one_linear_map_without_bias():
    head = EmbeddingHead(6, "mean", dataclasses.replace(PLAIN, hidden=0)).eval()
    tokens, _ = tokens_and_mask()
    (weight,) = head.parameters()
    vectors = tokens.mean(dim=1) @ weight.T
    torch.testing.assert_close(head(TextFeatures(tokens)), vectors / vectors.norm(dim=1, keepdim=True))


@torch.no_grad()
def test_half_precision_tokens_are_pooled_in_single_precision():
    torch.manual_seed(3)
    head = EmbeddingHead(6, "attention_mean", PLAIN).eval()
    tokens, mask = tokens_and_mask()
    half = TextFeatures(tokens, mask).to(dtype=torch.float16)
    assert torch.equal(head(half), head(half.float()))


def test_dropped_tokens_are_real_ones_and_one_stays():
    torch.manual_seed(4)
    _, mask = tokens_and_mask()
    draws = torch.stack([drop_tokens(mask, 0.4) for _ in range(3000)])
    assert not draws[:, ~mask].any()
    assert draws.any(dim=2).all()
    # of 5 tokens each stays with probability 0.6, or 0.4^5 of the time all do
    assert float(draws[:, 0].float().mean()) == pytest.approx(0.6 + 0.4**5, abs=0.02)


@pytest.mark.parametrize("rate", ["dropout", "hidden_dropout", "token_dropout"])
def test_every_dropout_is_noise_in_training_and_nothing_in_evaluation(rate):
    torch.manual_seed(5)
    plain = EmbeddingHead(6, "mean", dataclasses.replace(PLAIN, hidden=32))
    noisy = EmbeddingHead(6, "mean", dataclasses.replace(PLAIN, hidden=32, **{rate: 0.5}))
    noisy.load_state_dict(plain.state_dict())
    features = TextFeatures(*tokens_and_mask())
    torch.testing.assert_close(plain.train()(features), plain.eval()(features))
    assert torch.equal(noisy.eval()(features), plain(features))
    assert not torch.allclose(noisy.train()(features), plain(features), atol=1e-2)
