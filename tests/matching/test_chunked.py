"""Chunked matching gives the values and gradients of one pass."""

import torch

from lavis_dcd.matching.contract import pair_chunks
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.recompute import match_recomputed


def test_recomputed_chunks_equal_one_pass():
    torch.manual_seed(0)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    images = ImageFeatures(torch.randn(5, 2, 4, dtype=torch.float64))
    texts = TextFeatures(torch.randn(6, 3, 4, dtype=torch.float64))
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(6))

    def match(images, texts, pairs):
        image, text = images.tokens[pairs[:, 0]].mean(1), texts.tokens[pairs[:, 1]].mean(1)
        return torch.tanh((image @ weight * text).sum(-1))

    results = []
    for chunk in (None, 7, 1):
        weight.grad = None
        scores = match_recomputed(match, images, texts, pairs, chunk)
        scores.square().sum().backward()
        results.append((scores.detach(), weight.grad))
    for scores, gradient in results[1:]:
        torch.testing.assert_close(scores, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_chunks_stay_within_the_stated_memory():
    pairs = torch.zeros(1000, 2, dtype=torch.long)
    chunks = pair_chunks(pairs, bytes_per_pair=2**20, memory_mb=64)
    assert max(map(len, chunks)) == 64 and sum(map(len, chunks)) == 1000
    assert all(len(c) == 1 for c in pair_chunks(pairs[:3], bytes_per_pair=2**30, memory_mb=1))
