"""METER's co-attention stack over pairs, with what does not depend on the pair computed once per item."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lavis_dcd.matching.attention import (
    AttentionBlock,
    BertLayer,
    Shortcuts,
    bert_layers,
    cross_attention,
    feed_forward,
    keys_values,
    self_attention,
)
from lavis_dcd.matching.features import last_used
from lavis_dcd.matching.recompute import Recomputed


class CoAttentionStep(nn.Module):
    """One layer of both sides for a batch of pairs, as a module so that it can be compiled or recomputed.

    Args:
        text_layer, image_layer: modules, layers with cross-attention.
        class_only: compute the first token of each side only (the last layer).
    """

    def __init__(self, text_layer: BertLayer, image_layer: BertLayer, shortcuts: Shortcuts, class_only: bool) -> None:
        super().__init__()
        self.text_layer, self.image_layer = text_layer, image_layer
        self.shortcuts, self.class_only = shortcuts, class_only

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        mask: Tensor,
        text_own: Tensor | None = None,
        image_own: Tensor | None = None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``text [P, L, D]``, ``image [P, N, D]``, bool ``mask [P, L]`` -> both after the layer.

        Args:
            text_own, image_own: the sides after their self-attention, where that is known.
            keys, values: ``[P, heads, N, d]``, of the picture for the text's cross-attention, where they are known.
        """
        how = self.shortcuts
        if text_own is None:
            text_own = self_attention(self.text_layer, text, mask, how, self.class_only)
        if image_own is None:
            image_own = self_attention(self.image_layer, image, None, how, self.class_only)
        source = image if keys is None or values is None else (keys, values)
        read_image = cross_attention(self.text_layer, text_own, source, None, how)
        read_text = cross_attention(self.image_layer, image_own, text, mask, how)
        return feed_forward(self.text_layer, read_image), feed_forward(self.image_layer, read_text)


class CoAttentionStack:
    """The layers of a METER fusion; no module, for the layers belong to the model.

    Args:
        text_layers, image_layers: one ``BertLayer`` per layer and side.
        grad_checkpoint: recompute each layer in the backward pass instead of keeping its activations.
        compiled: run the layers through ``torch.compile``, for any number of pairs and tokens.
    """

    def __init__(
        self,
        text_layers: Iterable[nn.Module],
        image_layers: Iterable[nn.Module],
        shortcuts: Shortcuts,
        grad_checkpoint: bool = False,
        compiled: bool = False,
    ) -> None:
        self.shortcuts = shortcuts
        sides = list(zip(bert_layers(text_layers), bert_layers(image_layers), strict=True))
        self.layers = [
            CoAttentionStep(text, image, shortcuts, shortcuts.last_layer and number == len(sides) - 1)
            for number, (text, image) in enumerate(sides)
        ]
        steps: list[Any] = [torch.compile(layer, dynamic=True) if compiled else layer for layer in self.layers]
        self.steps = [Recomputed(step) for step in steps] if grad_checkpoint else steps

    def prepare(self, images: Tensor, texts: Tensor, mask: Tensor) -> EncodedItems:
        """Return what is computed once per item of a call, before pictures and texts meet.

        Args:
            images: projected tokens ``[I, N, D]``.
            texts: projected tokens ``[T, L, D]``.
            mask: bool ``[T, L]``.
        """
        if not self.shortcuts.first_layer:
            return EncodedItems(images, texts, mask)
        first, how = self.layers[0], self.shortcuts
        text_own = self_attention(first.text_layer, texts, mask, how, first.class_only)
        image_own = self_attention(first.image_layer, images, None, how, first.class_only)
        keys, values = keys_values(AttentionBlock.of_bert(first.text_layer.crossattention), images)
        return EncodedItems(images, texts, mask, text_own, image_own, keys, values)

    def run(self, items: EncodedItems, image_rows: Tensor, text_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return text and image tokens after the stack, ``[P, L, D]`` and ``[P, N, D]``, the class token first.

        Texts are trimmed to the longest of the pairs; with ``last_layer`` the class tokens alone are left.

        Args:
            image_rows, text_rows: int64 ``[P]``, each pair's rows of ``items``.
        """
        paired = items.of_pairs(image_rows, text_rows)
        text, image, mask = paired.texts, paired.images, paired.mask
        known: tuple[Tensor | None, ...] = (paired.text_own, paired.image_own, paired.keys, paired.values)
        for step in self.steps:
            text, image = step(text, image, mask, *known)
            known = ()
        return text, image


@dataclass
class EncodedItems:
    """Tokens of pictures and texts as they enter the first layer, one row per item or, of pairs, per pair.

    Args:
        images: ``[I, N, D]``.
        texts: ``[T, L, D]``, with a bool ``mask [T, L]``.
        text_own, image_own, keys, values: as :class:`CoAttentionStep` takes them, where they are known.
    """

    images: Tensor
    texts: Tensor
    mask: Tensor
    text_own: Tensor | None = None
    image_own: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    def of_pairs(self, image_rows: Tensor, text_rows: Tensor) -> EncodedItems:
        """Return one row per pair, texts trimmed to the longest of them; rows are int64 ``[P]``."""
        mask = self.mask[text_rows]
        longest = last_used(mask)
        return EncodedItems(
            _rows(self.images, image_rows),
            _rows(self.texts[:, :longest], text_rows),
            mask[:, :longest],
            None if self.text_own is None else _rows(self.text_own[:, :longest], text_rows),
            *(None if t is None else _rows(t, image_rows) for t in (self.image_own, self.keys, self.values)),
        )


def _rows(t: Tensor, rows: Tensor) -> Tensor:
    if len(rows) > 1 and bool((rows == rows[0]).all()):
        return t[int(rows[0])].expand(len(rows), *t.shape[1:])  # no copies where all pairs have one item
    # index_select, not indexing: its gradient is an index_add, many times faster on a CPU
    return t.index_select(0, rows)
