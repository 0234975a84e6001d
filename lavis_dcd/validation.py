"""Every fault of a job's configuration: names not registered, keys that nothing reads, wrong types."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.schema import faults as schema_faults
from lavis_dcd.common.schema import unknown_key
from lavis_dcd.config import model_defaults
from lavis_dcd.runners.config import RunConfig

_MODEL_KEYS = {"arch", "model_type", "load_finetuned", "load_pretrained", "finetuned", "pretrained"}
_DATASET_KEYS = {"data_type", "data_dir", "type", "build_info", "vis_processor", "text_processor"}
_SPLITS = {"train", "val", "test"}


@dataclass
class _Succession:
    layers: list[int]


def job_faults(config: DictConfig) -> list[str]:
    """One line per fault of a merged job; empty when it is sound. Files are `lavis_dcd.needs`' matter."""
    return _run_faults(config.run) + model_faults(config.model, "model") + _datasets_faults(config.datasets)


def unknown_name(path: str, name: Any, registered: Iterable[str]) -> str:
    """The line that reports a name nobody registered, with the nearest and all the registered ones."""
    names = sorted(registered)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{path}: {name!r} is not registered; {hint}registered: {', '.join(names)}"


def _run_faults(run: DictConfig) -> list[str]:
    found = []
    if run.task not in registry.list_tasks():
        found.append(unknown_name("run.task", run.task, registry.list_tasks()))
    runner = registry.get_runner_class(run.runner)
    if runner is None:
        return [*found, unknown_name("run.runner", run.runner, registry.list_runners())]
    schema = runner.config_schema() if hasattr(runner, "config_schema") else RunConfig
    return found + schema_faults(schema, run, "run")


def model_faults(section: DictConfig, path: str) -> list[str]:
    """The faults of a model section, those of the models inside it (a teacher, a student) included."""
    arch, kind = section.get("arch"), section.get("model_type")
    model = registry.get_model_class(arch)
    if model is None:
        return [unknown_name(f"{path}.arch", arch, registry.list_models())]
    types = getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {})
    if kind is not None and kind not in types:
        return [unknown_name(f"{path}.model_type", kind, types)]
    if hasattr(model, "config_schema"):
        found = schema_faults(model.config_schema(), section, path)
    else:
        found = _by_example(section, model_defaults(section).get("model", {}), path,
                            _MODEL_KEYS | (_keys_read_by(model.from_config) or set(section)))  # fmt: skip
    if hasattr(model, "config_faults") and not found:
        found += model.config_faults(section, path)
    for name, inner in inner_models(section).items():
        found += model_faults(inner, f"{path}.{name}")
    if isinstance((student := section.get("student")), Mapping) and "init_from_teacher" in student:
        found += schema_faults(_Succession, student["init_from_teacher"], f"{path}.student.init_from_teacher")
    return found


def inner_models(section: DictConfig) -> dict[str, DictConfig]:
    """The `teacher` and `student` of a distiller's section, each over its own defaults.

    A student that is thinned from its teacher takes the teacher's `arch`.
    """
    found: dict[str, DictConfig] = {}
    for name in ("teacher", "student"):
        inner = section.get(name)
        if not isinstance(inner, DictConfig):
            continue
        plain = OmegaConf.masked_copy(inner, [key for key in inner if key != "init_from_teacher"])
        if "init_from_teacher" in inner and "arch" not in plain:
            plain = OmegaConf.merge({"arch": section.get("teacher", {}).get("arch")}, plain)
        found[name] = OmegaConf.merge(model_defaults(plain).get("model", {}), plain)
    return found


def _datasets_faults(datasets: DictConfig) -> list[str]:
    found = []
    for name, section in datasets.items():
        path, builder = f"datasets.{name}", registry.get_builder_class(name)
        if builder is None:
            found.append(unknown_name(path, name, registry.list_datasets()))
            continue
        if not isinstance(section, DictConfig):
            found.append(f"{path}: {section!r} is not a section")
            continue
        types = builder.DATASET_CONFIG_DICT
        if section.get("type", "default") not in types:
            found.append(unknown_name(f"{path}.type", section.type, types))
            continue
        found += _dataset_faults(builder, section, path)
    return found


def _dataset_faults(builder: type, section: DictConfig, path: str) -> list[str]:
    default = OmegaConf.load(builder.default_config_path(type=section.get("type", "default")))
    example = default.datasets[next(iter(default.datasets))]
    if hasattr(builder, "config_faults"):
        legal = {*example, *_DATASET_KEYS}
        found = [unknown_key(path, key, legal) for key in section if key not in legal]
        found += builder.config_faults(section, path)
    else:
        found = _by_example(section, example, path, _DATASET_KEYS)
    for kind in ("vis_processor", "text_processor"):
        for stage, processor in (section.get(kind) or {}).items():
            where = f"{path}.{kind}.{stage}"
            if stage not in ("train", "eval"):
                found.append(unknown_key(f"{path}.{kind}", stage, ("train", "eval")))
            elif processor is not None:
                found += _processor_faults(processor, where)
    return found


def _processor_faults(section: Any, path: str) -> list[str]:
    if not isinstance(section, DictConfig) or "name" not in section:
        return [f"{path}: expected a section with the processor's name; registered: "
                f"{', '.join(registry.list_processors())}"]  # fmt: skip
    processor = registry.get_processor_class(section.name)
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
        elif key in ("vis_processor", "text_processor"):
            continue
        elif isinstance(model, DictConfig):
            if isinstance(value, DictConfig):
                found += _by_example(value, model, where, _extra(where))
            else:
                found.append(f"{where}: {value!r} is not a section; expected keys {', '.join(model)}")
        elif value is not None and isinstance(model, bool | int | float) and not _fits(value, model):
            found.append(f"{where}: {value!r} is not of the default's kind ({model!r})")
    return found


def _extra(path: str) -> set[str]:
    parts = path.split(".")
    if parts[-1] == "annotations":
        return _SPLITS
    return {"url", "md5", "storage"} if len(parts) > 1 and parts[-2] == "annotations" else set()


def _fits(value: Any, model: bool | int | float) -> bool:
    if isinstance(model, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(model, bool)
    return isinstance(value, int | float)
