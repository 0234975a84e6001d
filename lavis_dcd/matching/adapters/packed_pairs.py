"""BERT layers that read pictures, over many pairs at once: every token computed once, padding never.

The captions' real tokens of all pairs lie in one row, ``[tokens, D]``, so that a linear layer pays for no padding. They
are spread out for attention alone: by pair where a caption attends to itself, by picture where it reads the picture.
So a picture's keys and values serve all of its pairs without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lavis_dcd.matching.attention import (
    AttentionBlock,
    Shortcuts,
    context_of,
    cross_attention,
    feed_forward,
    self_attention,
    split_heads,
)
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.recompute import Recomputed


class FusionAdapter(Protocol):
    """An adapter whose text encoder looks at pictures by cross-attention, as :class:`PackedMatch` reads it."""

    model: nn.Module  # LAVIS's own, with `text_encoder` and `itm_head`
    shortcuts: Shortcuts
    options: Any  # with `grad_checkpoint` and `match_memory_mb`

    def fusion_layers(self) -> list[nn.Module]:
        """Return the layers that have cross-attention, in order."""

    def head_scores(
        self, classes: Tensor, images: ImageFeatures, texts: TextFeatures, image: Tensor, text: Tensor
    ) -> Tensor:
        """Return the logits ``[P]`` of pairs from their last class tokens ``[P, D]``."""


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


# ----------------------------------------------------------------------------------------------------
# Pairs put into chunks: those of one picture together, pictures with alike numbers of tokens together.


@dataclass(frozen=True)
class ChunkSizes:
    """What a chunk of pairs costs by.

    Args:
        pairs, pictures: how many.
        tokens: of all captions, without padding.
        longest: tokens of the longest caption.
        most: tokens of the captions of the picture with most; ``least``: with fewest.
    """

    pairs: int
    pictures: int
    tokens: int
    longest: int
    most: int
    least: int

    @classmethod
    def of_pair(cls, length: int) -> ChunkSizes:
        return cls(1, 1, length, length, length, length)

    def with_pair(self, length: int) -> ChunkSizes:
        """One more pair of the only picture."""
        tokens = self.tokens + length
        return replace(
            self, pairs=self.pairs + 1, tokens=tokens, longest=max(self.longest, length), most=tokens, least=tokens
        )

    def joined(self, other: ChunkSizes) -> ChunkSizes:
        """Together with another picture's pairs."""
        return ChunkSizes(
            self.pairs + other.pairs,
            self.pictures + other.pictures,
            self.tokens + other.tokens,
            max(self.longest, other.longest),
            max(self.most, other.most),
            min(self.least, other.least),
        )


Fits = Callable[[ChunkSizes], bool]
_Part = tuple[list[int], ChunkSizes]


def plan_chunks(pictures: list[int], lengths: list[int], fits: Fits) -> Iterator[list[int]]:
    """Rows of pairs, chunk by chunk, those of one picture next to each other.

    A picture's pairs stay in one chunk where they fit. Pictures are padded to the one with most tokens, so those of
    a chunk differ by a factor of two at most.

    Args:
        pictures: of each pair.
        lengths: tokens of each pair's caption.
        fits: whether a chunk may be so large; a single pair always may.
    """
    groups: dict[int, list[int]] = {}
    for row, picture in enumerate(pictures):
        groups.setdefault(picture, []).append(row)
    parts = [part for rows in groups.values() for part in _parts(rows, lengths, fits)]
    parts.sort(key=lambda part: -part[1].tokens)
    return (rows for rows, _ in _merged(parts, fits))


def _parts(rows: Iterable[int], lengths: list[int], fits: Fits) -> Iterator[_Part]:
    """One picture's pairs in as few parts as fit."""
    taken: list[int] = []
    sizes = None
    for row in rows:
        larger = ChunkSizes.of_pair(lengths[row]) if sizes is None else sizes.with_pair(lengths[row])
        if taken and not fits(larger):
            yield taken, sizes
            taken, larger = [], ChunkSizes.of_pair(lengths[row])
        taken.append(row)
        sizes = larger
    if taken:
        yield taken, sizes


def _merged(parts: list[_Part], fits: Fits) -> Iterator[_Part]:
    """Neighbours joined while they fit and are alike."""
    taken: list[int] = []
    sizes = None
    for rows, own in parts:
        larger = own if sizes is None else sizes.joined(own)
        if taken and (not fits(larger) or larger.most > 2 * larger.least):
            yield taken, sizes
            taken, larger = [], own
        taken = [*taken, *rows]
        sizes = larger
    if taken:
        yield taken, sizes


# ----------------------------------------------------------------------------------------------------
# Scores of pairs by a BERT that reads pictures, without computing anything twice.

MATCH_CHUNK = 256  # pairs matched together where memory would allow more


class PackedMatch:
    """One call of an ALBEF or BLIP adapter's ``match``: its items, and the layers as its ``shortcuts`` run them.

    Args:
        adapter: whose ``fusion_layers``, ``head_scores``, ``shortcuts`` and ``options`` are used.
        images: tokens ``[I, N, Dv]``.
        texts: tokens ``[T, L, D]``, each with a class token first.
    """

    def __init__(self, adapter: FusionAdapter, images: ImageFeatures, texts: TextFeatures) -> None:
        self.adapter, self.images, self.texts = adapter, images, texts
        self.shortcuts, self.dtype = adapter.shortcuts, adapter.model.itm_head.weight.dtype
        self.image_mask = None if images.mask is None or bool(images.mask.all()) else images.mask
        self.layers = adapter.fusion_layers()
        last = len(self.layers) - 1
        self.steps = [
            FusionStep(
                layer,
                self.shortcuts,
                class_only=self.shortcuts.last_layer and number == last,
                attended=self.shortcuts.first_layer and number == 0,
            )
            for number, layer in enumerate(self.layers)
        ]
        if adapter.options.grad_checkpoint:
            self.steps = [Recomputed(step) for step in self.steps]

    def scores(self, pairs: Tensor) -> Tensor:
        """``[P]`` of ``pairs [P, 2]``, at least one."""
        used, local = pairs[:, 1].unique(return_inverse=True)
        captions = self._captions(used)
        lengths = captions.lengths.index_select(0, local).tolist()
        pictures = pairs[:, 0].tolist() if self.shortcuts.first_layer else list(range(len(pairs)))
        order, parts = [], []
        for rows in plan_chunks(pictures, lengths, self._fits):
            chosen = torch.as_tensor(rows, device=pairs.device)
            image, text = pairs[chosen].unbind(dim=1)
            classes = self._classes(captions, image, local[chosen])
            order.append(chosen)
            parts.append(self.adapter.head_scores(classes, self.images, self.texts, image, text))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _captions(self, used: Tensor) -> Captions:
        """The texts that pairs use, after the first layer's self-attention where that is taken per text."""
        captions = Captions.of(self.texts.tokens, self.texts.full_mask(), used)
        captions = replace(captions, tokens=captions.tokens.to(self.dtype))
        if not self.shortcuts.first_layer:
            return captions
        parts = [
            packed_self_attention(self.layers[0], tokens, Grid.of_counts(counts), self.shortcuts)
            for tokens, counts in captions.split(MATCH_CHUNK)
        ]
        return replace(captions, tokens=torch.cat(parts))

    def _classes(self, captions: Captions, image: Tensor, text: Tensor) -> Tensor:
        """Class tokens ``[p, D]`` after the last layer of pairs of rows ``[p]``, those of a picture together."""
        layout = PairLayout.of(image, captions.lengths[text], self.shortcuts.first_layer)
        tokens = captions.tokens.index_select(0, captions.rows(text))
        pictures = self.images.tokens.index_select(0, layout.chosen).to(self.dtype)
        mask = None if self.image_mask is None else self.image_mask[layout.chosen]
        for step in self.steps:
            tokens = step(tokens, pictures, mask, layout)
        return tokens if self.shortcuts.last_layer else tokens.index_select(0, layout.first)

    def _fits(self, sizes: ChunkSizes) -> bool:
        if sizes.pairs > MATCH_CHUNK:
            return False
        return self.chunk_bytes(sizes) <= self.adapter.options.match_memory_mb * 2**20

    def chunk_bytes(self, sizes: ChunkSizes) -> int:
        """Activations of a chunk without gradients, by the tensors that live together in a layer."""
        config = self.adapter.model.text_encoder.config
        width, heads, image_tokens = config.hidden_size, config.num_attention_heads, self.images.tokens.shape[1]
        # what stays: the pictures' tokens, and the captions' as they came and as they entered the layer
        kept = sizes.pictures * image_tokens * config.encoder_width + 2 * sizes.tokens * width
        padded = sizes.pairs * sizes.longest
        own = 3 * sizes.tokens * width + 5 * padded * width
        if not self.shortcuts.sdpa:
            own += 3 * heads * padded * sizes.longest
        grid = sizes.pictures * sizes.most
        read = sizes.pictures * 2 * image_tokens * width + 5 * grid * width
        if not self.shortcuts.sdpa or heads * sizes.most < config.encoder_width:
            read += 3 * heads * grid * image_tokens
        forward = sizes.tokens * (3 * width + 2 * config.intermediate_size)
        return self.adapter.model.itm_head.weight.element_size() * (kept + max(own, read, forward))
