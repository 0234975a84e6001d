"""Matchers from their ``model:`` sections, by LAVIS name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.contract import Matcher


def full_section(section: Mapping[str, Any], path: str) -> DictConfig:
    """``section`` over the defaults of its ``arch`` and ``model_type``, as LAVIS merges them.

    Raises:
        UserError: an arch or model type that LAVIS does not know.
    """
    arch = section.get("arch")
    model_class = registry.get_model_class(arch) if arch else None
    if model_class is None:
        raise UserError(f"{path}.arch: {arch!r} is not registered; registered: {', '.join(registry.list_models())}")
    model_type = section.get("model_type")
    merged = OmegaConf.create(dict(section) if not isinstance(section, DictConfig) else section)
    if model_type is None:
        return merged
    types = model_class.PRETRAINED_MODEL_CONFIG_DICT
    if model_type not in types:
        raise UserError(f"{path}.model_type: {model_type!r} is none of {arch}'s types: {', '.join(types)}")
    defaults = OmegaConf.load(model_class.default_config_path(model_type)).model
    return OmegaConf.merge(defaults, merged)


def build_matcher(section: Mapping[str, Any], path: str) -> Matcher:
    """The model that ``section`` names.

    Raises:
        UserError: unknown names, or a model that is no matcher.
    """
    config = full_section(section, path)
    model = registry.get_model_class(config.arch).from_config(config)
    if not isinstance(model, Matcher):
        raise UserError(f"{path}.arch: {config.arch} cannot score pairs (it is no lavis_dcd Matcher)")
    return model
