"""ViLT's weights: the authors' Lightning files, the hub's ``ViltForImageAndTextRetrieval``, and our own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, cat
from torch.nn import functional as nnf

from lavis_dcd.models.vilt.config import ViltConfig
from lavis_dcd.models.weights import CheckpointFormat, rank_head_from_matching

_POSITIONS = "vilt.embeddings.position_embeddings"

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


def to_own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' tensors to ours, which are the hub's; names that are neither stay as they are.

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
    """Return position embeddings ``[1, 1 + n^2, D]`` at another grid, ``[1, tokens, D]``; the class token's is kept.

    Bilinear with aligned corners, as ViLT itself fits the grid to every picture.
    """
    before, after = round((positions.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    grid = positions[:, 1:].float().transpose(1, 2).unflatten(2, (before, before))
    grid = nnf.interpolate(grid, size=(after, after), mode="bilinear", align_corners=True)
    return cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1).to(positions.dtype)


VILT_FILES = CheckpointFormat(
    config_class=ViltConfig,
    sections=("image", "text", "fusion"),
    no_modules={"image": ("image_size",), "text": ("name", "max_length"), "fusion": ("dropout",)},
    without_weights={},
    positions=_POSITIONS,
    rename=lambda model, tensors: (to_own_names(tensors), []),
    adapt=adapt_positions,
)
