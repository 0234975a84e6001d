"""Files of a dual encoder: what they hold, and what a model must be to take one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from lavis_dcd.models import weights
from lavis_dcd.models.dual_encoder_config import DualEncoderConfig
from lavis_dcd.models.meter_config import TextConfig
from lavis_dcd.models.meter_weights import adapt_positions
from lavis_dcd.models.weights import LoadReport, SavedWeights, fill, same_modules

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
    """What a model must be built from to take ``saved``: ``own``, unless the file says that it holds other modules.

    In that case the file's modules, with ``own``'s training switches (loss, freezing, memory) and tokenizer.
    """
    if saved.config is None or same_modules(portable(saved.config), portable(own), _ARCHITECTURE, _NO_MODULES):
        return own
    merged = dataclasses.replace(own, **{k: copy.deepcopy(getattr(saved.config, k)) for k in _ARCHITECTURE})
    merged.vision.freeze, merged.text.freeze = own.vision.freeze, own.text.freeze
    if own.text.name != TextConfig().name:
        merged.text.name = own.text.name  # the file may name a folder of another machine
    return merged


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
