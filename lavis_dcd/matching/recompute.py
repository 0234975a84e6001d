"""Activations that are computed again in the backward pass instead of being kept: of a layer, of a chunk of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_dcd.common.processes import ProcessGroup
from lavis_dcd.matching.features import ImageFeatures, TextFeatures

MatchFunction: TypeAlias = Callable[[ImageFeatures, TextFeatures, Tensor], Tensor]


class Recomputed(nn.Module):
    """``step`` under fairscale's ``checkpoint_wrapper``: the same values and gradients, dropout replayed.

    Without gradients the step runs as it is. fairscale 0.4.4 restores ``torch.cuda.amp`` only, so the autocast of the
    forward pass, of any device and type, is entered again in the recomputation.

    Under torchrun it is torch's own ``checkpoint``: fairscale's runs a backward pass of its own for each call, and
    DistributedDataParallel takes a weight's gradient for finished after the first of them.

    Args:
        step: a module of tensors in and tensors out; other arguments must not need gradients.
    """

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.plain = step
        self.step = checkpoint_wrapper(_UnderAutocast(step))

    def forward(self, first: Tensor, *rest: Any) -> Any:
        """Return what ``step`` makes of the arguments."""
        if not ProcessGroup.here().alone:
            return checkpoint(self.plain, first, *rest, use_reentrant=False)
        device = first.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return self.step((device, dtype, enabled), first, *rest)


class _UnderAutocast(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, autocast: tuple[str, torch.dtype, bool], *arguments: Any) -> Any:
        device, dtype, enabled = autocast
        # without the cache: it would hand weights cast in the forward pass, where nothing records gradients, to the
        # recomputation
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self.step(*arguments)


def match_recomputed(
    match: MatchFunction, images: ImageFeatures, texts: TextFeatures, pairs: Tensor, chunk_pairs: int | None
) -> Tensor:
    """Return ``match(images, texts, pairs)``, scores ``[P]``: the same values and gradients in a chunk's memory.

    Dropout is replayed in the recomputation, so with it the gradient is that of the forward pass; its random
    stream differs from an unchunked pass.

    Args:
        match: scores of pairs, a matcher's ``match`` or one of its terms.
        pairs: int64 ``[P, 2]``, each an (image row, text row).
        chunk_pairs: pairs per chunk; ``None`` matches all at once, without recomputation.
    """
    if chunk_pairs is None or len(pairs) <= chunk_pairs or not torch.is_grad_enabled():
        return match(images, texts, pairs)
    chunks = torch.split(pairs, chunk_pairs)
    return torch.cat([checkpoint(match, images, texts, chunk, use_reentrant=False) for chunk in chunks])


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Return the elements of every ``ModuleList`` or ``Sequential`` in ``module`` that has several, all of one class.

    In the order of their names, which in a stack is that in which they run; a layer's own stacks are part of it.
    """
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and len({type(m) for m in module}) == 1:
        return list(module)
    return [layer for child in module.children() for layer in repeated_layers(child)]
