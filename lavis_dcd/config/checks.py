"""Check a merged job: names that are not registered, keys that nothing reads, wrong types and values."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import faults as schema_faults
from lavis_dcd.common.schema import parse, unknown_key
from lavis_dcd.common.texts import one_line, shown
from lavis_dcd.config.batches_section import BANK, TEACHER
from lavis_dcd.config.contracts import (
    ChecksItself,
    HasSchema,
    HoldsModels,
    LearnsFromNegatives,
    LearnsWithoutPairs,
    TellsOfPairs,
    tells,
)
from lavis_dcd.config.job_file import among, model_defaults, registered
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.matching.adapters.registry import adapter_for

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRIEVAL_TASK = "dcd_retrieval"
_MODEL_KEYS = {"arch", "model_type", "load_finetuned", "load_pretrained", "finetuned", "pretrained"}
_DATASET_KEYS = {"data_type", "data_dir", "type", "build_info", "vis_processor", "text_processor"}
_BELOW_ANNOTATIONS = {"train", "val", "test", "url", "md5", "storage"}
_KINDS = ("vis_processor", "text_processor")


@dataclass(frozen=True)
class CheckedSections:
    """A merged job's faults, one line each, and its sections as dataclasses.

    Args:
        faults: empty when the job is sound. Files are checked by ``lavis_dcd.config.required_files``.
        run: the ``run:`` section; None where it has faults.
        model: the ``model:`` section; None where it has faults, or its arch has no schema.
    """

    faults: list[str]
    run: RunConfig | None
    model: Any


def check_sections(config: DictConfig) -> CheckedSections:
    """Check a merged job; nothing is built. A key that may be a mistake, but need not, is a warning in the log."""
    run, faults = _check_run(config.run)
    model, of_model = _check_model(config.model, "model")
    faults += of_model + _datasets_faults(config.datasets)
    # another runner may have a schema of its own
    if isinstance(run, RunConfig) and not of_model:
        faults += _shortlist_faults(run, config.model) + _unpaired_faults(run, config)
        faults += _batches_faults(run, config.model)
        _warn_of_single_pairs(run, config.model)
    return CheckedSections(faults, run, model)


def model_faults(section: DictConfig, path: str) -> list[str]:
    """Return the faults of a model section, those of the models inside it (a teacher, a student) included."""
    return _check_model(section, path)[1]


def unknown_name(path: str, name: Any, registered: Iterable[str]) -> str:
    """Return the line that reports a name nobody registered, with the nearest and all the registered ones."""
    names = sorted(registered)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{path}: {shown(name)} is not registered; {hint}registered: {', '.join(names)}"


def _parsed(schema: type[T], section: Any, path: str) -> tuple[T | None, list[str]]:
    """Return a section as its dataclass, or None and its faults."""
    try:
        return parse(schema, section, path), []
    except UserError as error:
        return None, error.faults


def _check_run(run: DictConfig) -> tuple[RunConfig | None, list[str]]:
    faults = []
    if run.task not in registry.list_tasks():
        faults.append(unknown_name("run.task", run.task, registry.list_tasks()))
    runner = registered(registry.get_runner_class, run.runner)
    if runner is None:
        return None, [*faults, unknown_name("run.runner", run.runner, registry.list_runners())]
    schema = runner.config_schema() if tells(runner, HasSchema) else RunConfig
    section, of_section = _parsed(schema, run, "run")
    return section, faults + of_section


def _shortlist_faults(run: RunConfig, section: DictConfig) -> list[str]:
    """Return a line where ``run.shortlist`` names none of the matchers that the job evaluates."""
    if run.task != _RETRIEVAL_TASK or run.k_test is None or run.shortlist in (None, "joint"):
        return []
    model = registry.get_model_class(section.arch)
    names = model.matcher_names(section) if tells(model, HoldsModels) else ["model"]
    if run.shortlist in names:
        return []
    return [f"run.shortlist: {run.shortlist!r} is none of this job's matchers: {', '.join(['joint', *names])}"]


def _unpaired_faults(run: RunConfig, config: DictConfig) -> list[str]:
    """Return a line for each setting that needs pairs, where a data set has pictures and texts that are none."""
    builders = {name: registry.get_builder_class(name) for name in config.datasets}
    unpaired = [
        name for name, builder in builders.items() if tells(builder, TellsOfPairs) and not builder.gives_pairs()
    ]
    if not unpaired or run.evaluate:
        return []
    where, section = f"datasets.{unpaired[0]} has pictures and texts that do not belong together", config.model
    found = []
    if grouped := next((key for key in ("batch_by", "batches") if getattr(run, key) is not None), None):
        found.append(f"run.{grouped}: {where}: they come beside others in every epoch; leave it out")
    model = registry.get_model_class(section.arch)
    if not tells(model, LearnsWithoutPairs):
        return [*found, f"model.arch: {section.arch} learns from pairs, and {where}; distil a student of it, with "
                        "arch: dcd and model.candidates.match: teacher"]  # fmt: skip
    return found + [f"{fault} ({where})" for fault in model.pair_faults(section, "model")]


def _batches_faults(run: RunConfig, section: DictConfig) -> list[str]:
    """Return a line per fault of ``run.batches``; an evaluation makes no batches, so that nothing is wrong with it."""
    batches = run.batches
    if batches is None or run.evaluate:
        return []
    found = batches.faults(run.batch_size_train * _processes())
    if batches.of_neighbours:
        found += _neighbours_faults(batches.by, registry.get_model_class(section.arch), section)
    return found


def _neighbours_faults(by: str, model: Any, section: DictConfig) -> list[str]:
    if not tells(model, HoldsModels):
        return [
            f"run.batches.by: {by}, but {section.arch} has no teacher; train it as a student (arch: dcd), name a key "
            "of the annotation's rows, or leave run.batches out"
        ]
    if by == TEACHER and TEACHER not in model.matcher_names(section):
        return [
            f"run.batches.by: {by}, but with model.candidates.source: bank no teacher is built; take the neighbours "
            f"from that bank, too (run.batches.by={BANK})"
        ]
    return []


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _warn_of_single_pairs(run: RunConfig, section: DictConfig) -> None:
    """Log that a batch of one pair has no negatives, where that is certain."""
    model = registered(registry.get_model_class, section.arch)
    if run.evaluate or run.batch_size_train * _processes() > 1 or not tells(model, LearnsFromNegatives):
        return
    if model.negatives_in_batch_only(section):
        log.warning(
            "run.batch_size_train: 1 leaves no negatives, since %s compares the pairs of a batch: the loss is 0 for "
            "ever and nothing is learnt; raise it, or take candidates from elsewhere (model.candidates.source)",
            section.arch,
        )


def _check_model(section: DictConfig, path: str) -> tuple[Any, list[str]]:
    """Return a model section as the dataclass of its arch (None without one), and its faults."""
    arch, kind = section.get("arch"), section.get("model_type")
    model = registered(registry.get_model_class, arch)
    if model is None:
        return None, [unknown_name(f"{path}.arch", arch, registry.list_models())]
    types = getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {})
    if kind is not None and not among(types, kind):
        return None, [unknown_name(f"{path}.model_type", kind, types)]
    adapter = adapter_for(arch)
    options = adapter.option_names() if adapter else set()
    parsed = None
    if tells(model, HasSchema):
        parsed, found = _parsed(model.config_schema(), section, path)
    else:
        example = model_defaults(section).get("model", {})
        # without a type, the keys of all types stand for those that the model's parts read
        known = keys_of_types(model) if kind is None else set(example)
        more = _MODEL_KEYS | options | known | (_constructor_names(model) or set())
        found = _faults_by_example(section, example, path, more if known else set(section))
    if adapter:
        given = {key: value for key, value in section.items() if key in options}
        found += schema_faults(adapter.options_class, OmegaConf.create(given), path)
    if tells(model, ChecksItself) and not found:
        found += model.config_faults(section, path)
    return parsed, found + (model.inner_faults(section, path) if tells(model, HoldsModels) else [])


def section_schema(section: Mapping[str, Any]) -> type | None:
    """Return the dataclass that a model section must fit; None where its arch has none."""
    model = registered(registry.get_model_class, section.get("arch"))
    return model.config_schema() if tells(model, HasSchema) else None


def inner_models(section: Mapping[str, Any]) -> dict[str, DictConfig]:
    """Return the models inside a distiller's section, each over its own defaults; none for other models."""
    model = registered(registry.get_model_class, section.get("arch"))
    return model.inner_models(section) if tells(model, HoldsModels) else {}


def keys_of_types(model: Any) -> set[str]:
    """Return the keys of the model's default YAML files."""
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


def _dataset_faults(builder: Any, section: DictConfig, path: str) -> list[str]:
    default = OmegaConf.load(builder.default_config_path(type=section.get("type", "default")))
    example = default.datasets[next(iter(default.datasets))]
    if tells(builder, ChecksItself):
        legal = {*example, *_DATASET_KEYS}
        found = [unknown_key(path, key, legal) for key in section if key not in legal]
        found += builder.config_faults(section, path)
    else:
        found = _faults_by_example(section, example, path, _DATASET_KEYS)
    return found + processors_faults(OmegaConf.masked_copy(section, [key for key in _KINDS if key in section]), path)


def processors_faults(section: Any, path: str) -> list[str]:
    """Return the faults of LAVIS's ``vis_processor: {train, eval}`` and ``text_processor: {train, eval}``."""
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
    if tells(processor, HasSchema):
        return schema_faults(processor.config_schema(), section, path)
    known = _constructor_names(processor)
    if known is not None:
        _warn_of_unknown_keys(section, known | {"name"}, path)
    return []


def _constructor_names(built: Any) -> set[str] | None:
    """Return the names that a class's constructor takes, usually the keys of its section; None if it takes any."""
    parameters = inspect.signature(built.__init__).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters} - {"self"}


def _warn_of_unknown_keys(section: DictConfig, known: Collection[str], path: str) -> None:
    """Log the keys that a class without a schema may never read; whether it does, only its own code could tell."""
    for key in section:
        if key not in known:
            names = sorted(known)
            near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            where = one_line(f"{path}.{key}")
            log.warning(
                "%s: no default has this key, so nothing may read it; %sknown: %s", where, hint, ", ".join(names)
            )


def _faults_by_example(section: DictConfig, example: Any, path: str, more: Iterable[str] = ()) -> list[str]:
    """Return the faults of a section that has no schema: values of another kind than those of the default YAML.

    Args:
        example: the default that the section overrides.
        more: keys beside the example's that are known; others are warned of.
    """
    _warn_of_unknown_keys(section, {*example, *more}, path)
    found = []
    for key, value in section.items():
        where, default = f"{path}.{key}", example.get(key)
        if key in _KINDS:
            continue
        if isinstance(default, DictConfig):
            if isinstance(value, DictConfig):
                found += _faults_by_example(value, default, where, _BELOW_ANNOTATIONS if "annotations" in where else ())
            else:
                found.append(f"{where}: {shown(value)} is not a section; expected keys {', '.join(default)}")
        elif value is not None and isinstance(default, bool | int | float) and not _same_kind(value, default):
            found.append(f"{where}: {shown(value)} is not of the default's kind ({default!r})")
    return found


def _same_kind(value: Any, default: bool | int | float) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, int | float) and math.isfinite(value)
