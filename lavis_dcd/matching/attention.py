"""Attention of a fusion layer, computed in the cheapest of several orders that give the same numbers.

A projection of the long side (577 tokens of a picture at 384 px) is what cross-attention costs; the short side is a
caption of a dozen tokens, or one class token. Products associate: ``(x Wq)(y Wk)^T = x (Wq Wk^T) y^T``. So the short
side can be carried through the long side's weights instead, head by head, at rank ``heads * length`` in place of the
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

# ----------------------------------------------------------------------------------------------------
# Which exact shortcuts a fusion takes: the same scores and gradients for less work.


@dataclass(frozen=True)
class Shortcuts:
    """Ways to save work in ``match`` that change no score beyond rounding; a model takes those that fit it.

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
        """The plain path: every layer in full for every pair."""
        return cls(sdpa=False, first_layer=False, last_layer=False, low_rank=False)

    @property
    def any(self) -> bool:
        return self != Shortcuts.none()


KeysValues = tuple[Tensor, Tensor]  # [B, heads, N, D / heads] each


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool ``[B, N]`` -> ``[B, 1, 1, N]``: 0 where real, the most negative finite number where padding."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
        :, None, None
    ]


@dataclass(frozen=True)
class AttentionBlock:
    """The projections of one multi-head attention, under one set of names.

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
    def of_bert(cls, attention: nn.Module) -> AttentionBlock:
        """From a ``BertAttention``, of ``transformers`` or of LAVIS (``self`` and ``output``)."""
        inner = attention.self
        projections = (inner.query, inner.key, inner.value, attention.output.dense)
        return cls(*projections, inner.num_attention_heads, inner.dropout)

    @property
    def width(self) -> int:
        return self.query.out_features

    @property
    def scale(self) -> float:
        return (self.width // self.heads) ** -0.5

    @property
    def active_dropout(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, D]`` -> ``[B, heads, N, D / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def keys_values(block: AttentionBlock, source: Tensor) -> KeysValues:
    """Keys and values of ``source [B, N, Ds]``, ``[B, heads, N, D / heads]`` each."""
    return split_heads(block.key(source), block.heads), split_heads(block.value(source), block.heads)


def attend(block: AttentionBlock, queries: Tensor, kept: KeysValues, mask: Tensor | None, sdpa: bool = True) -> Tensor:
    """Attention of ``queries [B, L, D]`` to keys and values that are there already, projected: ``[B, L, D]``.

    Args:
        mask: bool ``[B, N]``, True where a key may be attended to; ``None``: everywhere.
        sdpa: by ``scaled_dot_product_attention``; else by the matrix of weights.
    """
    asked = split_heads(block.query(queries), block.heads)
    return block.dense(context_of(block, asked, *kept, mask, sdpa).transpose(1, 2).flatten(2))


def context_of(
    block: AttentionBlock, asked: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sdpa: bool
) -> Tensor:
    """Attention of projected tensors ``[B, heads, L or N, d]``: ``[B, heads, L, d]``.

    Args:
        mask: bool ``[B, N]`` of the keys; ``None``: everywhere.
        sdpa: by ``scaled_dot_product_attention``; else by the matrix of weights.
    """
    if sdpa:
        where = None if mask is None else mask[:, None, None]
        return nnf.scaled_dot_product_attention(
            asked, keys, values, attn_mask=where, dropout_p=block.active_dropout, scale=block.scale
        )
    return block.dropout(_softmax(block.scale * (asked @ keys.transpose(-1, -2)), mask)) @ values


def attend_source(
    block: AttentionBlock, queries: Tensor, source: Tensor, mask: Tensor | None, shortcuts: Shortcuts
) -> Tensor:
    """Attention of ``queries [B, L, D]`` to ``source [B, N, Ds]``, projected, in the cheapest order: ``[B, L, D]``.

    Args:
        mask: bool ``[B, N]`` of the source; ``None``: all of it.
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
    """As :func:`attend_source`, without keys or values of the source: the queries go through the key weights.

    The value bias is added once, times the sum of the weights (1, but for dropout).
    """
    heads, length = block.heads, queries.shape[1]
    asked = split_heads(block.query(queries), heads)  # [B, H, L, d]
    key = block.key.weight.unflatten(0, (heads, -1)).to(asked.dtype)  # [H, d, Ds]
    through = torch.einsum("bhld,hds->bhls", asked, key).flatten(1, 2)  # [B, H L, Ds]
    scores = (block.scale * through @ source.to(through.dtype).transpose(1, 2)).unflatten(1, (heads, length))
    if block.key.bias is not None:
        # the same for all keys, so it has no effect on the weights: here that its gradient is 0, not absent
        bias = block.key.bias.unflatten(0, (heads, -1, 1)).to(asked.dtype)
        scores = scores + block.scale * asked @ bias
    weights = block.dropout(_softmax(scores, mask))  # [B, H, L, N]
    seen = (weights.flatten(1, 2) @ source.to(weights.dtype)).unflatten(1, (heads, length))  # [B, H, L, Ds]
    value = block.value.weight.unflatten(0, (heads, -1)).to(seen.dtype)
    context = torch.einsum("bhls,hds->blhd", seen, value)
    if block.value.bias is not None:
        total = weights.sum(dim=-1).transpose(1, 2)[..., None] if block.active_dropout else 1.0
        context = context + total * block.value.bias.unflatten(0, (heads, -1))
    return block.dense(context.flatten(2))


def attend_to_few_keys(block: AttentionBlock, queries: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """As :func:`attend_source`, without projecting queries or context: keys and values go through those weights.

    The query bias adds to each key's scores; the output bias is added once.
    """
    heads, tokens = block.heads, source.shape[1]
    keys, values = keys_values(block, source)  # [B, H, N, d]
    query = block.query.weight.unflatten(0, (heads, -1)).to(keys.dtype)  # [H, d, D]
    through = torch.einsum("bhnd,hdw->bhnw", keys, query).flatten(1, 2)  # [B, H N, D]
    scores = queries.to(through.dtype) @ through.transpose(1, 2)  # [B, L, H N]
    if block.query.bias is not None:
        bias = torch.einsum("bhnd,hd->bhn", keys, block.query.bias.unflatten(0, (heads, -1)).to(keys.dtype))
        scores = scores + bias.flatten(1)[:, None]
    scores = block.scale * scores.unflatten(2, (heads, tokens)).transpose(1, 2)  # [B, H, L, N]
    weights = block.dropout(_softmax(scores, mask)).transpose(1, 2).flatten(2)  # [B, L, H N]
    dense = block.dense.weight.unflatten(1, (heads, -1)).to(values.dtype)  # [W, H, d]
    out = weights @ torch.einsum("bhnd,whd->bhnw", values, dense).flatten(1, 2).to(weights.dtype)
    return out if block.dense.bias is None else out + block.dense.bias


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over the last axis of ``[B, H, L, N]``, in float32, masked keys left out."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


# ----------------------------------------------------------------------------------------------------
# One layer of BERT's kind in parts, so that a fusion can run each part as seldom as the arithmetic allows.
#
# A layer is a ``BertLayer`` of ``transformers`` or of LAVIS's ``med.py``: ``attention``, ``crossattention``,
# ``intermediate`` and ``output``, every residual followed by its norm.


def self_attention(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, shortcuts: Shortcuts, first_only: bool = False
) -> Tensor:
    """The layer up to its cross-attention: ``[B, N, D]`` -> ``[B, N, D]``.

    Args:
        mask: bool ``[B, N]``, True where a token is real; ``None``: all are.
        first_only: only for the first token, ``[B, 1, D]``, which attends to all of them.
    """
    asking = hidden[:, :1] if first_only else hidden
    block = AttentionBlock.of_bert(layer.attention)
    return _added(layer.attention, attend_source(block, asking, hidden, mask, shortcuts), asking)


def cross_attention(
    layer: nn.Module,
    hidden: Tensor,
    source: Tensor | KeysValues,
    mask: Tensor | None,
    shortcuts: Shortcuts,
) -> Tensor:
    """The layer's cross-attention: ``hidden [B, L, D]``, after :func:`self_attention`, reads ``source``.

    Args:
        source: tokens ``[B, N, Ds]``, or their keys and values.
        mask: bool ``[B, N]`` of the source.
    """
    block = AttentionBlock.of_bert(layer.crossattention)
    if isinstance(source, tuple):
        read = attend(block, hidden, source, mask, shortcuts.sdpa)
    else:
        read = attend_source(block, hidden, source, mask, shortcuts)
    return _added(layer.crossattention, read, hidden)


def feed_forward(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The rest of the layer, token by token."""
    return layer.output(layer.intermediate(hidden), hidden)


def _added(attention: nn.Module, projected: Tensor, hidden: Tensor) -> Tensor:
    output = attention.output
    return output.LayerNorm(output.dropout(projected) + hidden)
