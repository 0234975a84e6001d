"""From a tower's tokens to one vector of a joint space: pooling over the real tokens, then a projection."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.matching.features import Features
from lavis_dcd.models.dual_encoder.config import HeadConfig
from lavis_dcd.models.pooling import POOLINGS, drop_tokens


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
