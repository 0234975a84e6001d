"""METER's weights: official Lightning files, files with DCD's ``stu_*`` tensors, and our own; nothing is unpickled
but tensors and plain containers."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.common import assets
from lavis_dcd.common.download import fetch
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import load_tensors
from lavis_dcd.common.schema import parse
from lavis_dcd.models.meter_config import MeterConfig, TextConfig

# what inference never reads: CLIP's text half, RoBERTa's pooler, the pre-training heads
_UNUSED = re.compile(
    r"^(vit_model\.(positional_embedding|token_embedding|ln_final|transformer|text_projection|logit_scale)"
    r"|vit_model\.visual\.proj|text_transformer\.pooler|itm_score|mlm_score|stu_|.*position_ids$)"
)
_FUSION = ("cross_modal_image_layers", "cross_modal_text_layers", "cross_modal_image_pooler",
           "cross_modal_text_pooler", "rank_output")
_POSITIONS = "vision_tower.vit.embeddings.position_embedding.weight"
_ARCHITECTURE = ("vision", "text", "fusion", "joint_head", "fusion_score")


@dataclass
class SavedWeights:
    """A file's tensors and, for a file of ours, the configuration it was built from."""

    tensors: dict[str, Tensor]
    config: MeterConfig | None = None


@dataclass
class LoadReport:
    """What a load did, by tensor name of the file (loaded, ignored) and of the model (missing)."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)

    def log(self, path: Path) -> None:
        logging.info(
            "%s: %d tensors loaded, %d adapted, %d missing, %d ignored%s",
            path, len(self.loaded), len(self.adapted), len(self.missing), len(self.ignored),
            f" ({', '.join(sorted({k.split('.')[0] for k in self.ignored}))})" if self.ignored else "",
        )  # fmt: skip


def locate(source: str, sha256: str | None = None) -> Path:
    """A local path for a file name, an ``asset:`` name or an address (fetched to the cache).

    Raises:
        UserError: no such file, or it cannot be fetched.
    """
    if re.match(r"https?://", source):
        return Path(fetch(source, sha256=sha256))
    path = Path(assets.resolve(source))
    if not path.is_file():
        raise UserError(f"checkpoint {source}: no such file")
    return path


def read(path: Path) -> SavedWeights:
    """Tensors of a safetensors, ``.pth`` or Lightning ``.ckpt`` file, with our configuration when it has one.

    Raises:
        UserError: the file is no such file, or holds anything but tensors and plain containers.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
        config = json.loads(metadata["config"]) if "config" in metadata else None
        tensors = load_tensors(path)
    else:
        content = load_tensors(path)
        config = content.get("config")
        tensors = content.get("model", content.get("state_dict", content))
    tensors = {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
    return SavedWeights(tensors, parse(MeterConfig, config, str(path)) if config else None)


def portable(config: MeterConfig) -> dict[str, Any]:
    """The configuration as it goes into a file: nothing that points at other weights."""
    stripped = dataclasses.replace(
        config, finetuned=None, pretrained=None, checkpoint_sha256=None,
        vision=dataclasses.replace(config.vision, weights=None),
        text=dataclasses.replace(config.text, load_weights=False),
        fusion=dataclasses.replace(config.fusion, init_from_text=False),
    )  # fmt: skip
    return dataclasses.asdict(stripped)


def built_from(saved: SavedWeights, own: MeterConfig) -> MeterConfig:
    """What a model must be built from to take ``saved``: ``own``, unless the file says that it holds other modules.

    In that case the file's modules, with ``own``'s training switches (loss, freezing, memory) and tokenizer.
    """
    if saved.config is None or _skeleton(saved.config) == _skeleton(own):
        return own
    merged = dataclasses.replace(own, **{k: copy.deepcopy(getattr(saved.config, k)) for k in _ARCHITECTURE})
    merged.vision.freeze, merged.text.freeze = own.vision.freeze, own.text.freeze
    if own.text.name != TextConfig().name:
        merged.text.name = own.text.name  # the file may name a folder of another machine
    return merged


def _skeleton(config: MeterConfig) -> dict[str, Any]:
    plain = {k: copy.deepcopy(portable(config)[k]) for k in _ARCHITECTURE}
    for section, keys in {"vision": ["freeze", "image_size"], "text": ["freeze", "name", "max_length"],
                          "fusion": ["dropout"], "joint_head": ["dropout", "temperature"]}.items():  # fmt: skip
        for key in keys:
            if plain[section]:
                plain[section].pop(key)
    return plain


def to_own_names(tensors: Mapping[str, Tensor], part: str, fusion_depth: int) -> tuple[dict[str, Tensor], list[str]]:
    """Official names -> ours; ``part`` picks the teacher's or the student's (``stu_*``) fusion.

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
    if "rank_output.weight" not in named and "itm_score.fc.weight" in tensors:
        # a pre-trained file has no rank head; METER starts it from the "match" row of the matching head
        named["rank_output.weight"] = tensors["itm_score.fc.weight"][1:]
        named["rank_output.bias"] = tensors["itm_score.fc.bias"][1:]
    return named, ignored


def _part(tensors: Mapping[str, Tensor], part: str, depth: int) -> str:
    def layers(prefix: str) -> int:
        pattern = re.compile(rf"^{prefix}cross_modal_text_layers\.(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, tensors) if m), default=-1)

    if part == "auto":
        return "student" if layers("stu_") == depth != layers("") else "teacher"
    if part == "student" and not layers("stu_"):
        raise UserError("model.checkpoint_part: student, but the file has no stu_* tensors")
    if part not in ("teacher", "student"):
        raise UserError(f"model.checkpoint_part: {part!r} is none of auto, teacher, student")
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


def adapt_positions(positions: Tensor, tokens: int) -> Tensor:
    """Position embeddings ``[1 + n^2, D]`` at another grid, ``[tokens, D]``: bicubic, the class token's kept.

    As METER's ``adapt_position_encoding``.
    """
    before, after = round((len(positions) - 1) ** 0.5), round((tokens - 1) ** 0.5)
    grid = positions[1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = nnf.interpolate(grid, size=(after, after), mode="bicubic")
    return torch.cat([positions[:1].float(), grid[0].flatten(1).T]).to(positions.dtype)


def load_into(model: nn.Module, saved: SavedWeights, path: Path) -> LoadReport:
    """Copy ``saved`` into a MeterRetrieval; a model on the meta device takes the tensors as they are.

    Raises:
        UserError: shapes that differ, or inference weights that the file lacks.
    """
    named, ignored = to_own_names(saved.tensors, model.config.checkpoint_part, model.config.fusion.layers)
    own = model.state_dict()
    report = LoadReport(ignored=ignored)
    if _POSITIONS in named and _POSITIONS in own and named[_POSITIONS].shape != own[_POSITIONS].shape:
        named[_POSITIONS] = adapt_positions(named[_POSITIONS], len(own[_POSITIONS]))
        report.adapted.append(_POSITIONS)
    report.ignored += [k for k in named if k not in own]
    named = {k: v for k, v in named.items() if k in own}
    wrong = [f"{path}: {k} is {tuple(v.shape)} there, {tuple(own[k].shape)} in the model; make the model's sizes fit"
             for k, v in named.items() if v.shape != own[k].shape]  # fmt: skip
    if wrong:
        raise UserError(wrong[:10])
    report.loaded = list(named)
    report.missing = [k for k in own if k not in named and not k.endswith("position_ids")]
    if report.missing:
        raise UserError(
            f"{path}: lacks {len(report.missing)} of the {len(own)} weights that inference reads, among them "
            f"{', '.join(report.missing[:3])}; choose a retrieval checkpoint of these sizes"
        )
    on_meta = any(t.is_meta for t in own.values())
    model.load_state_dict(named, strict=False, assign=on_meta)
    return report


def succeed(student: nn.Module, teacher: nn.Module, layers: list[int]) -> None:
    """Copy a METER teacher's fusion layers ``layers`` and all else of the same name into ``student``.

    Raises:
        UserError: another architecture, a layer that is not there, other sizes.
    """
    if type(teacher) is not type(student):
        raise UserError(
            f"model.student.init_from_teacher: a {type(student).__name__} cannot start from a {type(teacher).__name__}"
        )
    depth = teacher.config.fusion.layers
    if len(layers) != student.config.fusion.layers or any(not 0 <= i < depth for i in layers):
        raise UserError(
            f"model.student.init_from_teacher.layers: {layers} must name {student.config.fusion.layers} layers "
            f"of the teacher's 0..{depth - 1}"
        )
    source = teacher.state_dict()
    renamed: dict[str, Tensor] = {}
    for name, own in student.state_dict().items():
        match = re.match(r"(cross_modal_(?:image|text)_layers)\.(\d+)\.(.+)$", name)
        donor = f"{match[1]}.{layers[int(match[2])]}.{match[3]}" if match else name
        if donor not in source or source[donor].shape != own.shape:
            raise UserError(f"model.student: {name} has no counterpart of its shape in the teacher; give both the "
                            "same towers, fusion width and joint head")  # fmt: skip
        renamed[name] = source[donor].detach().clone()
    student.load_state_dict(renamed)
