"""Files of a dual encoder: what they hold, and what a model must be to take one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lavis_dcd.models.dual_encoder.config import DualEncoderConfig
from lavis_dcd.models.weights import CheckpointFormat, adapt_positions


def _rename(model: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Leave out ``position_ids``, counters that some versions of ``transformers`` save."""
    counters = [name for name in tensors if name.endswith("position_ids")]
    return {name: tensor for name, tensor in tensors.items() if name not in counters}, counters


DUAL_ENCODER_FILES = CheckpointFormat(
    config_class=DualEncoderConfig,
    sections=("vision", "text", "head"),
    no_modules={
        "vision": ("freeze", "image_size"),
        "text": ("freeze", "name", "max_length"),
        "head": ("dropout", "hidden_dropout", "token_dropout", "temperature"),
    },
    without_weights={"vision": {"weights": None}, "text": {"load_weights": False}},
    positions="vision_tower.vit.embeddings.position_embedding.weight",
    rename=_rename,
    adapt=adapt_positions,
)
