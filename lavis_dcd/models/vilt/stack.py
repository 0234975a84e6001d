"""ViLT's blocks over pairs, with what does not depend on the pair computed once per item."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lavis_dcd.matching.attention import (
    AttentionBlock,
    BertSelfAttention,
    Shortcuts,
    attend_source,
    context_of,
    split_heads,
)
from lavis_dcd.matching.features import Features, last_used
from lavis_dcd.matching.recompute import Recomputed


class ViltAttention(Protocol):
    """The attention of a ``ViltLayer``: projections in ``attention``, the output projection in ``output``."""

    attention: BertSelfAttention
    output: ViltSelfOutput


class ViltSelfOutput(Protocol):
    """The output projection; the norm comes before the next block."""

    dense: nn.Linear
    dropout: nn.Dropout


class ViltLayer(Protocol):
    """A pre-norm block of ``transformers``' ViLT."""

    attention: ViltAttention
    layernorm_before: nn.LayerNorm
    layernorm_after: nn.LayerNorm
    intermediate: Callable[[Tensor], Tensor]
    output: Callable[[Tensor, Tensor], Tensor]


def block_attention(layer: ViltLayer) -> AttentionBlock:
    """Return the projections of a block's attention."""
    inner, output = layer.attention.attention, layer.attention.output
    return AttentionBlock(inner.query, inner.key, inner.value, output.dense, inner.num_attention_heads, inner.dropout)


@dataclass(frozen=True)
class PairSide:
    """The texts, or the pictures, of a chunk of pairs.

    Args:
        tokens: ``[B, N, D]``, one row per item.
        mask: bool ``[B, N]``.
        rows: int64 ``[P]``, each pair's item.
    """

    tokens: Tensor
    mask: Tensor
    rows: Tensor

    @classmethod
    def of(cls, features: Features, rows: Tensor, dtype: torch.dtype) -> PairSide:
        """Return the items that pairs of ``rows``, int64 ``[P]``, take, trimmed to the longest of them."""
        items, rows = rows.unique(return_inverse=True)
        mask = features.full_mask()[items]
        longest = last_used(mask)
        # index_select, not indexing: its gradient is an index_add, many times faster on a CPU
        return cls(features.tokens[:, :longest].index_select(0, items).to(dtype), mask[:, :longest], rows)


class BlockStep(nn.Module):
    """One pre-norm block for a batch of pairs, as a module so that it can be recomputed.

    Args:
        layer: the block, a module.
        class_only: compute the first token only (the last block).
    """

    def __init__(self, layer: ViltLayer, shortcuts: Shortcuts, class_only: bool) -> None:
        super().__init__()
        self.layer, self.shortcuts, self.class_only = layer, shortcuts, class_only

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values ``[B, N, D]`` of tokens ``[B, N, D]`` as they enter the block."""
        normed, block = self.layer.layernorm_before(tokens), block_attention(self.layer)
        return block.query(normed), block.key(normed), block.value(normed)

    def forward(self, hidden: Tensor, mask: Tensor | None, *projected: Tensor) -> Tensor:
        """Return the tokens after the block, ``[P, N, D]``, or ``[P, 1, D]`` with ``class_only``.

        Args:
            hidden: ``[P, N, D]``.
            mask: bool ``[P, N]``, True where a token is real; ``None``: all are.
            projected: what :meth:`project` makes of ``hidden``, where that is known.
        """
        layer, block = self.layer, block_attention(self.layer)
        if self.class_only:
            normed = layer.layernorm_before(hidden)
            seen = attend_source(block, normed[:, :1], normed, mask, self.shortcuts)
            hidden = hidden[:, :1]
        else:
            seen = self._attention(block, projected or self.project(hidden), mask)
        hidden = layer.attention.output.dropout(seen) + hidden
        return layer.output(layer.intermediate(layer.layernorm_after(hidden)), hidden)

    def _attention(self, block: AttentionBlock, projected: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        queries, keys, values = (split_heads(tensor, block.heads) for tensor in projected)
        context = context_of(block, queries, keys, values, mask, self.shortcuts.sdpa)
        attended: Tensor = block.dense(context.transpose(1, 2).flatten(2))
        return attended


class BlockStack:
    """The blocks of a ViLT; no module, for they belong to the model.

    Args:
        layers: ``ViltLayer``s.
        grad_checkpoint: in training, keep what enters each block only and compute the rest again.
    """

    def __init__(self, layers: Iterable[nn.Module], shortcuts: Shortcuts, grad_checkpoint: bool = False) -> None:
        typed = [cast(ViltLayer, layer) for layer in layers]  # transformers declares no types
        self.blocks = [
            BlockStep(layer, shortcuts, class_only=shortcuts.last_layer and number == len(typed) - 1)
            for number, layer in enumerate(typed)
        ]
        self.per_item = shortcuts.first_layer and not self.blocks[0].class_only
        self.steps: list[Any] = [Recomputed(block) for block in self.blocks] if grad_checkpoint else list(self.blocks)

    def run(self, texts: PairSide, images: PairSide) -> Tensor:
        """Return the tokens after the last block, ``[P, N, D]``, texts before pictures.

        With ``last_layer`` the class token alone is left, ``[P, 1, D]``.
        """
        real = torch.cat([side.mask[side.rows] for side in (texts, images)], dim=1)
        mask = None if bool(real.all()) else real
        hidden = _paired(texts, images, texts.tokens, images.tokens)
        projected: tuple[Tensor, ...] = ()
        if self.per_item:
            of_items = zip(self.blocks[0].project(texts.tokens), self.blocks[0].project(images.tokens), strict=True)
            projected = tuple(_paired(texts, images, *of_item) for of_item in of_items)
        for step in self.steps:
            hidden = step(hidden, mask, *projected)
            projected = ()
        return hidden


def _paired(texts: PairSide, images: PairSide, of_texts: Tensor, of_images: Tensor) -> Tensor:
    return torch.cat([of_texts.index_select(0, texts.rows), of_images.index_select(0, images.rows)], dim=1)
