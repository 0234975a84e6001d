"""BERT layers that read pictures, over many pairs at once: every token computed once, padding never.

The captions' real tokens of all pairs lie in one row, ``[tokens, D]``, so that a linear layer pays for no padding. They
are spread out for attention alone: by pair where a caption attends to itself, by picture where it reads the picture.
So a picture's keys and values serve all of its pairs without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lavis_dcd.matching.attention import (
    AttentionBlock,
    BertLayer,
    Shortcuts,
    add_residual,
    context_of,
    cross_attention,
    feed_forward,
    self_attention,
    split_heads,
)
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.recompute import Recomputed

MATCH_CHUNK = 256  # pairs matched together where memory would allow more


class FusionOptions(Protocol):
    """The options of an adapter that :class:`PackedMatch` reads."""

    @property
    def grad_checkpoint(self) -> bool:
        """Return whether training recomputes the fusing layers."""

    @property
    def match_memory_mb(self) -> float:
        """Activations of one chunk without gradients, MiB."""


class FusionAdapter(Protocol):
    """An adapter whose text encoder looks at pictures by cross-attention, as :class:`PackedMatch` reads it."""

    shortcuts: Shortcuts

    @property
    def model(self) -> Any:
        """LAVIS's own model, which declares no types: ``text_encoder`` and ``itm_head`` are used."""

    @property
    def options(self) -> FusionOptions:
        """The adapter's options."""

    def fusion_layers(self) -> list[BertLayer]:
        """Return the layers that have cross-attention, in order."""

    def head_scores(
        self, classes: Tensor, images: ImageFeatures, texts: TextFeatures, image: Tensor, text: Tensor
    ) -> Tensor:
        """Return float32 scores ``[p]`` of pairs of rows ``[p]`` by their last class tokens ``[p, D]``."""


@dataclass(frozen=True)
class PaddedGrid:
    """The places of a packed tensor's rows in a padded one, ``[rows, columns]``.

    Args:
        slots: int64 ``[n]``, ascending: row times columns plus column.
    """

    slots: Tensor
    rows: int
    columns: int

    @classmethod
    def of_counts(cls, counts: Tensor) -> PaddedGrid:
        """Return the grid of R rows of int64 ``counts [R]`` entries each, one after the other in the packed tensor."""
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        columns = torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]
        widest = int(counts.max())
        return cls(rows * widest + columns, len(counts), widest)

    @property
    def full(self) -> bool:
        """Return whether there is no padding."""
        return len(self.slots) == self.rows * self.columns

    @property
    def mask(self) -> Tensor | None:
        """bool ``[rows, columns]``, True where there is an entry; ``None``: everywhere."""
        if self.full:
            return None
        empty = torch.zeros(self.rows * self.columns, dtype=torch.bool, device=self.slots.device)
        return empty.index_fill(0, self.slots, True).view(self.rows, self.columns)

    def spread(self, packed: Tensor) -> Tensor:
        """Return ``packed [n, D]`` as ``[rows, columns, D]``, zeros elsewhere."""
        if not self.full:
            empty = packed.new_zeros((self.rows * self.columns, packed.shape[1]))
            packed = empty.index_copy(0, self.slots, packed)
        return packed.view(self.rows, self.columns, -1)

    def packed(self, padded: Tensor) -> Tensor:
        """Return ``padded [rows, columns, D]`` as ``[n, D]``: the inverse of :meth:`spread`."""
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
        """Return the rows ``texts``, int64 ``[T]``, of ``tokens [B, L, D]`` with what bool ``mask [B, L]`` leaves.

        Each of them needs a real token.
        """
        mask = mask[texts]
        lengths = mask.sum(dim=1)
        row, column = mask.nonzero().unbind(dim=1)
        real = texts[row] * tokens.shape[1] + column
        return cls(tokens.flatten(0, 1).index_select(0, real), lengths.cumsum(0) - lengths, lengths)

    def split(self, texts: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return tokens ``[n, D]`` and lengths ``[t]`` of ``texts`` texts at a time."""
        lengths = torch.split(self.lengths, texts)
        return zip(torch.split(self.tokens, [int(counts.sum()) for counts in lengths]), lengths, strict=True)

    def rows(self, texts: Tensor) -> Tensor:
        """Return the rows of ``tokens``, int64, that ``texts``, int64 ``[P]``, take, one text after the other."""
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

    pairs: PaddedGrid
    pictures: PaddedGrid
    heads: PaddedGrid
    first: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, images: Tensor, lengths: Tensor, shared: bool) -> PairLayout:
        """Return the layout of pairs with picture rows and caption lengths, int64 ``[P]`` each.

        Unless ``shared``, each pair has a picture to itself.
        """
        if shared:
            chosen, pairs = torch.unique_consecutive(images, return_counts=True)
        else:
            chosen, pairs = images, torch.ones_like(images)
        owner = torch.arange(len(chosen), device=images.device).repeat_interleave(pairs)
        tokens = torch.zeros_like(pairs).index_add(0, owner, lengths)
        first = lengths.cumsum(0) - lengths
        return cls(
            PaddedGrid.of_counts(lengths), PaddedGrid.of_counts(tokens), PaddedGrid.of_counts(pairs), first, chosen
        )


class FusionStep(nn.Module):
    """One layer for the tokens of many pairs, as a module so that it can be recomputed.

    Args:
        layer: a module, a ``BertLayer`` of LAVIS's ``med.py`` with cross-attention.
        class_only: compute each pair's class token only (the last layer).
        attended: the tokens come from the layer's self-attention already.
    """

    def __init__(self, layer: BertLayer, shortcuts: Shortcuts, class_only: bool, attended: bool) -> None:
        super().__init__()
        self.layer, self.shortcuts = layer, shortcuts
        self.class_only, self.attended = class_only, attended

    def forward(self, tokens: Tensor, images: Tensor, image_mask: Tensor | None, layout: PairLayout) -> Tensor:
        """Return the tokens after the layer, ``[n, D]``, or ``[P, D]`` with ``class_only``.

        Args:
            tokens: ``[n, D]``, of the pairs' captions.
            images: ``[I, N, Dv]``, of the pictures that ``layout`` has chosen.
            image_mask: bool ``[I, N]``; ``None``: every token is real.
        """
        grid = layout.heads if self.class_only else layout.pictures
        if not self.attended:
            tokens = packed_self_attention(self.layer, tokens, layout.pairs, self.shortcuts, self.class_only)
        elif self.class_only:
            tokens = tokens.index_select(0, layout.first)
        read = cross_attention(self.layer, grid.spread(tokens), images, image_mask, self.shortcuts)
        return feed_forward(self.layer, grid.packed(read))


def packed_self_attention(
    layer: BertLayer, tokens: Tensor, grid: PaddedGrid, shortcuts: Shortcuts, class_only: bool = False
) -> Tensor:
    """Return ``tokens [n, D]`` after the layer's self-attention, ``[n, D]``.

    Args:
        tokens: of captions that lie as ``grid`` says, one row per caption.
        class_only: only for each caption's first token, ``[captions, D]``.
    """
    if class_only:
        return self_attention(layer, grid.spread(tokens), grid.mask, shortcuts, first_only=True)[:, 0]
    block = AttentionBlock.of_bert(layer.attention)
    queries, keys, values = (
        split_heads(grid.spread(projection(tokens)), block.heads)
        for projection in (block.query, block.key, block.value)
    )
    context = context_of(block, queries, keys, values, grid.mask, shortcuts.sdpa).transpose(1, 2).flatten(2)
    return add_residual(layer.attention, block.dense(grid.packed(context)), tokens)


@dataclass(frozen=True)
class ChunkSizes:
    """Sizes of a chunk of pairs, from which its memory follows.

    Args:
        pairs, pictures: how many.
        tokens: of all captions together, without padding.
        longest: tokens of the longest caption.
        most_tokens, fewest_tokens: caption tokens of one picture, of all its pairs together: the largest and the
            smallest sum among the pictures. A layer pads every picture to the largest.
    """

    pairs: int
    pictures: int
    tokens: int
    longest: int
    most_tokens: int
    fewest_tokens: int

    @classmethod
    def of_pair(cls, length: int) -> ChunkSizes:
        """Return the sizes of one pair whose caption has ``length`` tokens."""
        return cls(1, 1, length, length, length, length)

    def with_pair(self, length: int) -> ChunkSizes:
        """Return the sizes with one more pair of the only picture."""
        tokens = self.tokens + length
        return ChunkSizes(self.pairs + 1, self.pictures, tokens, max(self.longest, length), tokens, tokens)

    def joined(self, other: ChunkSizes) -> ChunkSizes:
        """Return the sizes together with another picture's pairs."""
        return ChunkSizes(
            self.pairs + other.pairs,
            self.pictures + other.pictures,
            self.tokens + other.tokens,
            max(self.longest, other.longest),
            max(self.most_tokens, other.most_tokens),
            min(self.fewest_tokens, other.fewest_tokens),
        )


Fits: TypeAlias = Callable[[ChunkSizes], bool]
_Chunk: TypeAlias = tuple[list[int], ChunkSizes]  # rows of pairs


def plan_chunks(pictures: list[int], lengths: list[int], fits: Fits) -> Iterator[list[int]]:
    """Return rows of pairs, chunk by chunk, those of one picture next to each other.

    A picture's pairs stay in one chunk where they fit. Pictures are padded to the one with most tokens, so those of
    a chunk differ by a factor of two at most.

    Args:
        pictures: of each pair.
        lengths: tokens of each pair's caption.
        fits: whether a chunk may be so large; a single pair always may.
    """
    by_picture: dict[int, list[int]] = {}
    for row, picture in enumerate(pictures):
        by_picture.setdefault(picture, []).append(row)
    chunks = [chunk for rows in by_picture.values() for chunk in _of_one_picture(rows, lengths, fits)]
    chunks.sort(key=lambda chunk: -chunk[1].tokens)
    return (rows for rows, _ in _joined_neighbours(chunks, pictures, fits))


def _of_one_picture(rows: list[int], lengths: list[int], fits: Fits) -> Iterator[_Chunk]:
    """Yield one picture's pairs, at least one, in as few chunks as fit."""
    taken, sizes = [rows[0]], ChunkSizes.of_pair(lengths[rows[0]])
    for row in rows[1:]:
        larger = sizes.with_pair(lengths[row])
        if fits(larger):
            taken, sizes = [*taken, row], larger
        else:
            yield taken, sizes
            taken, sizes = [row], ChunkSizes.of_pair(lengths[row])
    yield taken, sizes


def _joined_neighbours(chunks: list[_Chunk], pictures: list[int], fits: Fits) -> Iterator[_Chunk]:
    """Yield neighbouring chunks joined while they fit and their pictures have alike numbers of tokens.

    Two chunks of one picture stay apart: side by side they would be padded as one, larger than either.
    """
    if not chunks:
        return
    taken, sizes = chunks[0]
    for rows, added in chunks[1:]:
        larger = sizes.joined(added)
        apart = pictures[taken[-1]] != pictures[rows[0]]
        if apart and fits(larger) and larger.most_tokens <= 2 * larger.fewest_tokens:
            taken, sizes = [*taken, *rows], larger
        else:
            yield taken, sizes
            taken, sizes = rows, added
    yield taken, sizes


class PackedMatch:
    """One call of an ALBEF or BLIP adapter's ``match``: its items, and the layers as its ``shortcuts`` run them.

    Args:
        adapter: the model with its layers, head and options.
        images: tokens ``[I, N, Dv]``.
        texts: tokens ``[T, L, D]``, each with a class token first.
    """

    def __init__(self, adapter: FusionAdapter, images: ImageFeatures, texts: TextFeatures) -> None:
        self.adapter, self.images, self.texts = adapter, images, texts
        self.shortcuts = adapter.shortcuts
        self.dtype: torch.dtype = adapter.model.itm_head.weight.dtype
        self.image_mask = None if images.mask is None or bool(images.mask.all()) else images.mask
        self.layers = adapter.fusion_layers()
        last = len(self.layers) - 1
        self.steps: list[nn.Module] = [
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
        """Return float32 scores ``[P]`` of ``pairs``, int64 ``[P, 2]``, at least one."""
        used, local = torch.unique(pairs[:, 1], return_inverse=True)
        captions = self._captions(used)
        lengths = captions.lengths.index_select(0, local).tolist()
        pictures = pairs[:, 0].tolist() if self.shortcuts.first_layer else list(range(len(pairs)))
        order, scores = [], []
        for rows in plan_chunks(pictures, lengths, self._fits):
            chosen = torch.as_tensor(rows, device=pairs.device)
            image, text = pairs[chosen].unbind(dim=1)
            classes = self._classes(captions, image, local[chosen])
            order.append(chosen)
            scores.append(self.adapter.head_scores(classes, self.images, self.texts, image, text))
        return torch.cat(scores)[torch.cat(order).argsort()]

    def _captions(self, used: Tensor) -> Captions:
        """Return the texts that pairs use, after the first layer's self-attention where that is taken per text."""
        captions = Captions.of(self.texts.tokens, self.texts.full_mask(), used)
        captions = replace(captions, tokens=captions.tokens.to(self.dtype))
        if not self.shortcuts.first_layer:
            return captions
        attended = [
            packed_self_attention(self.layers[0], tokens, PaddedGrid.of_counts(counts), self.shortcuts)
            for tokens, counts in captions.split(MATCH_CHUNK)
        ]
        return replace(captions, tokens=torch.cat(attended))

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
        """Return the activations of a chunk without gradients, by the tensors that live together in a layer."""
        config = self.adapter.model.text_encoder.config
        width, heads, image_tokens = config.hidden_size, config.num_attention_heads, self.images.tokens.shape[1]
        # throughout: the pictures' tokens, and the captions' as they came and as they entered the layer
        throughout = sizes.pictures * image_tokens * config.encoder_width + 2 * sizes.tokens * width
        padded = sizes.pairs * sizes.longest
        attention = 3 * sizes.tokens * width + 5 * padded * width
        if not self.shortcuts.sdpa:
            attention += 3 * heads * padded * sizes.longest
        queries = sizes.pictures * sizes.most_tokens
        reading = sizes.pictures * 2 * image_tokens * width + 5 * queries * width
        if not self.shortcuts.sdpa or heads * sizes.most_tokens < config.encoder_width:
            reading += 3 * heads * queries * image_tokens
        forward = sizes.tokens * (3 * width + 2 * config.intermediate_size)
        numbers: int = throughout + max(attention, reading, forward)
        return numbers * self.dtype.itemsize
