"""Every fault of a job's configuration: names not registered, keys that nothing reads, wrong types."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_dcd.common.schema import faults as schema_faults
from lavis_dcd.common.schema import unknown_key
from lavis_dcd.common.texts import shown
from lavis_dcd.config.job_file import among, model_defaults, registered
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.models.dcd.config import DISTILLER_KEYS, SuccessionConfig

_MODEL_KEYS = {"arch", "model_type", "load_finetuned", "load_pretrained", "finetuned", "pretrained"}
_DATASET_KEYS = {"data_type", "data_dir", "type", "build_info", "vis_processor", "text_processor"}
_SPLITS = {"train", "val", "test"}
_KINDS = ("vis_processor", "text_processor")


@dataclass
class _Weight:
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight: {self.weight} is negative")


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
    schema = runner.config_schema() if hasattr(runner, "config_schema") else RunConfig
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
    if hasattr(model, "config_schema"):
        found = schema_faults(model.config_schema(), section, path)
    else:
        # without a type, the keys of all types stand for what the model's parts read
        legal = _MODEL_KEYS | options | (_keys_of_types(model) if kind is None else set())
        found = _by_example(section, model_defaults(section).get("model", {}), path,
                            legal | (_keys_read_by(model.from_config) or set(section)))  # fmt: skip
    if adapter:
        own = {key: value for key, value in section.items() if key in options}
        found += schema_faults(adapter.options_class, OmegaConf.create(own), path)
    if hasattr(model, "config_faults") and not found:
        found += model.config_faults(section, path)
    return found + _inner_faults(section, path)


def _inner_faults(section: DictConfig, path: str) -> list[str]:
    """Faults of a distiller's teachers and student; none in sections of other models."""
    fields = getattr(section_schema(section), "__dataclass_fields__", {})
    found: list[str] = []
    if {"teacher", "teachers"} <= set(fields) and bool(section.get("teacher")) == bool(section.get("teachers")):
        found.append(f"{path}.teachers: give either teacher: or teachers:")
    for name, inner in inner_models(section).items():
        where, role = f"{path}.{name}", name.partition(".")[0]
        if found and role == "student" and inner.get("arch") is None:
            continue  # it would be the teacher's
        of_model = model_faults(inner, where)
        found += of_model
        if role != "student" and not of_model and _names_no_weights(inner):
            found.append(
                f"{where}: names no weights (finetuned or pretrained): a teacher with random weights teaches noise; "
                f"name a checkpoint ({where}.finetuned=FILE, with load_finetuned: true)"
            )
        given = OmegaConf.select(section, name)
        found += _preprocess_faults(given.get("preprocess"), f"{where}.preprocess")
        if role == "teachers" and "weight" in given:
            found += schema_faults(_Weight, {"weight": given.weight}, where)
        if "init_from_teacher" in given and role == "student":
            found += _succession_faults(given, section, f"{where}.init_from_teacher")
    return found


def _succession_faults(student: DictConfig, section: DictConfig, path: str) -> list[str]:
    start = student.init_from_teacher
    if found := schema_faults(SuccessionConfig, start, path):
        return found
    first = next((part for name, part in inner_models(section).items() if name != "student"), {})
    arch = first.get("arch")
    teacher = registered(adapter_for, arch) or registered(registry.get_model_class, arch)
    if start.get("layers") and teacher is not None and not hasattr(teacher, "init_from_teacher"):
        return [f"{path}.layers: {arch} cannot be thinned; leave init_from_teacher out, and name the student's arch"]
    return []


def _preprocess_faults(section: Any, path: str) -> list[str]:
    found = _processors_faults(section, path)
    if found or section is None:
        return found
    # without it, evaluation would read through the data set's own, perhaps of another size
    return [f"{path}.{kind}: has no eval, through which evaluation reads"
            for kind, stages in section.items() if stages and stages.get("eval") is None]  # fmt: skip


def section_schema(section: Mapping[str, Any]) -> type | None:
    """The dataclass that a model section must fit; None where its arch has none."""
    model = registered(registry.get_model_class, section.get("arch"))
    return model.config_schema() if hasattr(model, "config_schema") else None


def _names_no_weights(section: DictConfig) -> bool:
    """Whether the arch takes its weights by ``finetuned`` or ``pretrained`` and the section, over its defaults, names
    none."""
    model = registry.get_model_class(section.arch)
    schema = section_schema(section)
    known = {*section, *_keys_of_types(model)} if schema is None else set(schema.__dataclass_fields__)
    if not known & {"finetuned", "pretrained"}:
        return False
    return not ((section.get("load_finetuned", True) and section.get("finetuned")) or section.get("pretrained"))


def _keys_of_types(model: type) -> set[str]:
    """The keys of the model's default YAML files."""
    kinds = getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {})
    files = [OmegaConf.load(model.default_config_path(kind)) for kind in kinds]
    return {key for file in files for key in file.get("model", {})}


def inner_models(section: DictConfig) -> dict[str, DictConfig]:
    """The models inside a distiller's section, each over its own defaults: "teacher", or "teachers.0" and so on, and
    "student".

    What the distiller itself reads of their sections (``preprocess``, ``weight``, ``init_from_teacher``) is left out.
    A student that is thinned from its teacher takes the (first) teacher's `arch`.
    """
    several = section.get("teachers")
    several = several if isinstance(several, ListConfig) else []
    given = {"teacher": section.get("teacher"), **{f"teachers.{i}": part for i, part in enumerate(several)}}
    given = {name: part for name, part in given.items() if isinstance(part, DictConfig) and part}
    first = next(iter(given.values()), {})
    student = section.get("student")
    if isinstance(student, DictConfig):
        given["student"] = student
    found: dict[str, DictConfig] = {}
    for name, inner in given.items():
        ours = DISTILLER_KEYS[name.partition(".")[0]]
        plain = OmegaConf.masked_copy(inner, [key for key in inner if key not in ours])
        if name == "student" and "init_from_teacher" in inner and "arch" not in plain:
            plain = OmegaConf.merge({"arch": first.get("arch")}, plain)
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
    if hasattr(builder, "config_faults"):
        legal = {*example, *_DATASET_KEYS}
        found = [unknown_key(path, key, legal) for key in section if key not in legal]
        found += builder.config_faults(section, path)
    else:
        found = _by_example(section, example, path, _DATASET_KEYS)
    return found + _processors_faults(OmegaConf.masked_copy(section, [key for key in _KINDS if key in section]), path)


def _processors_faults(section: Any, path: str) -> list[str]:
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
