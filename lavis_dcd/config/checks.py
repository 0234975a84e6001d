"""Every fault of a job's configuration: names not registered, keys that nothing reads, wrong types."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.schema import faults as schema_faults
from lavis_dcd.common.schema import unknown_key
from lavis_dcd.common.texts import shown
from lavis_dcd.config.contracts import ChecksItself, HasSchema, HoldsModels, tells
from lavis_dcd.config.job_file import among, model_defaults, registered
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.adapters.registry import adapter_for

_MODEL_KEYS = {"arch", "model_type", "load_finetuned", "load_pretrained", "finetuned", "pretrained"}
_DATASET_KEYS = {"data_type", "data_dir", "type", "build_info", "vis_processor", "text_processor"}
_SPLITS = {"train", "val", "test"}
_KINDS = ("vis_processor", "text_processor")


def job_faults(config: DictConfig) -> list[str]:
    """Return one line per fault of a merged job; empty when it is sound. Files: `lavis_dcd.config.required_files`."""
    return _run_faults(config.run) + model_faults(config.model, "model") + _datasets_faults(config.datasets)


def unknown_name(path: str, name: Any, registered: Iterable[str]) -> str:
    """The line that reports a name nobody registered, with the nearest and all the registered ones."""
    names = sorted(registered)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{path}: {shown(name)} is not registered; {hint}registered: {', '.join(names)}"


def _run_faults(run: DictConfig) -> list[str]:
    found = []
    if run.task not in registry.list_tasks():
        found.append(unknown_name("run.task", run.task, registry.list_tasks()))
    runner = registered(registry.get_runner_class, run.runner)
    if runner is None:
        return [*found, unknown_name("run.runner", run.runner, registry.list_runners())]
    schema = runner.config_schema() if tells(runner, HasSchema) else RunConfig
    return found + schema_faults(schema, run, "run")


def model_faults(section: DictConfig, path: str) -> list[str]:
    """The faults of a model section, those of the models inside it (a teacher, a student) included."""
    arch, kind = section.get("arch"), section.get("model_type")
    model = registered(registry.get_model_class, arch)
    if model is None:
        return [unknown_name(f"{path}.arch", arch, registry.list_models())]
    types = getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {})
    if kind is not None and not among(types, kind):
        return [unknown_name(f"{path}.model_type", kind, types)]
    adapter = adapter_for(arch)
    options = adapter.option_names() if adapter else set()
    if tells(model, HasSchema):
        found = schema_faults(model.config_schema(), section, path)
    else:
        # without a type, the keys of all types stand for what the model's parts read
        legal = _MODEL_KEYS | options | (keys_of_types(model) if kind is None else set())
        found = _by_example(section, model_defaults(section).get("model", {}), path,
                            legal | (_keys_read_by(model.from_config) or set(section)))  # fmt: skip
    if adapter:
        own = {key: value for key, value in section.items() if key in options}
        found += schema_faults(adapter.options_class, OmegaConf.create(own), path)
    if tells(model, ChecksItself) and not found:
        found += model.config_faults(section, path)
    return found + (model.inner_faults(section, path) if tells(model, HoldsModels) else [])


def section_schema(section: Mapping[str, Any]) -> type | None:
    """The dataclass that a model section must fit; None where its arch has none."""
    model = registered(registry.get_model_class, section.get("arch"))
    return model.config_schema() if tells(model, HasSchema) else None


def inner_models(section: Mapping[str, Any]) -> dict[str, DictConfig]:
    """Return the models inside a distiller's section, each over its own defaults; none for other models."""
    model = registered(registry.get_model_class, section.get("arch"))
    return model.inner_models(section) if tells(model, HoldsModels) else {}


def keys_of_types(model: type) -> set[str]:
    """The keys of the model's default YAML files."""
    kinds = getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {})
    files = [OmegaConf.load(model.default_config_path(kind)) for kind in kinds]
    return {key for file in files for key in file.get("model", {})}


def _datasets_faults(datasets: DictConfig) -> list[str]:
    found = []
    for name, section in datasets.items():
        path, builder = f"datasets.{name}", registry.get_builder_class(name)
        if builder is None:
            found.append(unknown_name(path, name, registry.list_datasets()))
            continue
        if not isinstance(section, DictConfig):
            found.append(f"{path}: {shown(section)} is not a section")
            continue
        types = builder.DATASET_CONFIG_DICT
        kind = section.get("type", "default")
        if not among(types, kind):
            found.append(unknown_name(f"{path}.type", kind, types))
            continue
        found += _dataset_faults(builder, section, path)
    return found


def _dataset_faults(builder: type, section: DictConfig, path: str) -> list[str]:
    default = OmegaConf.load(builder.default_config_path(type=section.get("type", "default")))
    example = default.datasets[next(iter(default.datasets))]
    if tells(builder, ChecksItself):
        legal = {*example, *_DATASET_KEYS}
        found = [unknown_key(path, key, legal) for key in section if key not in legal]
        found += builder.config_faults(section, path)
    else:
        found = _by_example(section, example, path, _DATASET_KEYS)
    return found + processors_faults(OmegaConf.masked_copy(section, [key for key in _KINDS if key in section]), path)


def processors_faults(section: Any, path: str) -> list[str]:
    """Faults of LAVIS's ``vis_processor: {train, eval}`` and ``text_processor: {train, eval}``."""
    if section is None:
        return []
    if not isinstance(section, DictConfig):
        return [f"{path}: {shown(section)} is not a section; expected keys {', '.join(_KINDS)}"]
    found = [unknown_key(path, kind, _KINDS) for kind in section if kind not in _KINDS]
    for kind in _KINDS:
        stages = section.get(kind) or {}
        if not isinstance(stages, DictConfig | dict):
            found.append(f"{path}.{kind}: {shown(stages)} is not a section; expected keys train, eval")
            continue
        for stage, processor in stages.items():
            if stage not in ("train", "eval"):
                found.append(unknown_key(f"{path}.{kind}", stage, ("train", "eval")))
            elif processor is not None:
                found += _processor_faults(processor, f"{path}.{kind}.{stage}")
    return found


def _processor_faults(section: Any, path: str) -> list[str]:
    if not isinstance(section, DictConfig) or "name" not in section:
        return [f"{path}: expected a section with the processor's name; registered: "
                f"{', '.join(registry.list_processors())}"]  # fmt: skip
    processor = registered(registry.get_processor_class, section.name)
    if processor is None:
        return [unknown_name(f"{path}.name", section.name, registry.list_processors())]
    if hasattr(processor, "config_class"):
        return schema_faults(processor.config_class, section, path)
    legal = _keys_read_by(processor.from_config)
    if legal is None:
        return []
    return [unknown_key(path, key, legal | {"name"}) for key in section if key not in legal | {"name"}]


def _keys_read_by(from_config: Any) -> set[str] | None:
    """The keys that a LAVIS class takes from its section, read off its source; None where unknown."""
    try:
        source = inspect.getsource(from_config)
    except (OSError, TypeError):
        return None
    found = re.findall(r"\b(?:cfg|config)(?:\.get\(\s*|\[)[\"'](\w+)[\"']", source)
    return set(found) | (set(re.findall(r"\bcfg\.(\w+)", source)) - {"get"})


def _by_example(section: Any, example: Any, path: str, more: Iterable[str] = ()) -> list[str]:
    """Faults of a section that has no schema, against the default YAML that it overrides."""
    found = []
    legal = {*example, *more}
    for key, value in section.items():
        where, model = f"{path}.{key}", example.get(key)
        if key not in legal:
            found.append(unknown_key(path, key, legal))
        elif key in _KINDS:
            continue
        elif isinstance(model, DictConfig):
            if isinstance(value, DictConfig):
                found += _by_example(value, model, where, _extra(where))
            else:
                found.append(f"{where}: {shown(value)} is not a section; expected keys {', '.join(model)}")
        elif value is not None and isinstance(model, bool | int | float) and not _fits(value, model):
            found.append(f"{where}: {shown(value)} is not of the default's kind ({model!r})")
    return found


def _extra(path: str) -> set[str]:
    parts = path.split(".")
    if parts[-1] == "annotations":
        return _SPLITS
    return {"url", "md5", "storage"} if len(parts) > 1 and parts[-2] == "annotations" else set()


def _fits(value: Any, model: bool | int | float) -> bool:
    if isinstance(model, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(model, bool)
    return isinstance(value, int | float) and math.isfinite(value)
