"""Every order of computing an attention against the plain one, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lavis_dcd.matching.attention import (
    AttentionBlock,
    Shortcuts,
    attend,
    attend_by_few_queries,
    attend_source,
    attend_to_few_keys,
    keys_values,
)


def block_of(width=16, source_width=16, heads=4, bias=True, dropout=0.0):
    parts = [nn.Linear(width, width, bias=bias), *(nn.Linear(source_width, width, bias=bias) for _ in range(2)),
             nn.Linear(width, width, bias=bias)]  # fmt: skip
    return AttentionBlock(*parts, heads, nn.Dropout(dropout))


def by_the_definition(block, queries, source, mask):
    """Head by head and query by query, in float64."""
    q, k, v = (layer(x) for layer, x in ((block.query, queries), (block.key, source), (block.value, source)))
    size = block.width // block.heads
    rows = []
    for b in range(len(queries)):
        context = torch.zeros_like(q[b])
        for h in range(block.heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(q.shape[1]):
                scores = torch.stack([q[b, i, part] @ k[b, n, part] for n in range(k.shape[1])]) / size**0.5
                if mask is not None:
                    scores = scores.masked_fill(~mask[b], -torch.inf)
                context[i, part] = scores.softmax(0) @ v[b, :, part]
        rows.append(block.dense(context))
    return torch.stack(rows)


ORDERS = {
    "weights": lambda b, q, s, m: attend(b, q, keys_values(b, s), m, sdpa=False),
    "sdpa": lambda b, q, s, m: attend(b, q, keys_values(b, s), m, sdpa=True),
    "few queries": attend_by_few_queries,
    "few keys": attend_to_few_keys,
    "cheapest": lambda b, q, s, m: attend_source(b, q, s, m, Shortcuts()),
}


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=15, deadline=None)
@given(
    queries=st.integers(1, 5), tokens=st.integers(1, 6), bias=st.booleans(), masked=st.booleans(),
    source_width=st.sampled_from([16, 24]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_order_gives_values_and_gradients_of_the_definition(
    order, queries, tokens, bias, masked, source_width, seed
):
    torch.manual_seed(seed)
    block = block_of(source_width=source_width, bias=bias)
    parts = nn.ModuleList([block.query, block.key, block.value, block.dense]).double()
    asking = torch.randn(2, queries, 16, dtype=torch.double, requires_grad=True)
    source = torch.randn(2, tokens, source_width, dtype=torch.double, requires_grad=True)
    mask = None
    if masked:
        mask = torch.rand(2, tokens) < 0.6
        mask[:, 0] = True
    learned = [asking, source, *parts.parameters()]
    expected = by_the_definition(block, asking, source, mask)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), learned)
    found = ORDERS[order](block, asking, source, mask)
    torch.testing.assert_close(found, expected)
    # none is absent, as distributed training demands: not even that of the key bias, which is always 0
    for a, b in zip(torch.autograd.grad((found * direction).sum(), learned), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ["few queries", "few keys"])
def test_dropout_of_the_weights_is_applied_as_in_the_plain_order(order):
    """With dropped weights a query's weights do not sum to 1, so the value bias counts less."""
    torch.manual_seed(0)
    block = block_of(heads=1, dropout=0.5)
    queries, source = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    torch.manual_seed(7)
    expected = ORDERS["weights"](block, queries, source, None)
    torch.manual_seed(7)
    torch.testing.assert_close(ORDERS[order](block, queries, source, None), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, ORDERS["weights"](block, queries, source, None))


def test_the_cheapest_order_projects_only_the_short_side():
    torch.manual_seed(0)
    block, seen = block_of(width=64, source_width=64, heads=2), []
    for name in ("query", "key", "value", "dense"):
        getattr(block, name).register_forward_hook(lambda m, i, o, name=name: seen.append((name, i[0].shape[1])))
    attend_source(block, torch.randn(1, 3, 64), torch.randn(1, 50, 64), None, Shortcuts())
    assert seen == [("query", 3), ("dense", 3)]
    seen.clear()
    attend_source(block, torch.randn(1, 50, 64), torch.randn(1, 3, 64), None, Shortcuts())
    assert seen == [("key", 3), ("value", 3)]
    seen.clear()
    attend_source(block, torch.randn(1, 50, 64), torch.randn(1, 3, 64), None, Shortcuts(low_rank=False))
    assert sorted(seen) == [("dense", 50), ("key", 3), ("query", 50), ("value", 3)]
