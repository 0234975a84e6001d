"""Chunked matching gives the values and gradients of one pass; the repeated layers of an encoder."""

import torch
from torch import nn

from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.recompute import match_recomputed, repeated_layers


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


def test_stacks_of_one_class_and_not_what_is_inside_their_layers():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stack = nn.ModuleList([inner, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])
    mixed = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    model = nn.ModuleDict({"stack": stack, "mixed": mixed, "one": nn.ModuleList([nn.Linear(2, 2)])})
    assert repeated_layers(model) == [stack[0], stack[1]]
    assert repeated_layers(inner) == [inner[0], inner[1]]
    assert repeated_layers(nn.Linear(2, 2)) == []
