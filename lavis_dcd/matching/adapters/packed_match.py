"""Scores of pairs by a BERT that reads pictures, without computing anything twice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lavis_dcd.matching.adapters.packed_fusion import Captions, FusionStep, Grid, PairLayout, packed_self_attention
from lavis_dcd.matching.adapters.pair_plan import ChunkSizes, plan_chunks
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.recompute import Recomputed

if TYPE_CHECKING:
    from lavis_dcd.matching.adapters.cross_attention import CrossAttentionAdapter

MATCH_CHUNK = 256  # pairs matched together where memory would allow more


class PackedMatch:
    """One call of an ALBEF or BLIP adapter's ``match``: its items, and the layers as its ``shortcuts`` run them.

    Args:
        adapter: whose ``fusion_layers``, ``head_scores``, ``shortcuts`` and ``options`` are used.
        images: tokens ``[I, N, Dv]``.
        texts: tokens ``[T, L, D]``, each with a class token first.
    """

    def __init__(self, adapter: CrossAttentionAdapter, images: ImageFeatures, texts: TextFeatures) -> None:
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
