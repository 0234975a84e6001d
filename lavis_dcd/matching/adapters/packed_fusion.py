"""BERT layers that read pictures, over many pairs at once: every token computed once, padding never.

The captions' real tokens of all pairs lie in one row, ``[tokens, D]``, so that a linear layer pays for no padding. They
are spread out for attention alone: by pair where a caption attends to itself, by picture where it reads the picture.
So a picture's keys and values serve all of its pairs without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_dcd.matching.attention import AttentionBlock, context_of, split_heads
from lavis_dcd.matching.bert_layers import cross_attention, feed_forward, self_attention
from lavis_dcd.matching.shortcuts import Shortcuts


@dataclass(frozen=True)
class Grid:
    """Where the rows of a packed tensor lie in a padded one, ``[rows, columns]``.

    Args:
        slots: int64 ``[n]``, ascending: row times columns plus column.
    """

    slots: Tensor
    rows: int
    columns: int

    @classmethod
    def of_counts(cls, counts: Tensor) -> Grid:
        """Rows of ``counts [R]`` entries each, one after the other in the packed tensor."""
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        columns = torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]
        widest = int(counts.max())
        return cls(rows * widest + columns, len(counts), widest)

    @property
    def full(self) -> bool:
        return len(self.slots) == self.rows * self.columns

    @property
    def mask(self) -> Tensor | None:
        """bool ``[rows, columns]``, True where there is an entry; ``None``: everywhere."""
        if self.full:
            return None
        empty = torch.zeros(self.rows * self.columns, dtype=torch.bool, device=self.slots.device)
        return empty.index_fill(0, self.slots, True).view(self.rows, self.columns)

    def spread(self, packed: Tensor) -> Tensor:
        """``[n, D]`` -> ``[rows, columns, D]``, zeros elsewhere."""
        if not self.full:
            empty = packed.new_zeros(self.rows * self.columns, packed.shape[1])
            packed = empty.index_copy(0, self.slots, packed)
        return packed.view(self.rows, self.columns, -1)

    def packed(self, padded: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""
        flat = padded.flatten(0, 1)
        # index_select, not indexing: its gradient is an index_add, many times faster on a CPU
        return flat if self.full else flat.index_select(0, self.slots)


@dataclass(frozen=True)
class Captions:
    """Texts without padding: ``tokens [n, D]``, and ``starts``, ``lengths`` int64 ``[T]``."""

    tokens: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor, texts: Tensor) -> Captions:
        """The rows ``texts [T]`` of ``tokens [B, L, D]`` and bool ``mask [B, L]``, each with a real token."""
        mask = mask[texts]
        lengths = mask.sum(dim=1)
        row, column = mask.nonzero().unbind(dim=1)
        real = texts[row] * tokens.shape[1] + column
        return cls(tokens.flatten(0, 1).index_select(0, real), lengths.cumsum(0) - lengths, lengths)

    def split(self, texts: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and lengths of so many texts at a time."""
        parts = self.lengths.split(texts)
        return zip(self.tokens.split([int(part.sum()) for part in parts]), parts, strict=True)

    def rows(self, texts: Tensor) -> Tensor:
        """The rows of ``tokens`` that ``texts [P]`` take, one text after the other."""
        counts = self.lengths[texts]
        shift = self.starts[texts] - (counts.cumsum(0) - counts)
        return shift.repeat_interleave(counts) + torch.arange(int(counts.sum()), device=texts.device)


@dataclass(frozen=True)
class PairLayout:
    """Pairs, those of one picture together, and where their tokens lie.

    Args:
        pairs: ``[P, longest caption]``.
        pictures: ``[I, most tokens of a picture]``.
        heads: ``[I, most pairs of a picture]``, of the class tokens alone.
        first: int64 ``[P]``, the row of each pair's class token.
        chosen: int64 ``[I]``, the pictures.
    """

    pairs: Grid
    pictures: Grid
    heads: Grid
    first: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, images: Tensor, lengths: Tensor, shared: bool) -> PairLayout:
        """Of picture rows ``[P]`` and caption lengths ``[P]``; unless ``shared``, each pair has its own picture."""
        if shared:
            chosen, pairs = images.unique_consecutive(return_counts=True)
        else:
            chosen, pairs = images, torch.ones_like(images)
        owner = torch.arange(len(chosen), device=images.device).repeat_interleave(pairs)
        tokens = torch.zeros_like(pairs).index_add(0, owner, lengths)
        first = lengths.cumsum(0) - lengths
        return cls(Grid.of_counts(lengths), Grid.of_counts(tokens), Grid.of_counts(pairs), first, chosen)


class FusionStep(nn.Module):
    """One layer for the tokens of many pairs, as a module so that it can be recomputed.

    Args:
        layer: a ``BertLayer`` of LAVIS's ``med.py`` with cross-attention.
        class_only: compute each pair's class token only (the last layer).
        attended: the tokens come from the layer's self-attention already.
    """

    def __init__(self, layer: nn.Module, shortcuts: Shortcuts, class_only: bool, attended: bool) -> None:
        super().__init__()
        self.layer, self.shortcuts = layer, shortcuts
        self.class_only, self.attended = class_only, attended

    def forward(self, tokens: Tensor, images: Tensor, image_mask: Tensor | None, layout: PairLayout) -> Tensor:
        """``tokens [n, D]``, ``images [I, N, Dv]``, bool ``image_mask [I, N]`` -> ``[n, D]``, or ``[P, D]``."""
        grid = layout.heads if self.class_only else layout.pictures
        if not self.attended:
            tokens = packed_self_attention(self.layer, tokens, layout.pairs, self.shortcuts, self.class_only)
        elif self.class_only:
            tokens = tokens.index_select(0, layout.first)
        read = cross_attention(self.layer, grid.spread(tokens), images, image_mask, self.shortcuts)
        return feed_forward(self.layer, grid.packed(read))


def packed_self_attention(
    layer: nn.Module, tokens: Tensor, grid: Grid, shortcuts: Shortcuts, class_only: bool = False
) -> Tensor:
    """The layer up to its cross-attention: ``tokens [n, D]`` of captions that lie as ``grid`` says, ``[n, D]``.

    Args:
        class_only: only for each caption's first token, ``[captions, D]``.
    """
    if class_only:
        return self_attention(layer, grid.spread(tokens), grid.mask, shortcuts, first_only=True)[:, 0]
    block = AttentionBlock.of_bert(layer.attention)
    asked, keys, values = (
        split_heads(grid.spread(projection(tokens)), block.heads)
        for projection in (block.query, block.key, block.value)
    )
    context = context_of(block, asked, keys, values, grid.mask, shortcuts.sdpa).transpose(1, 2).flatten(2)
    output = layer.attention.output
    return output.LayerNorm(output.dropout(block.dense(grid.packed(context))) + tokens)
