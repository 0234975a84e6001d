"""Attention of a fusion layer, computed in the cheapest of several orders that give the same numbers.

A projection of the long side (577 tokens of a picture at 384 px) is what cross-attention costs; the short side is a
caption of a dozen tokens, or one class token. Products associate: ``(x Wq)(y Wk)^T = x (Wq Wk^T) y^T``. So the short
side can be carried through the long side's weights instead, head by head, at rank ``heads * length`` in place of the
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # [B, heads, N, D / heads] each


@dataclass(frozen=True)
class Shortcuts:
    """Ways to save work in ``match`` that change no score or gradient beyond rounding; a model takes those that fit it.

    With dropout on, what is computed once per item draws its dropout once per item, too.

    Args:
        sdpa: ``scaled_dot_product_attention`` instead of matrices of attention weights.
        first_layer: what the first layer does before picture and text meet is computed once per item, not per pair;
            where a layer reads a picture that no text has changed, its keys and values are made once per picture.
        last_layer: the last layer is computed for the class tokens alone, which are all that the head reads.
        low_rank: attention with few queries or few keys is computed without projecting the long side: the short
            side's projections are multiplied with the other side's weights first.
    """

    sdpa: bool = True
    first_layer: bool = True
    last_layer: bool = True
    low_rank: bool = True

    @classmethod
    def none(cls) -> Shortcuts:
        """Return the plain path: every layer in full for every pair."""
        return cls(sdpa=False, first_layer=False, last_layer=False, low_rank=False)

    @property
    def any(self) -> bool:
        """Return whether any shortcut is taken."""
        return self != Shortcuts.none()


class BertSelfAttention(Protocol):
    """The projections of BERT's attention, as ``transformers`` and LAVIS's ``med.py`` name them."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    num_attention_heads: int
    dropout: nn.Dropout


class BertSelfOutput(Protocol):
    """The output projection of BERT's attention, and the norm of its sum with the residual."""

    dense: nn.Linear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm


class BertAttention(Protocol):
    """An attention of BERT's kind and its output."""

    self: BertSelfAttention
    output: BertSelfOutput


class BertLayer(Protocol):
    """A layer that reads a second sequence: ``BertLayer`` of ``transformers`` or of LAVIS's ``med.py``."""

    attention: BertAttention
    crossattention: BertAttention
    intermediate: Callable[[Tensor], Tensor]
    output: Callable[[Tensor, Tensor], Tensor]


def bert_layers(modules: Iterable[nn.Module]) -> list[BertLayer]:
    """Return ``modules`` under their type: neither ``transformers`` nor LAVIS declares it to a type checker."""
    return [cast(BertLayer, module) for module in modules]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to attention scores: 0 where real, the most negative finite number where padding.

    Args:
        mask: bool ``[B, N]``, True where a token is real.
        dtype: floating point type of the result, ``[B, 1, 1, N]``.
    """
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]


@dataclass(frozen=True)
class AttentionBlock:
    """The projections of one multi-head attention, whatever its model calls them.

    Args:
        query, key, value: linear layers to ``heads * channels``; key and value may read another width.
        dense: the output projection.
        heads: number of heads.
        dropout: of the attention weights.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dense: nn.Linear
    heads: int
    dropout: nn.Dropout

    @classmethod
    def of_bert(cls, attention: BertAttention) -> AttentionBlock:
        """Return the block of a BERT layer's ``attention`` or ``crossattention``."""
        inner = attention.self
        dense = attention.output.dense
        return cls(inner.query, inner.key, inner.value, dense, inner.num_attention_heads, inner.dropout)

    @property
    def width(self) -> int:
        """Width of all heads together, D."""
        return self.query.out_features

    @property
    def scale(self) -> float:
        """Factor of the scores: one over the root of a head's width."""
        scale: float = (self.width // self.heads) ** -0.5
        return scale

    @property
    def active_dropout(self) -> float:
        """Probability by which weights are dropped now: 0 in evaluation mode."""
        return self.dropout.p if self.dropout.training else 0.0


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return ``x [B, N, D]`` as ``[B, heads, N, D / heads]``."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def keys_values(block: AttentionBlock, source: Tensor) -> KeysValues:
    """Return keys and values of ``source [B, N, Ds]``, ``[B, heads, N, D / heads]`` each."""
    return split_heads(block.key(source), block.heads), split_heads(block.value(source), block.heads)


def attend(
    block: AttentionBlock, queries: Tensor, source: KeysValues, mask: Tensor | None, sdpa: bool = True
) -> Tensor:
    """Return the attention of ``queries`` to keys and values that exist already, after the output projection.

    Args:
        queries: ``[B, L, D]``, not yet projected.
        source: keys and values, ``[B, heads, N, d]`` each.
        mask: bool ``[B, N]``, True where a key may be attended to; ``None``: everywhere.
        sdpa: by ``scaled_dot_product_attention``; else by the matrix of weights.

    Returns:
        ``[B, L, D]``, of the queries' type.
    """
    context = context_of(block, split_heads(block.query(queries), block.heads), *source, mask, sdpa)
    projected: Tensor = block.dense(context.transpose(1, 2).flatten(2))
    return projected


def context_of(
    block: AttentionBlock, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sdpa: bool
) -> Tensor:
    """Return what each query reads, ``[B, heads, L, d]``, before the output projection.

    Args:
        queries: projected, ``[B, heads, L, d]``.
        keys, values: projected, ``[B, heads, N, d]``.
        mask: bool ``[B, N]`` of the keys; ``None``: everywhere.
        sdpa: by ``scaled_dot_product_attention``; else by the matrix of weights.
    """
    if sdpa:
        where = None if mask is None else mask[:, None, None]
        return nnf.scaled_dot_product_attention(
            queries, keys, values, attn_mask=where, dropout_p=block.active_dropout, scale=block.scale
        )
    weights: Tensor = block.dropout(_softmax(block.scale * (queries @ keys.transpose(-1, -2)), mask))
    return weights @ values


def attend_source(
    block: AttentionBlock, queries: Tensor, source: Tensor, mask: Tensor | None, shortcuts: Shortcuts
) -> Tensor:
    """Return the attention of ``queries`` to ``source``, ``[B, L, D]``, computed in the cheapest order.

    Args:
        queries: ``[B, L, D]``.
        source: ``[B, N, Ds]``.
        mask: bool ``[B, N]`` of the source; ``None``: all of it.
        shortcuts: of which ``low_rank`` and ``sdpa`` are read.
    """
    if shortcuts.low_rank:
        length, tokens = queries.shape[1], source.shape[1]
        # multiplications per element of a weight matrix: the projections of both sides, or one side at low rank
        if length <= tokens and block.heads * length < source.shape[2]:
            return attend_by_few_queries(block, queries, source, mask)
        if tokens < length and block.heads * tokens < block.width:
            return attend_to_few_keys(block, queries, source, mask)
    return attend(block, queries, keys_values(block, source), mask, shortcuts.sdpa)


def attend_by_few_queries(block: AttentionBlock, queries: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """Return what :func:`attend_source` does, without keys or values: the queries go through the key weights.

    The value bias is added once, times the sum of the weights (1, but for dropout).
    """
    heads, length = block.heads, queries.shape[1]
    projected = split_heads(block.query(queries), heads)  # [B, H, L, d]
    key = torch.unflatten(block.key.weight, 0, (heads, -1)).to(projected.dtype)  # [H, d, Ds]
    through = torch.einsum("bhld,hds->bhls", projected, key).flatten(1, 2)  # [B, H L, Ds]
    scores = torch.unflatten(block.scale * through @ source.to(through.dtype).transpose(1, 2), 1, (heads, length))
    if block.key.bias is not None:
        # the same for all keys, so it has no effect on the weights: here that its gradient is 0, not absent
        bias = torch.unflatten(block.key.bias, 0, (heads, -1, 1)).to(projected.dtype)
        scores = scores + block.scale * projected @ bias
    weights: Tensor = block.dropout(_softmax(scores, mask))  # [B, H, L, N]
    seen = torch.unflatten(weights.flatten(1, 2) @ source.to(weights.dtype), 1, (heads, length))  # [B, H, L, Ds]
    value = torch.unflatten(block.value.weight, 0, (heads, -1)).to(seen.dtype)
    context = torch.einsum("bhls,hds->blhd", seen, value)
    if block.value.bias is not None:
        total = weights.sum(dim=-1).transpose(1, 2)[..., None] if block.active_dropout else 1.0
        context = context + total * torch.unflatten(block.value.bias, 0, (heads, -1))
    attended: Tensor = block.dense(context.flatten(2))
    return attended


def attend_to_few_keys(block: AttentionBlock, queries: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """Return what :func:`attend_source` does, without projecting queries or context: keys and values go through them.

    The query bias adds to each key's scores; the output bias is added once.
    """
    heads, tokens = block.heads, source.shape[1]
    keys, values = keys_values(block, source)  # [B, H, N, d]
    query = torch.unflatten(block.query.weight, 0, (heads, -1)).to(keys.dtype)  # [H, d, D]
    through = torch.einsum("bhnd,hdw->bhnw", keys, query).flatten(1, 2)  # [B, H N, D]
    scores = queries.to(through.dtype) @ through.transpose(1, 2)  # [B, L, H N]
    if block.query.bias is not None:
        bias = torch.einsum("bhnd,hd->bhn", keys, torch.unflatten(block.query.bias, 0, (heads, -1)).to(keys.dtype))
        scores = scores + bias.flatten(1)[:, None]
    scores = block.scale * torch.unflatten(scores, 2, (heads, tokens)).transpose(1, 2)  # [B, H, L, N]
    weights = block.dropout(_softmax(scores, mask)).transpose(1, 2).flatten(2)  # [B, L, H N]
    dense = torch.unflatten(block.dense.weight, 1, (heads, -1)).to(values.dtype)  # [W, H, d]
    out: Tensor = weights @ torch.einsum("bhnd,whd->bhnw", values, dense).flatten(1, 2).to(weights.dtype)
    return out if block.dense.bias is None else out + block.dense.bias


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return weights over the last axis of ``[B, H, L, N]``, masked keys left out; float32 under autocast."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


# A BERT layer in parts, every residual followed by its norm, so that a fusion can run each part as seldom as the
# arithmetic allows.


def self_attention(
    layer: BertLayer, hidden: Tensor, mask: Tensor | None, shortcuts: Shortcuts, first_only: bool = False
) -> Tensor:
    """Return ``hidden`` after the layer's self-attention, ``[B, N, D]``.

    Args:
        hidden: ``[B, N, D]``.
        mask: bool ``[B, N]``, True where a token is real; ``None``: all are.
        first_only: only for the first token, ``[B, 1, D]``, which attends to all of them.
    """
    queries = hidden[:, :1] if first_only else hidden
    block = AttentionBlock.of_bert(layer.attention)
    return add_residual(layer.attention, attend_source(block, queries, hidden, mask, shortcuts), queries)


def cross_attention(
    layer: BertLayer, hidden: Tensor, source: Tensor | KeysValues, mask: Tensor | None, shortcuts: Shortcuts
) -> Tensor:
    """Return ``hidden`` after the layer's cross-attention to ``source``, ``[B, L, D]``.

    Args:
        hidden: ``[B, L, D]``, after :func:`self_attention`.
        source: tokens ``[B, N, Ds]``, or their keys and values.
        mask: bool ``[B, N]`` of the source.
    """
    block = AttentionBlock.of_bert(layer.crossattention)
    if isinstance(source, tuple):
        read = attend(block, hidden, source, mask, shortcuts.sdpa)
    else:
        read = attend_source(block, hidden, source, mask, shortcuts)
    return add_residual(layer.crossattention, read, hidden)


def feed_forward(layer: BertLayer, hidden: Tensor) -> Tensor:
    """Return ``hidden [..., D]`` after the rest of the layer, token by token."""
    return layer.output(layer.intermediate(hidden), hidden)


def add_residual(attention: BertAttention, projected: Tensor, hidden: Tensor) -> Tensor:
    """Return the norm of ``hidden [..., D]`` plus what its tokens read, ``projected [..., D]``."""
    output = attention.output
    normed: Tensor = output.LayerNorm(output.dropout(projected) + hidden)
    return normed
