"""A layer whose activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_dcd.matching.gather import Ranks


class Recomputed(nn.Module):
    """``step`` under fairscale's ``checkpoint_wrapper``: the same values and gradients, dropout replayed.

    Without gradients the step runs as it is. fairscale 0.4.4 knows of ``torch.cuda.amp`` only, so the autocast of the
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
        if not Ranks.here().alone:
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
