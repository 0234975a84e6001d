"""Weights of whole retrievers: found, read without running code, checked against a model, copied into it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.common.download import fetch
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import asset_path, load_tensors
from lavis_dcd.common.schema import parse

C = TypeVar("C")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass
class SavedWeights(Generic[C]):
    """A file's tensors and, for a file of ours, the configuration it was built from."""

    tensors: dict[str, Tensor]
    config: C | None = None


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
    """A local path for a file name, a hub model's folder, an ``asset:`` name or an address (fetched to the cache).

    Raises:
        UserError: no such file, or it cannot be fetched.
    """
    if re.match(r"https?://", source):
        return Path(fetch(source, sha256=sha256))
    path = Path(asset_path(source))
    if path.is_dir():
        found = [path / name for name in _HUB_FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"checkpoint {source}: the folder has none of {', '.join(_HUB_FILES)}")
        return found[0]
    if not path.is_file():
        raise UserError(f"checkpoint {source}: no such file")
    return path


def read(path: Path, config_class: type[C]) -> SavedWeights[C]:
    """Tensors of a safetensors, ``.pth`` or Lightning ``.ckpt`` file, with our configuration when it has one.

    Raises:
        UserError: the file is no such file, holds anything but tensors and plain containers, or is another model's.
    """
    if path.suffix == ".safetensors":
        tensors = load_tensors(path)  # refuses what is no such file
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
        try:
            config = json.loads(metadata["config"]) if "config" in metadata else None
        except ValueError as error:
            raise UserError(f"{path}: the configuration in it is not JSON ({error}); name a whole file") from error
    else:
        content = load_tensors(path)
        config = content.get("config")
        tensors = content.get("model", content.get("state_dict", content))
    for name, found in (("tensors", tensors), ("configuration", config or {})):
        if not isinstance(found, Mapping):
            raise UserError(f"{path}: {name} as a {type(found).__name__}, expected names and values")
    tensors = {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
    if not config:
        return SavedWeights(tensors)
    own = config_class.__dataclass_fields__["arch"].default  # type: ignore[attr-defined]
    if config.get("arch", own) != own:
        raise UserError(f"{path}: holds a {config['arch']}, this model is a {own}; name a file of the same arch")
    return SavedWeights(tensors, parse(config_class, config, str(path)))


def rank_head_from_matching(named: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Where a pre-trained file has no rank head, start it from the "match" row of the matching head, in place.

    As the authors of METER and ViLT do.
    """
    if "rank_output.weight" not in named and "itm_score.fc.weight" in tensors:
        named["rank_output.weight"] = tensors["itm_score.fc.weight"][1:]
        named["rank_output.bias"] = tensors["itm_score.fc.bias"][1:]


def fill(model: nn.Module, named: Mapping[str, Tensor], report: LoadReport, path: Path) -> LoadReport:
    """Copy ``named``, in the model's own names, into it; a model on the meta device takes the tensors as they are.

    Returns:
        ``report`` with what was loaded, and what the model does not know added to ``ignored``.

    Raises:
        UserError: shapes that differ, or inference weights that the file lacks.
    """
    own = model.state_dict()
    report.ignored += [k for k in named if k not in own]
    known = {k: v for k, v in named.items() if k in own}
    wrong = [f"{path}: {k} is {tuple(v.shape)} there, {tuple(own[k].shape)} in the model; make the model's sizes fit"
             for k, v in known.items() if v.shape != own[k].shape]  # fmt: skip
    if wrong:
        raise UserError(wrong[:10])
    report.loaded = list(known)
    report.missing = [k for k in own if k not in known and not k.endswith("position_ids")]
    if report.missing:
        raise UserError(
            f"{path}: lacks {len(report.missing)} of the {len(own)} weights that inference reads, among them "
            f"{', '.join(report.missing[:3])}; choose a retrieval checkpoint of these sizes"
        )
    on_meta = any(t.is_meta for t in own.values())
    model.load_state_dict(known, strict=False, assign=on_meta)
    return report


def succeed(
    student: nn.Module, teacher: nn.Module, layers: list[int], stacks: str, hint: str, optional: tuple[str, ...] = ()
) -> None:
    """Copy a teacher's fusion layers ``layers`` and all else of the same name into ``student``.

    Args:
        student, teacher: of one class, with ``config.fusion.layers``.
        stacks: regular expression of the layer stacks' names, before the layer's number; without groups.
        hint: what both must have in common, for messages.
        optional: parts that the student may have anew where the teacher has none.

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
        match = re.match(rf"({stacks})\.(\d+)\.(.+)$", name)
        donor = f"{match[1]}.{layers[int(match[2])]}.{match[3]}" if match else name
        part = name.partition(".")[0]
        if part in optional and getattr(teacher, part, None) is None:
            renamed[name] = own
            continue
        if donor not in source or source[donor].shape != own.shape:
            raise UserError(f"model.student: {name} has no counterpart of its shape in the teacher; give both the "
                            f"same {hint}")  # fmt: skip
        renamed[name] = source[donor].detach().clone()
    student.load_state_dict(renamed)


def built_from(
    saved: SavedWeights[C],
    own: C,
    portable: Callable[[C], dict[str, Any]],
    sections: tuple[str, ...],
    no_modules: Mapping[str, tuple[str, ...]],
) -> C:
    """What a model must be built from to take ``saved``: ``own``, unless the file says that it holds other modules.

    In that case the file's modules, with ``own``'s training switches (loss, freezing, memory) and tokenizer.

    Args:
        portable: a configuration as it goes into a file.
        sections: the keys of the configuration that say the modules, ``text`` among them.
        no_modules: by section, the keys that shape no module.
    """
    if saved.config is None or same_modules(portable(saved.config), portable(own), sections, no_modules):
        return own
    merged = dataclasses.replace(own, **{k: copy.deepcopy(getattr(saved.config, k)) for k in sections})
    for name in sections:
        if hasattr(getattr(merged, name), "freeze"):
            getattr(merged, name).freeze = getattr(own, name).freeze
    if own.text.name != type(own.text)().name:
        merged.text.name = own.text.name  # the file may name a folder of another machine
    return merged


def same_modules(
    one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, ...], ignoring: Mapping[str, tuple[str, ...]]
) -> bool:
    """Whether two plain configurations say the same modules: the sections ``names``, some keys left aside.

    Args:
        one, other: plain containers of whole configurations.
        ignoring: by section, the keys that shape no module.
    """

    def skeleton(plain: Mapping[str, Any]) -> dict[str, Any]:
        def kept(name: str) -> Any:
            section = plain[name]
            if not isinstance(section, Mapping):
                return section
            return {k: v for k, v in section.items() if k not in ignoring.get(name, ())}

        return {name: kept(name) for name in names}

    return skeleton(one) == skeleton(other)


def adapt_positions(positions: Tensor, tokens: int) -> Tensor:
    """Position embeddings ``[1 + n^2, D]`` at another grid, ``[tokens, D]``: bicubic, the class token's kept.

    As METER's ``adapt_position_encoding``.
    """
    before, after = round((len(positions) - 1) ** 0.5), round((tokens - 1) ** 0.5)
    grid = positions[1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = nnf.interpolate(grid, size=(after, after), mode="bicubic")
    return torch.cat([positions[:1].float(), grid[0].flatten(1).T]).to(positions.dtype)
