"""Matchers from their ``model:`` sections, by LAVIS name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.tensor_files import tensors_only
from lavis_dcd.config.job_file import model_defaults
from lavis_dcd.matching.adapters.clip import official_script
from lavis_dcd.matching.adapters.registry import adapter_for, require_adapter
from lavis_dcd.matching.contract import Matcher


def full_section(section: Mapping[str, Any], path: str) -> DictConfig:
    """Return ``section`` over the defaults of its ``arch`` and ``model_type``, as LAVIS merges them.

    Raises:
        UserError: an arch or model type that is not registered with LAVIS.
    """
    arch = section.get("arch")
    model_class = registry.get_model_class(arch) if arch else None
    if model_class is None:
        raise UserError(f"{path}.arch: {arch!r} is not registered; registered: {', '.join(registry.list_models())}")
    model_type = section.get("model_type")
    types = getattr(model_class, "PRETRAINED_MODEL_CONFIG_DICT", {})
    if model_type is not None and model_type not in types:
        raise UserError(f"{path}.model_type: {model_type!r} is none of {arch}'s types: {', '.join(types)}")
    merged = section if isinstance(section, DictConfig) else OmegaConf.create(dict(section))
    if model_type is not None:
        merged = OmegaConf.merge(model_defaults(merged).get("model", {}), merged)
    # some of LAVIS's own files name another arch than the one they belong to
    merged.arch = arch
    return merged


def build_matcher(section: Mapping[str, Any], path: str) -> Matcher:
    """Build the model that ``section`` names, through its adapter where it is no matcher itself.

    Raises:
        UserError: unknown names, or a model that is no matcher and has no adapter.
    """
    config = full_section(section, path)
    model_class = registry.get_model_class(config.arch)
    adapter = adapter_for(config.arch)
    if adapter is None and not issubclass(model_class, Matcher):
        require_adapter(config.arch, path)
    try:
        return adapter.from_config(model_class, config, path) if adapter else model_class.from_config(config)
    except UserError as error:
        raise UserError([_at(path, line) for line in error.faults]) from error


def reading_tensors_only(model_class: type | None) -> AbstractContextManager[None]:
    """Return the block in which to build a model: one of LAVIS's own reads its weights by this package's reader.

    Those of this package do so anyway; what a plug-in's model reads is the plug-in's.
    """
    own = model_class is not None and model_class.__module__.partition(".")[0] == "lavis"
    return tensors_only(scripts=official_script) if own else nullcontext()


def _at(path: str, fault: str) -> str:
    """Put a section's ``path`` in the place of "model", as which a model names its section in faults."""
    known = fault.startswith((f"{path}.", f"{path}:"))
    return f"{path}{fault.removeprefix('model')}" if fault.startswith(("model.", "model:")) and not known else fault


def module_of(matcher: Matcher) -> nn.Module:
    """Return ``matcher`` as the module that it is, for what ``Matcher`` leaves to ``nn.Module``.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(matcher, nn.Module):
        raise TypeError(f"{type(matcher).__name__} is a Matcher, but no nn.Module")
    return matcher
