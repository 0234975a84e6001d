"""Matching with gradients in bounded memory: chunks of pairs whose activations are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lavis_dcd.matching.features import ImageFeatures, TextFeatures

MatchFunction = Callable[[ImageFeatures, TextFeatures, Tensor], Tensor]


def match_recomputed(
    match: MatchFunction, images: ImageFeatures, texts: TextFeatures, pairs: Tensor, chunk_pairs: int | None
) -> Tensor:
    """``match(images, texts, pairs)``, scores ``[P]``, the same values and gradients in a chunk's memory.

    Dropout is replayed in the recomputation, so with it the gradient is that of the forward pass; its random
    stream differs from an unchunked pass.

    Args:
        match: scores of pairs, a matcher's ``match`` or a part of it.
        chunk_pairs: pairs per chunk; ``None`` matches all at once, without recomputation.
    """
    if chunk_pairs is None or len(pairs) <= chunk_pairs or not torch.is_grad_enabled():
        return match(images, texts, pairs)
    chunks = torch.split(pairs, chunk_pairs)
    return torch.cat([checkpoint(match, images, texts, chunk, use_reentrant=False) for chunk in chunks])
