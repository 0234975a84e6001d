"""ViLT's weights: the authors' Lightning files, the hub's ``ViltForImageAndTextRetrieval``, and our own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, cat, nn
from torch.nn import functional as nnf

from lavis_dcd.common.errors import UserError
from lavis_dcd.models import weights
from lavis_dcd.models.vilt.config import ViltConfig
from lavis_dcd.models.weights import LoadReport, SavedWeights, fill, rank_head_from_matching

_POSITIONS = "vilt.embeddings.position_embeddings"
_SECTIONS = ("image", "text", "fusion")
# keys of those sections that shape no module
_NO_MODULES = {"image": ("image_size",), "text": ("name", "max_length"), "fusion": ("dropout",)}

# the authors' names -> transformers'
_TOP = {
    "transformer.cls_token": "vilt.embeddings.cls_token",
    "transformer.pos_embed": _POSITIONS,
    "transformer.patch_embed.proj.": "vilt.embeddings.patch_embeddings.projection.",
    "transformer.norm.": "vilt.layernorm.",
    "text_embeddings.": "vilt.embeddings.text_embeddings.",
    "token_type_embeddings.": "vilt.embeddings.token_type_embeddings.",
    "pooler.": "vilt.pooler.",
}
_BLOCK = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}


def read(path: Path) -> SavedWeights[ViltConfig]:
    """Tensors and, for a file of ours, configuration; raises as :func:`lavis_dcd.models.weights.read`."""
    return weights.read(path, ViltConfig)


def portable(config: ViltConfig) -> dict[str, Any]:
    """The configuration as it goes into a file: nothing that points at other weights."""
    stripped = dataclasses.replace(config, finetuned=None, pretrained=None, checkpoint_sha256=None)
    return dataclasses.asdict(stripped)


def built_from(saved: SavedWeights[ViltConfig], own: ViltConfig) -> ViltConfig:
    """See :func:`lavis_dcd.models.weights.built_from`."""
    return weights.built_from(saved, own, portable, _SECTIONS, _NO_MODULES)


def to_own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names -> ours, which are the hub's; names that are neither stay as they are.

    A block's fused ``qkv`` becomes query, key and value.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.match(r"transformer\.blocks\.(\d+)\.(.+)$", name)
        if match:
            named |= _block(f"vilt.encoder.layer.{match[1]}.", match[2], tensor)
            continue
        official = next((prefix for prefix in _TOP if name.startswith(prefix)), None)
        named[_TOP[official] + name.removeprefix(official) if official else name] = tensor
    rank_head_from_matching(named, tensors)
    return named


def _block(layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.qkv."):
        kind = name.removeprefix("attn.qkv.")
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"{layer}attention.attention.{part}.{kind}": t for part, t in parts}
    official = next((prefix for prefix in _BLOCK if name.startswith(prefix)), None)
    return {layer + (_BLOCK[official] + name.removeprefix(official) if official else name): tensor}


def adapt_positions(positions: Tensor, tokens: int) -> Tensor:
    """Position embeddings ``[1, 1 + n^2, D]`` at another grid, ``[1, tokens, D]``; the class token's is kept.

    Bilinear with aligned corners, as ViLT itself fits the grid to every picture.
    """
    before, after = round((positions.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    grid = positions[:, 1:].float().transpose(1, 2).unflatten(2, (before, before))
    grid = nnf.interpolate(grid, size=(after, after), mode="bilinear", align_corners=True)
    return cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1).to(positions.dtype)


def load_into(model: nn.Module, saved: SavedWeights[ViltConfig], path: Path) -> LoadReport:
    """Copy ``saved`` into a ViltRetrieval; a model on the meta device takes the tensors as they are.

    Raises:
        UserError: shapes that differ, a position grid that is not square, or inference weights that the file lacks.
    """
    named = to_own_names(saved.tensors)
    report = LoadReport()
    positions, wanted = named.get(_POSITIONS), model.state_dict()[_POSITIONS]
    if positions is not None and positions.shape != wanted.shape and positions.shape[2:] == wanted.shape[2:]:
        if round((positions.shape[1] - 1) ** 0.5) ** 2 != positions.shape[1] - 1:
            raise UserError(f"{path}: {positions.shape[1] - 1} patch positions are no square grid")
        named[_POSITIONS] = adapt_positions(positions, wanted.shape[1])
        report.adapted.append(_POSITIONS)
    return fill(model, named, report, path)


def succeed(student: nn.Module, teacher: nn.Module, layers: list[int]) -> None:
    """Copy a ViLT teacher's blocks ``layers`` and all else of the same name into ``student``.

    Raises:
        UserError: another architecture, a block that is not there, other sizes.
    """
    weights.succeed(student, teacher, layers, r"vilt\.encoder\.layer", "image, text and fusion sizes")
