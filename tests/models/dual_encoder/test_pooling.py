"""Heads against the arithmetic their docstring states."""

import dataclasses
import math

import pytest
import torch

from lavis_dcd.matching.features import TextFeatures
from lavis_dcd.models.dual_encoder.config import HeadConfig
from lavis_dcd.models.dual_encoder.pooling import EmbeddingHead
from lavis_dcd.models.pooling import POOLINGS

PLAIN = HeadConfig(dim=4, hidden=6, dropout=0.0, hidden_dropout=0.0, token_dropout=0.0, pooling_heads=3)


def tokens_and_mask(rows: int = 4, length: int = 5, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(rows, length, width, generator=generator)
    return tokens, torch.arange(length) < torch.tensor([5, 3, 1, 4])[:rows, None]


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
