"""ViLT's blocks over pairs, with what does not depend on the pair computed once per item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lavis_dcd.matching.attention import AttentionBlock, Shortcuts, attend_source, context_of, split_heads
from lavis_dcd.matching.features import Features, last_used
from lavis_dcd.matching.recompute import Recomputed


def block_attention(layer: nn.Module) -> AttentionBlock:
    """Of a ``ViltLayer`` of ``transformers``."""
    own, output = layer.attention.attention, layer.attention.output
    return AttentionBlock(own.query, own.key, own.value, output.dense, own.num_attention_heads, own.dropout)


@dataclass(frozen=True)
class Side:
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
    def of(cls, features: Features, rows: Tensor, dtype: torch.dtype) -> Side:
        """The items that pairs of ``rows [P]`` take, trimmed to the longest of them."""
        items, rows = rows.unique(return_inverse=True)
        mask = features.full_mask()[items]
        longest = last_used(mask)
        # index_select, not indexing: its gradient is an index_add, many times faster on a CPU
        return cls(features.tokens[:, :longest].index_select(0, items).to(dtype), mask[:, :longest], rows)


class BlockStep(nn.Module):
    """One pre-norm block for a batch of pairs, as a module so that it can be recomputed.

    Args:
        layer: a ``ViltLayer``.
        class_only: compute the first token only (the last block).
    """

    def __init__(self, layer: nn.Module, shortcuts: Shortcuts, class_only: bool) -> None:
        super().__init__()
        self.layer, self.shortcuts, self.class_only = layer, shortcuts, class_only

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[B, N, D]`` of tokens as they enter the block."""
        normed, block = self.layer.layernorm_before(tokens), block_attention(self.layer)
        return block.query(normed), block.key(normed), block.value(normed)

    def forward(self, hidden: Tensor, mask: Tensor | None, *projected: Tensor) -> Tensor:
        """``hidden [P, N, D]``, bool ``mask [P, N]`` -> ``[P, N, D]``, or ``[P, 1, D]``.

        Args:
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
        asked, keys, values = (split_heads(part, block.heads) for part in projected)
        context = context_of(block, asked, keys, values, mask, self.shortcuts.sdpa)
        return block.dense(context.transpose(1, 2).flatten(2))


class BlockStack:
    """The blocks of a ViLT; no module, for they belong to the model.

    Args:
        layers: ``ViltLayer``s.
        grad_checkpoint: in training, keep what enters each block only and compute the rest again.
    """

    def __init__(self, layers: Sequence[nn.Module], shortcuts: Shortcuts, grad_checkpoint: bool = False) -> None:
        last = len(layers) - 1
        self.blocks = [
            BlockStep(layer, shortcuts, class_only=shortcuts.last_layer and number == last)
            for number, layer in enumerate(layers)
        ]
        self.per_item = shortcuts.first_layer and not self.blocks[0].class_only
        self.steps: list[Any] = [Recomputed(block) for block in self.blocks] if grad_checkpoint else list(self.blocks)

    def run(self, texts: Side, images: Side) -> Tensor:
        """``[P, N, D]`` after the last block, texts before pictures; the class token alone where that suffices."""
        mask = torch.cat([side.mask[side.rows] for side in (texts, images)], dim=1)
        mask = None if bool(mask.all()) else mask
        hidden = _paired(texts, images, texts.tokens, images.tokens)
        projected: tuple[Tensor, ...] = ()
        if self.per_item:
            of_items = zip(self.blocks[0].project(texts.tokens), self.blocks[0].project(images.tokens), strict=True)
            projected = tuple(_paired(texts, images, *part) for part in of_items)
        for step in self.steps:
            hidden = step(hidden, mask, *projected)
            projected = ()
        return hidden


def _paired(texts: Side, images: Side, of_texts: Tensor, of_images: Tensor) -> Tensor:
    return torch.cat([of_texts.index_select(0, texts.rows), of_images.index_select(0, images.rows)], dim=1)
