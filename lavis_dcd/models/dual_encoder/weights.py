"""Files of a dual encoder: what they hold, and what a model must be to take one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from lavis_dcd.models import weights
from lavis_dcd.models.dual_encoder.config import DualEncoderConfig
from lavis_dcd.models.weights import LoadReport, SavedWeights, adapt_positions, fill

_ARCHITECTURE = ("vision", "text", "head")
_NO_MODULES = {
    "vision": ("freeze", "image_size"),
    "text": ("freeze", "name", "max_length"),
    "head": ("dropout", "hidden_dropout", "token_dropout", "temperature"),
}
_POSITIONS = "vision_tower.vit.embeddings.position_embedding.weight"


def read(path: Path) -> SavedWeights[DualEncoderConfig]:
    """Tensors and configuration; raises as :func:`lavis_dcd.models.weights.read`."""
    return weights.read(path, DualEncoderConfig)


def portable(config: DualEncoderConfig) -> dict[str, Any]:
    """The configuration as it goes into a file: nothing that points at other weights."""
    stripped = dataclasses.replace(
        config, finetuned=None, pretrained=None, checkpoint_sha256=None,
        vision=dataclasses.replace(config.vision, weights=None),
        text=dataclasses.replace(config.text, load_weights=False),
    )  # fmt: skip
    return dataclasses.asdict(stripped)


def built_from(saved: SavedWeights[DualEncoderConfig], own: DualEncoderConfig) -> DualEncoderConfig:
    """See :func:`lavis_dcd.models.weights.built_from`."""
    return weights.built_from(saved, own, portable, _ARCHITECTURE, _NO_MODULES)


def load_into(model: nn.Module, saved: SavedWeights[DualEncoderConfig], path: Path) -> LoadReport:
    """Copy ``saved`` into a DualEncoder; a CLIP-ViT's positions are interpolated to the model's image size.

    Raises:
        UserError: shapes that differ, or weights that the file lacks.
    """
    report = LoadReport(ignored=[k for k in saved.tensors if k.endswith("position_ids")])
    named = {k: v for k, v in saved.tensors.items() if k not in report.ignored}
    own = model.state_dict().get(_POSITIONS)
    if own is not None and _POSITIONS in named and len(named[_POSITIONS]) != len(own):
        named[_POSITIONS] = adapt_positions(named[_POSITIONS], len(own))
        report.adapted.append(_POSITIONS)
    return fill(model, named, report, path)
