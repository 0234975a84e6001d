"""Files of whole retrievers: found, read without running code, checked against a model, copied into it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.common.address import looks_like_address
from lavis_dcd.common.download import fetch
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import ASSET_PREFIX, asset_path
from lavis_dcd.common.schema import parse
from lavis_dcd.common.tensor_files import read_tensor_file, tensor_faults, tensors_of
from lavis_dcd.common.texts import one_line, shown
from lavis_dcd.models.hub import plain_text_family
from lavis_dcd.models.sizes import check_configuration
from lavis_dcd.models.towers import TextConfig

log = logging.getLogger(__name__)

C = TypeVar("C")
# of sections: how the modules work, which a file of sizes leaves to the model's own section
_SWITCHES = ("freeze", "shortcuts", "grad_checkpoint", "compile")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass
class SavedWeights(Generic[C]):
    """A file's tensors and, for a file of ours, the configuration it was built from."""

    tensors: dict[str, Tensor]
    config: C | None = None


@dataclass
class LoadReport:
    """The outcome of a load, by tensor name of the file (loaded, ignored) and of the model (missing)."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)

    def log(self, path: Path) -> None:
        """Log how many tensors of the file at ``path`` were loaded, adapted, missing and ignored."""
        log.info(
            "%s: %d tensors loaded, %d adapted, %d missing, %d ignored%s",
            path, len(self.loaded), len(self.adapted), len(self.missing), len(self.ignored),
            f" ({', '.join(sorted({k.split('.')[0] for k in self.ignored}))})" if self.ignored else "",
        )  # fmt: skip


def locate(source: str, sha256: str | None = None) -> Path:
    """Return a local path for a file name, a hub model's folder, an ``asset:`` name or an address.

    What is at an address is fetched to the cache, or lies there and is checked.

    Raises:
        UserError: no such file, it cannot be fetched, or it is another one.
    """
    if looks_like_address(source):
        return fetch(source, sha256=sha256)
    try:
        path = Path(asset_path(source)).expanduser()
    except RuntimeError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {one_line(source)}: {error}; name a whole path") from error
    if os.path.isdir(path):
        files = [path / name for name in _HUB_FILES if (path / name).is_file()]
        if not files:
            raise UserError(f"checkpoint {source}: the folder has none of {', '.join(_HUB_FILES)}")
        return files[0]
    if not os.path.isfile(path):
        what = "no regular file" if os.path.exists(path) else "no such file"
        raise UserError(f"checkpoint {one_line(source)}: {what}")
    return path


def read(path: Path, config_class: type[C]) -> SavedWeights[C]:
    """Return tensors of a safetensors, ``.pth`` or Lightning ``.ckpt`` file, with our configuration when it has one.

    Raises:
        UserError: the file is no such file, holds anything but tensors and plain containers, or is another model's.
    """
    file = read_tensor_file(path)
    if path.suffix == ".safetensors":
        tensors: Any = file.content
        config = _json(file.metadata["config"], path) if "config" in file.metadata else None
    else:
        config = file.content.get("config")
        tensors = file.content.get("model", file.content.get("state_dict", file.content))
    for name, value in (("tensors", tensors), ("configuration", config or {})):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: {name} as a {type(value).__name__}, expected names and values")
    tensors = tensors_of(tensors)
    if not config:
        return SavedWeights(tensors)
    check_configuration(config, path)
    arch = config_class.__dataclass_fields__["arch"].default  # type: ignore[attr-defined]
    if config.get("arch", arch) != arch:
        raise UserError(
            f"{path}: holds a {one_line(str(config['arch']), 80)}, this model is a {arch}; name a file of the same arch"
        )
    return SavedWeights(tensors, parse(config_class, config, str(path)))


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the configuration in it is not JSON ({error}); name a whole file") from error


def rank_head_from_matching(named: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Start the rank head from the "match" row of the matching head, in place, where a pre-trained file has none.

    As the authors of METER and ViLT do.
    """
    if "rank_output.weight" not in named and "itm_score.fc.weight" in tensors:
        named["rank_output.weight"] = tensors["itm_score.fc.weight"][1:]
        named["rank_output.bias"] = tensors["itm_score.fc.bias"][1:]


def fill(model: nn.Module, named: Mapping[str, Tensor], report: LoadReport, path: Path) -> LoadReport:
    """Copy ``named``, in the model's own names, into it; a model on the meta device takes the tensors as they are.

    Returns:
        ``report`` with what was loaded, and what the model lacks added to ``ignored``.

    Raises:
        UserError: shapes or kinds of numbers that differ, numbers that are not finite, or inference weights that the
            file lacks.
    """
    expected = model.state_dict()
    report.ignored += [k for k in named if k not in expected]
    known = {k: v for k, v in named.items() if k in expected}
    if wrong := tensor_faults(known, expected, path):
        raise UserError(wrong[:10])
    report.loaded = list(known)
    report.missing = [k for k in expected if k not in known and not k.endswith("position_ids")]
    if report.missing:
        raise UserError(
            f"{path}: lacks {len(report.missing)} of the {len(expected)} weights that inference reads, among them "
            f"{', '.join(report.missing[:3])}; choose a retrieval checkpoint of these sizes"
        )
    on_meta = any(t.is_meta for t in expected.values())
    model.load_state_dict(known, strict=False, assign=on_meta)
    return report


@dataclass(frozen=True)
class CheckpointFormat(Generic[C]):
    """The reading and writing of an arch's files; what differs between archs is data.

    Args:
        config_class: of the configuration in a file of ours.
        sections: the keys of the configuration that say the modules, ``text`` among them.
        no_modules: by section, the keys that shape no module.
        without_weights: by section, values that take the place of those that point at other files.
        positions: name of the position embeddings that are interpolated to the model's image size.
        rename: (model, tensors of a file) -> tensors by the model's names, and the names left aside.
        adapt: (position embeddings ``[..., tokens, D]``, number of tokens) -> the same at another grid.
        inherited: the keys that say no module, whose null stands for the file's value.
    """

    config_class: type[C]
    sections: tuple[str, ...]
    no_modules: Mapping[str, tuple[str, ...]]
    without_weights: Mapping[str, Mapping[str, Any]]
    positions: str
    rename: Callable[[Any, Mapping[str, Tensor]], tuple[dict[str, Tensor], list[str]]]
    adapt: Callable[[Tensor, int], Tensor]
    inherited: tuple[str, ...] = ()

    def read(self, path: Path) -> SavedWeights[C]:
        """Return tensors and, for a file of ours, the sizes in its configuration; raises as :func:`read`.

        Whatever in it points at other files is left out: the model's own section says that.
        """
        saved = read(path, self.config_class)
        return saved if saved.config is None else SavedWeights(saved.tensors, self._sizes_only(saved.config, path))

    def _sizes_only(self, config: C, path: Path) -> C:
        sizes: Any = self._without_files(config)
        text = sizes.text
        if isinstance(text, TextConfig) and text.config:
            kind = text.config.get("model_type") if text.family == "auto" else text.family
            if not plain_text_family(kind):
                raise UserError(
                    f"{path}: the configuration in it has a text tower of the family {shown(kind)}, which is no plain "
                    "text encoder; name a whole file"
                )
        if not _is_vocabulary(text.name):
            log.info("%s: the tokenizer %s that it names is not opened; model.text.name says which one serves", path,
                     one_line(text.name, 200))  # fmt: skip
            text.name = type(text)().name
        return sizes

    def portable(self, config: C) -> dict[str, Any]:
        """Return the configuration as it goes into a file: nothing that points at other weights."""
        return dataclasses.asdict(self._without_files(config))  # type: ignore[call-overload]

    def _without_files(self, config: C) -> C:
        """Return a copy of the configuration that names no weights."""
        sections = {name: dataclasses.replace(getattr(config, name), **v) for name, v in self.without_weights.items()}
        nowhere = {"finetuned": None, "pretrained": None, "checkpoint_sha256": None}
        return copy.deepcopy(dataclasses.replace(config, **nowhere, **sections))  # type: ignore[type-var]

    def built_from(self, saved: SavedWeights[C], config: C) -> C:
        """Return what a model of ``config`` must be built from to take ``saved``.

        That is ``config`` itself, unless the file says that it holds other modules, or what ``config`` leaves to it:
        then the file's modules, with the model's training switches (loss, freezing, memory) and tokenizer.
        """
        if saved.config is None:
            return config
        left = [name for name in self.inherited if getattr(config, name) is None]
        taken = {name: getattr(saved.config, name) for name in left if getattr(saved.config, name) is not None}
        if same_modules(self.portable(saved.config), self.portable(config), self.sections, self.no_modules):
            return dataclasses.replace(config, **taken) if taken else config  # type: ignore[type-var]
        modules = {name: copy.deepcopy(getattr(saved.config, name)) for name in self.sections}
        merged: Any = dataclasses.replace(config, **modules, **taken)  # type: ignore[type-var]
        current: Any = config
        for name in self.sections:
            for key in set(_SWITCHES) & set(getattr(getattr(merged, name), "__dataclass_fields__", ())):
                setattr(getattr(merged, name), key, getattr(getattr(current, name), key))
        if current.text.name != type(current.text)().name:
            merged.text.name = current.text.name  # the file may name a folder of another machine
        return merged

    def load_into(self, model: nn.Module, saved: SavedWeights[C], path: Path) -> LoadReport:
        """Copy ``saved`` into a model; one on the meta device takes the tensors as they are.

        Raises:
            UserError: shapes that differ, positions that are no square grid, or inference weights that the file lacks.
        """
        try:
            named, report = self._renamed(model, saved, path)
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = one_line(str(error).splitlines()[0], 200) if str(error) else type(error).__name__
            raise UserError(f"{path}: a tensor of it has another shape than its name promises ({reason}); name a whole "
                            "file") from error  # fmt: skip
        return fill(model, named, report, path)

    def _renamed(self, model: nn.Module, saved: SavedWeights[C], path: Path) -> tuple[dict[str, Tensor], LoadReport]:
        """Return the file's tensors by the model's names, positions fitted to its grid, and the report so far."""
        named, ignored = self.rename(model, saved.tensors)
        report = LoadReport(ignored=ignored)
        given, wanted = named.get(self.positions), model.state_dict().get(self.positions)
        other_grid = given is not None and wanted is not None and given.shape != wanted.shape
        # another width is no matter of the grid: ``fill`` refuses it
        if given is not None and wanted is not None and other_grid and given.shape[-1] == wanted.shape[-1]:
            patches = given.shape[-2] - 1
            if round(patches**0.5) ** 2 != patches:
                raise UserError(f"{path}: {patches} patch positions are no square grid")
            named[self.positions] = self.adapt(given, wanted.shape[-2])
            report.adapted.append(self.positions)
        return named, report


def _is_vocabulary(name: str) -> bool:
    """Return whether a tokenizer's name can be taken from a file: one of the package's, or a bare name of the hub."""
    bare = re.fullmatch(r"[A-Za-z0-9][\w-]*", name) is not None and not Path(name).exists()
    return bare or name.startswith(ASSET_PREFIX)


def same_modules(
    one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, ...], ignoring: Mapping[str, tuple[str, ...]]
) -> bool:
    """Return whether two plain configurations say the same modules: the sections ``names``, some keys left aside.

    Args:
        one, other: plain containers of whole configurations.
        ignoring: by section, the keys that shape no module.
    """

    def skeleton(plain: Mapping[str, Any]) -> dict[str, Any]:
        def shaping(name: str) -> Any:
            section = plain[name]
            if not isinstance(section, Mapping):
                return section
            return {k: v for k, v in section.items() if k not in ignoring.get(name, ())}

        return {name: shaping(name) for name in names}

    return skeleton(one) == skeleton(other)


def adapt_positions(positions: Tensor, tokens: int) -> Tensor:
    """Return position embeddings ``[1 + n^2, D]`` at another grid, ``[tokens, D]``: bicubic, the class token's kept.

    As METER's ``adapt_position_encoding``.
    """
    before, after = round((len(positions) - 1) ** 0.5), round((tokens - 1) ** 0.5)
    grid = positions[1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = nnf.interpolate(grid, size=(after, after), mode="bicubic")
    return torch.cat([positions[:1].float(), grid[0].flatten(1).T]).to(positions.dtype)
