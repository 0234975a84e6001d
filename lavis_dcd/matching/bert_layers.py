"""One layer of BERT's kind in parts, so that a fusion can run each part as seldom as the arithmetic allows.

A layer is a ``BertLayer`` of ``transformers`` or of LAVIS's ``med.py``: ``attention``, ``crossattention``,
``intermediate`` and ``output``, every residual followed by its norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from lavis_dcd.matching.attention import AttentionBlock, KeysValues, attend, attend_source
from lavis_dcd.matching.shortcuts import Shortcuts


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
