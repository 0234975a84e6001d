"""From a tower's tokens to one vector: pooling over the real tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

PoolingName = Literal["mean", "cls", "attention", "mean_max", "attention_mean"]  # the keys of POOLINGS

_ATTENTION_WIDTH = 128


class Pooling(nn.Module):
    """Tokens of a tower to one vector each of ``out_width`` channels."""

    out_width: int


class MeanPooling(Pooling):
    """The mean of the real tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.out_width = width

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, N, D]``, bool ``[B, N]`` or ``None`` -> ``[B, D]``."""
        if mask is None:
            return tokens.mean(dim=1)
        # one product: multiplying the tokens by the mask would copy all of them, forward and backward
        weights = mask.to(tokens.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.bmm(weights[:, None], tokens)[:, 0]


class FirstPooling(Pooling):
    """The first token, where an encoder keeps its class token."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.out_width = width

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, N, D]``, bool ``[B, N]`` or ``None`` -> ``[B, D]``."""
        return tokens[:, 0]


class AttentionPooling(Pooling):
    """``heads`` weighted means, each with learned weights over the real tokens, side by side.

    The weights are a softmax over the tokens of Linear(D -> 128), tanh, Linear(128 -> heads), as in Lin et al.,
    "A structured self-attentive sentence embedding" (2017), equation 6.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.out_width = heads * width
        self.score = nn.Sequential(nn.Linear(width, _ATTENTION_WIDTH), nn.Tanh(), nn.Linear(_ATTENTION_WIDTH, heads))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, N, D]``, bool ``[B, N]`` or ``None`` -> ``[B, heads * D]``."""
        scores = self.score(tokens).float()
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=1).to(tokens.dtype)
        return torch.bmm(weights.transpose(1, 2), tokens).flatten(1)


class MeanMaxPooling(Pooling):
    """The mean of the real tokens and, beside it, each channel's maximum over them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.mean = MeanPooling(width, heads)
        self.out_width = 2 * width

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, N, D]``, bool ``[B, N]`` or ``None`` -> ``[B, 2 D]``."""
        real = tokens
        if mask is not None:
            real = tokens.masked_fill(~mask[..., None], torch.finfo(tokens.dtype).min)
        return torch.cat([self.mean(tokens, mask), real.amax(dim=1)], dim=-1)


class AttentionMeanPooling(Pooling):
    """The mean of the real tokens and, beside it, the heads of :class:`AttentionPooling`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.mean = MeanPooling(width, heads)
        self.attention = AttentionPooling(width, heads)
        self.out_width = self.mean.out_width + self.attention.out_width

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, N, D]``, bool ``[B, N]`` or ``None`` -> ``[B, (1 + heads) * D]``."""
        return torch.cat([self.mean(tokens, mask), self.attention(tokens, mask)], dim=-1)


POOLINGS: dict[str, Callable[[int, int], Pooling]] = {
    "mean": MeanPooling,
    "cls": FirstPooling,
    "attention": AttentionPooling,
    "mean_max": MeanMaxPooling,
    "attention_mean": AttentionMeanPooling,
}


def drop_tokens(mask: Tensor, rate: float) -> Tensor:
    """Return ``mask [B, N]`` with real tokens left out at random; a row that would lose all of them keeps all."""
    left = mask & (torch.rand(mask.shape, device=mask.device) > rate)
    return torch.where(left.any(dim=1, keepdim=True), left, mask)
