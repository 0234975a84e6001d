"""A BLIP-2 of another size than LAVIS's, from LAVIS's own parts, without the network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lavis_dcd.common.errors import UserError


@dataclass
class TransformerSizes:
    """Of the ViT and of the Q-Former."""

    width: int
    layers: int
    heads: int


@dataclass
class Blip2Sizes:
    """A BLIP-2 of another size than LAVIS's, whose parts start at random: ``model.sizes``.

    Args:
        vision: LAVIS's EVA ViT.
        qformer: every ``cross_attention_freq``-th of its layers, from the first, attends to the picture.
        num_query_token: queries per picture.
        embed_dim: width of the joint space.
        max_txt_len: a text's tokens.
    """

    image_size: int
    patch_size: int
    vision: TransformerSizes
    qformer: TransformerSizes
    num_query_token: int = 32
    cross_attention_freq: int = 2
    embed_dim: int = 256
    max_txt_len: int = 32


def assemble(model_class: type[nn.Module], sizes: Blip2Sizes, tokenizer: Any) -> nn.Module:
    """A BLIP-2 of LAVIS's own parts in small, weights at random; LAVIS's constructor knows large ones alone.

    Args:
        model_class: ``Blip2ITM`` or ``Blip2Qformer``.
        tokenizer: with LAVIS's further tokens (``model_class.init_tokenizer()``).

    Raises:
        UserError: sizes that cannot work.
    """
    from lavis.models.blip2_models.blip2 import LayerNorm
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
    from lavis.models.eva_vit import VisionTransformer

    _check_sizes(sizes)
    vision, width = sizes.vision, sizes.qformer.width
    model = model_class.__new__(model_class)
    nn.Module.__init__(model)
    model.tokenizer, model.max_txt_len = tokenizer, sizes.max_txt_len
    model.visual_encoder = VisionTransformer(
        img_size=sizes.image_size,
        patch_size=sizes.patch_size,
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.heads,
        qkv_bias=True,
        use_mean_pooling=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    model.ln_vision = LayerNorm(vision.width)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=sizes.qformer.layers,
        num_attention_heads=sizes.qformer.heads,
        intermediate_size=4 * width,
    )
    config.encoder_width, config.query_length = vision.width, sizes.num_query_token
    config.add_cross_attention, config.cross_attention_freq = True, sizes.cross_attention_freq
    model.Qformer = BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(config.initializer_range * torch.randn(1, sizes.num_query_token, width))
    model.vision_proj = nn.Linear(width, sizes.embed_dim)
    model.text_proj = nn.Linear(width, sizes.embed_dim)
    model.itm_head = nn.Linear(width, 2)
    model.temp = nn.Parameter(torch.tensor(0.07))
    return model


def _check_sizes(sizes: Blip2Sizes) -> None:
    found = []
    if sizes.image_size % sizes.patch_size:
        found.append(f"model.sizes.image_size: {sizes.image_size} is no multiple of patch_size {sizes.patch_size}")
    for name in ("vision", "qformer"):
        part = getattr(sizes, name)
        if part.width % part.heads:
            found.append(f"model.sizes.{name}.width: {part.width} is no multiple of heads {part.heads}")
    if found:
        raise UserError(found)
