"""METER's co-attention stack, poolers and rank head, and the optional joint head. Names follow the official files."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import Features
from lavis_dcd.models.meter.config import FusionConfig, JointHeadConfig
from lavis_dcd.models.pooling import POOLINGS, Pooling, drop_tokens


def fusion_layers(config: FusionConfig) -> nn.ModuleList:
    """``config.layers`` blocks of self-attention, cross-attention and feed-forward (post-norm, as in BERT's decoder).

    BERT's decoder layer has the arithmetic and the key names of METER's ``BertCrossLayer``.
    """
    if config.width % config.heads:
        raise UserError(f"model.fusion: width {config.width} is not a multiple of heads {config.heads}")
    bert = BertConfig(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        intermediate_size=config.width * config.mlp_ratio,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        is_decoder=True,
        add_cross_attention=True,
    )
    return nn.ModuleList(BertLayer(bert) for _ in range(config.layers))


class Pooler(nn.Module):
    """Dense layer and tanh on the first token: ``[B, N, D]`` -> ``[B, D]``."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, N, width]`` -> tanh of a linear map of the first token, ``[B, width]``."""
        return torch.tanh(self.dense(hidden[:, 0]))


class JointHead(nn.Module):
    """Pooled tower tokens through a two-layer projection to unit vectors, and a learned temperature."""

    def __init__(self, image_width: int, text_width: int, config: JointHeadConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.image_pooling = self._pooling(config.image_pooling, image_width, config)
        self.text_pooling = self._pooling(config.text_pooling, text_width, config)
        widths = (
            width if pooling is None else pooling.out_width
            for width, pooling in ((image_width, self.image_pooling), (text_width, self.text_pooling))
        )
        self.image, self.text = (self._projection(width, config) for width in widths)
        self.logit_scale = nn.Parameter(torch.tensor(1.0 / config.temperature).log())

    @staticmethod
    def _pooling(kind: str, width: int, config: JointHeadConfig) -> Pooling | None:
        """Return a module that pools, None for the plain mean."""
        return None if kind == "mean" else POOLINGS[kind](width, config.pooling_heads)

    @staticmethod
    def _projection(width: int, config: JointHeadConfig) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.dim),
        )

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, at most 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=100.0)

    def embed_images(self, features: Features) -> Tensor:
        """``[B, dim]`` unit vectors."""
        return self._embed(features, self.image_pooling, self.image)

    def embed_texts(self, features: Features) -> Tensor:
        """``[B, dim]`` unit vectors."""
        return self._embed(features, self.text_pooling, self.text)

    def _embed(self, features: Features, pooling: Pooling | None, projection: nn.Module) -> Tensor:
        tokens = features.tokens.to(self.logit_scale.dtype)
        pooled = self._mean(tokens, features.mask) if pooling is None else self._pooled(tokens, features, pooling)
        return nnf.normalize(projection(self.dropout(pooled)).float(), dim=-1)

    def _pooled(self, tokens: Tensor, features: Features, pooling: Pooling) -> Tensor:
        mask = features.mask
        if self.training and self.dropout.p:
            mask = drop_tokens(features.full_mask(), self.dropout.p)
        return pooling(tokens, mask)

    def _mean(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        weights = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        # whole tokens and pooled channels are dropped: element-wise dropout over all tokens took a sixth of a CPU step
        kept = self.dropout(weights)
        weights = torch.where(kept.sum(dim=1, keepdim=True) > 0, kept, weights)
        return torch.einsum("bn,bnd->bd", weights, tokens) / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)


def start_from_text(text_layers: nn.ModuleList, image_layers: nn.ModuleList, donors: nn.ModuleList) -> None:
    """Fill both fusion sides from the text tower's last blocks; what is new, the cross-attention, adds zero at first.

    Args:
        text_layers, image_layers: the fusion sides, N blocks each.
        donors: the text tower's blocks; the last N are copied.

    Raises:
        UserError: when there are too few donors or their sizes differ.
    """
    chosen = list(donors)[-len(text_layers) :]
    if len(chosen) < len(text_layers):
        raise UserError(f"model.fusion.init_from_text: {len(donors)} text layers cannot start {len(text_layers)}")
    for side in (text_layers, image_layers):
        for layer, donor in zip(side, chosen, strict=True):
            weights = donor.state_dict()
            expected = layer.state_dict()
            wrong = [k for k, v in weights.items() if k in expected and expected[k].shape != v.shape]
            if wrong:
                raise UserError(
                    "model.fusion.init_from_text: fusion width and mlp_ratio must be the text tower's "
                    f"({wrong[0]} is {tuple(weights[wrong[0]].shape)} there, {tuple(expected[wrong[0]].shape)} here)"
                )
            layer.load_state_dict(weights, strict=False)
            for parameter in layer.get_submodule("crossattention.output.dense").parameters():
                nn.init.zeros_(parameter)


def read_tokens_as_they_are(transform: nn.Linear, token_types: nn.Embedding) -> None:
    """Let the first text layer read the text tower's tokens unchanged: copied layers are worth little on others.

    Args:
        transform: from the text tower's width to the fusion's, which are one.
        token_types: row 0, which is added to a text's tokens, becomes zero.
    """
    nn.init.eye_(transform.weight)
    nn.init.zeros_(transform.bias)
    with torch.no_grad():
        token_types.weight[0].zero_()
