"""METER's weights: official Lightning files, files with DCD's ``stu_*`` tensors, and our own; nothing is unpickled
but tensors and plain containers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.models.meter.config import MeterConfig
from lavis_dcd.models.weights import CheckpointFormat, adapt_positions, rank_head_from_matching

# what inference never reads: CLIP's text half, RoBERTa's pooler, the pre-training heads
_UNUSED = re.compile(
    r"^(vit_model\.(positional_embedding|token_embedding|ln_final|transformer|text_projection|logit_scale)"
    r"|vit_model\.visual\.proj|text_transformer\.pooler|itm_score|mlm_score|stu_|.*position_ids$)"
)
_FUSION = (
    "cross_modal_image_layers",
    "cross_modal_text_layers",
    "cross_modal_image_pooler",
    "cross_modal_text_pooler",
    "rank_output",
)


def to_own_names(tensors: Mapping[str, Tensor], part: str, fusion_depth: int) -> tuple[dict[str, Tensor], list[str]]:
    """Rename official tensors to ours; ``part`` picks the teacher's or the student's (``stu_*``) fusion.

    ``auto`` takes the student's when the file has one of exactly ``fusion_depth`` layers and the teacher's has not.

    Returns:
        the renamed tensors and the names left aside.
    """
    part = _part(tensors, part, fusion_depth)
    named: dict[str, Tensor] = {}
    ignored: list[str] = []
    for name, tensor in tensors.items():
        target = name
        if part == "student" and name.startswith("stu_"):
            target = name.removeprefix("stu_")
        elif part == "student" and name.startswith(_FUSION):
            ignored.append(name)
            continue
        if _UNUSED.match(target):
            ignored.append(name)
        elif target.startswith("vit_model.visual."):
            named.update(_clip_block(target.removeprefix("vit_model.visual."), tensor))
        elif target.startswith("text_transformer."):
            named["text_tower.model." + target.removeprefix("text_transformer.")] = tensor
        else:
            named[target] = tensor
    rank_head_from_matching(named, tensors)
    return named, ignored


def _part(tensors: Mapping[str, Tensor], part: str, depth: int) -> str:
    def layers(prefix: str) -> int:
        pattern = re.compile(rf"^{prefix}cross_modal_text_layers\.(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, tensors) if m), default=-1)

    if part == "auto":
        return "student" if layers("stu_") == depth != layers("") else "teacher"
    if part == "student" and not layers("stu_"):
        raise UserError("model.checkpoint_part: student, but the file has no stu_* tensors")
    return part


def _clip_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of OpenAI's CLIP vision tower in ``transformers``' names (its fused qkv becomes three)."""
    root = "vision_tower.vit."
    top = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
    }
    if name in top:
        return {root + top[name]: tensor}
    for official, ours in (("ln_pre.", "pre_layrnorm."), ("ln_post.", "post_layernorm.")):
        if name.startswith(official):
            return {root + ours + name.removeprefix(official): tensor}
    match = re.match(r"transformer\.resblocks\.(\d+)\.(.+)$", name)
    if not match:
        return {"vit_model.visual." + name: tensor}
    layer, rest = f"{root}encoder.layers.{match[1]}.", match[2]
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {f"{layer}self_attn.{n}_proj.{kind}": t for n, t in zip("qkv", tensor.chunk(3), strict=True)}
    for official, ours in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                           ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
        rest = rest.replace(official, ours)
    return {layer + rest: tensor}


def _rename(model: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    return to_own_names(tensors, model.config.checkpoint_part, model.config.fusion.layers)


METER_FILES = CheckpointFormat(
    config_class=MeterConfig,
    sections=("vision", "text", "fusion", "joint_head", "fusion_score"),
    no_modules={
        "vision": ("freeze", "image_size"),
        "text": ("freeze", "name", "max_length"),
        "fusion": ("dropout",),
        "joint_head": ("dropout", "temperature"),
    },
    without_weights={
        "vision": {"weights": None},
        "text": {"load_weights": False},
        "fusion": {"init_from_text": False},
    },
    positions="vision_tower.vit.embeddings.position_embedding.weight",
    rename=_rename,
    inherited=("fusion_weight",),
    adapt=adapt_positions,
)
