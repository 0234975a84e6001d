"""From a tower's tokens to one vector of a joint space: pooling over the real tokens, then a projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.matching.features import Features
from lavis_dcd.models.dual_encoder.config import HeadConfig

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


class EmbeddingHead(nn.Module):
    """One tower's tokens to unit vectors of the joint space.

    Pooling, then LayerNorm, dropout, Linear, GELU, dropout, Linear; with ``hidden: 0`` dropout and one linear map
    without bias, as CLIP's.

    Args:
        width: channels of the tower's tokens.
        kind: a name of ``POOLINGS``.
        config: sizes and dropout rates.
    """

    def __init__(self, width: int, kind: str, config: HeadConfig):
        super().__init__()
        self.token_dropout = config.token_dropout
        self.pooling = POOLINGS[kind](width, config.pooling_heads)
        pooled = self.pooling.out_width
        if config.hidden == 0:
            layers: list[nn.Module] = [nn.Dropout(config.dropout), nn.Linear(pooled, config.dim, bias=False)]
        else:
            layers = [
                nn.LayerNorm(pooled),
                nn.Dropout(config.dropout),
                nn.Linear(pooled, config.hidden),
                nn.GELU(),
                nn.Dropout(config.hidden_dropout),
                nn.Linear(config.hidden, config.dim),
            ]
        self.projection = nn.Sequential(*layers)

    def forward(self, features: Features) -> Tensor:
        """Features of B items -> float32 ``[B, dim]``, each of length 1."""
        tokens = features.tokens.to(next(self.projection[-1].parameters()).dtype)
        mask = features.mask
        if self.training and self.token_dropout:
            mask = drop_tokens(features.full_mask(), self.token_dropout)
        return nnf.normalize(self.projection(self.pooling(tokens, mask)).float(), dim=-1)


def drop_tokens(mask: Tensor, rate: float) -> Tensor:
    """Return ``mask [B, N]`` with real tokens left out at random; a row that would lose all of them keeps all."""
    left = mask & (torch.rand(mask.shape, device=mask.device) > rate)
    return torch.where(left.any(dim=1, keepdim=True), left, mask)
