"""The ViT and the BERT of ALBEF and BLIP, in LAVIS's sizes or others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lavis_dcd.common.schema import unknown_key


@dataclass
class VisionSizes:
    """A ViT of other sizes than LAVIS's, in the names of its ``VisionTransformer``; the defaults are ViT-B/16."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")


@dataclass
class Sizes:
    """Other sizes than LAVIS's own.

    Args:
        vision: the ViT; its input is the section's ``image_size``.
        text: values over those of LAVIS's ``med_config`` file, under the names that stand there (``hidden_size``,
            ``num_hidden_layers``, for ALBEF ``fusion_layer``...). ``encoder_width`` follows the ViT.
    """

    vision: VisionSizes | None = None
    text: dict[str, Any] = field(default_factory=dict)


def vision_encoder(section: Any, sizes: VisionSizes | None) -> nn.Module:
    """LAVIS's ViT of a model section, in other ``sizes`` where they are given."""
    from lavis.models.vit import VisionTransformerEncoder

    if sizes is None:
        return VisionTransformerEncoder.from_config(section)
    encoder = VisionTransformerEncoder(img_size=section.get("image_size", 384), **asdict(sizes))
    encoder.vision_width = sizes.embed_dim
    return encoder


def text_encoder(section: Any, sizes: Sizes, default_file: str, vision_width: int) -> nn.Module:
    """LAVIS's BERT of a model section, on a ViT of ``vision_width``.

    Raises:
        ValueError: no such ``med_config_path``, or a key that it does not have.
    """
    from lavis.common.utils import get_abs_path
    from lavis.models.med import XBertEncoder
    from transformers import BertConfig

    path = Path(get_abs_path(section.get("med_config_path") or default_file))
    if not path.is_file():
        raise ValueError(f"med_config_path: no file {path}")
    values = json.loads(path.read_text())
    if unknown := [unknown_key("sizes.text", key, values) for key in sizes.text if key not in values]:
        raise ValueError(unknown[0])
    values |= sizes.text
    if sizes.vision is not None and "encoder_width" not in sizes.text:
        values["encoder_width"] = vision_width
    return XBertEncoder(config=BertConfig(**values), add_pooling_layer=False)
