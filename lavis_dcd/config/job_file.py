"""Read a job: its YAML file, the options over it, the defaults under it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.schema import unknown_key
from lavis_dcd.common.texts import one_line, shown
from lavis_dcd.config.bounds import (
    MOST_BYTES,
    MOST_LETTERS,
    MOST_VALUES,
    bounded_text,
    check_aliases,
    resolved_too_large,
)

_SECTIONS = ("model", "datasets", "run", "preprocess")
_REQUIRED = ("model", "datasets")
_NAMES = ("arch", "model_type")
_TO_BE_GIVEN = "???"
# Besides its own errors, the reader raises what Python's number and date types make of a tagged or misspelt value.
_NO_YAML = (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, LookupError, OverflowError)


def read_job(cfg_path: str, options: Sequence[str] = (), evaluate: bool = False) -> tuple[DictConfig, Path]:
    """Return a job's sections as written, the options over them, and the file they stand in; nothing is checked.

    From here on, the values that they take from the environment are hidden in every message.
    """
    path = find_config(cfg_path)
    user = merge(read_yaml(path), parse_options(options))
    if evaluate:
        user = merge(user, OmegaConf.create({"run": {"evaluate": True}}))
    if resolved_too_large(user):
        raise UserError(f"{path}: its interpolations (${{...}}) stand for more than {MOST_VALUES:,} values")
    secrets.forget()
    secrets.remember(user)
    return user, path


def find_config(cfg_path: str) -> Path:
    """Return `cfg_path` in the current folder if it is there, else among the packaged jobs.

    Raises:
        UserError: in neither; the packaged jobs are listed.
    """
    here = Path(os.path.expanduser(cfg_path))
    if os.path.isfile(here):
        return here
    if os.path.isdir(here):
        raise UserError(f"--cfg-path {cfg_path}: is a folder; name a YAML file")
    if os.path.exists(here):
        raise UserError(f"--cfg-path {cfg_path}: is no regular file but a device, a pipe or the like; name a YAML file")
    try:
        packaged = packaged_folder("projects")
    except FileNotFoundError as error:
        raise UserError(f"--cfg-path {cfg_path}: no such file ({error})") from error
    parts = here.parts[1:] if here.parts[:1] == ("projects",) else here.parts
    if not here.is_absolute() and os.path.isfile(path := packaged.joinpath(*parts)):
        return path
    names = sorted(f"projects/{p.relative_to(packaged).as_posix()}" for p in packaged.glob("*/*.yaml"))
    raise UserError(
        f"--cfg-path {cfg_path}: no such file in {Path.cwd()}, and none of the packaged: {', '.join(names)}"
    )


def read_yaml(path: Path) -> DictConfig:
    """Return the mapping in a YAML file.

    Raises:
        UserError: it is no YAML, or no mapping.
    """
    try:
        text = bounded_text(path)
        check_aliases(text)
        content = OmegaConf.load(io.StringIO(text))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as YAML: it is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: not readable: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not readable as YAML: nested too deeply") from error
    except _NO_YAML as error:
        raise UserError(f"{path}: not readable as YAML: {_in_one_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: expected sections {', '.join(_REQUIRED)}")
    return content


def _in_one_line(error: Exception) -> str:
    return one_line(" ".join(str(error).split()) or type(error).__name__)


def parse_options(options: Sequence[str]) -> DictConfig:
    """Return `a.b=c` items, or LAVIS's `a.b c` pairs, as a nested mapping; values are read as YAML.

    Raises:
        UserError: one line per item that is neither.
    """
    faults, pairs, rest = [], [], list(options)
    if sum(map(len, rest)) > MOST_BYTES:
        raise UserError(f"--options: they have more than {MOST_BYTES:,} letters; put them into the file")
    while rest:
        item = rest.pop(0)
        if "=" not in item and rest:
            item = f"{item}={rest.pop(0)}"
        key, equals, _ = item.partition("=")
        if len(item) > MOST_LETTERS:
            faults.append(f"--options {one_line(item, 80)}: has {len(item):,} letters, {MOST_LETTERS:,} are the most")
            continue
        if not equals or not all(part.strip() for part in key.split(".")):
            faults.append(f"--options {one_line(item)}: expected key=value, as in run.max_epoch=3")
            continue
        pairs.append(item)
    merged = OmegaConf.create({})
    for item in pairs:
        try:
            check_aliases(item.partition("=")[2])
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        except (*_NO_YAML, RecursionError) as error:
            faults.append(f"--options {one_line(item)}: {_in_one_line(error)}")
    if faults:
        raise UserError(faults)
    return merged


def merge(*sections: DictConfig) -> DictConfig:
    """Merge sections, each over those before it.

    Raises:
        UserError: one has a list where another has keys, or a number where another has the same in quotes.
    """
    merged = OmegaConf.create({})
    for section in sections:
        if found := _clashes(merged, section, ""):
            raise UserError(found)
        try:
            merged = OmegaConf.merge(merged, section)
        except OmegaConfBaseException as error:
            raise UserError(one_line(f"{error.full_key}: {str(error).splitlines()[0]}")) from error
    return merged


def _clashes(under: Any, over: Any, path: str) -> list[str]:
    kinds = {DictConfig: "a section", ListConfig: "a list"}
    if type(under) not in kinds or type(over) not in kinds or under._is_none() or over._is_none():
        return []
    if type(under) is not type(over):
        return [f"{path}: {kinds[type(over)]}, expected {kinds[type(under)]}"]
    if isinstance(under, ListConfig) or under._is_interpolation() or over._is_interpolation():
        return []
    both = [key for key in over if key in under]
    pairs = {key: (under._get_node(key), over._get_node(key)) for key in both}
    return [line for key, pair in pairs.items() for line in _clashes(*pair, f"{path}.{key}" if path else str(key))]


def refuse_unusable(user: DictConfig, path: Path) -> None:
    """Refuse a job that lacks a section, has one too many, or holds values that cannot be resolved.

    Args:
        user: the job's sections as written.
        path: the file they stand in.

    Raises:
        UserError: one line per fault.
    """
    faults = [unknown_key("", key, _SECTIONS) for key in user if key not in _SECTIONS]
    try:
        content = OmegaConf.to_container(user, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")
        raise UserError([*faults, f"{error.full_key}: {reason}"]) from error
    for name in _REQUIRED:
        if not content.get(name):
            faults.append(f"{path}: the section {name}: is missing or empty")
    for name, section in content.items():
        if name in _SECTIONS and not isinstance(section, dict):
            faults.append(f"{path}: {name}: {shown(section)} is not a section")
    faults += _unusable(content, "")
    if faults:
        raise UserError(faults)


def _unusable(content: Any, path: str) -> list[str]:
    """Return the faults that hide all others: names that are no text, texts that no file can be called by, and
    OmegaConf's mark for a value to be given."""
    if isinstance(content, str) and "\0" in content:
        return [f"{path}: {shown(content)} has a NUL character, which no setting can have"]
    if content == _TO_BE_GIVEN:
        return [f"{path}: {_TO_BE_GIVEN} stands for a value; give one"]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = []
    for key, value in items:
        where = f"{path}.{key}" if path else str(key)
        if "\0" in where:
            return [f"{one_line(where)}: a name with a NUL character"]
        if key in _NAMES and path.partition(".")[0] == "model" and not isinstance(value, str | None):
            found.append(one_line(f"{where}: {shown(value)} is no name"))
        else:
            found += _unusable(value, where)
    return found


def merge_defaults(user: DictConfig) -> DictConfig:
    """Merge the user's sections over the default YAML files of the model type and of every data set.

    A name that is not registered contributes no defaults; `lavis_dcd.config.checks` reports it.
    """
    merged = OmegaConf.create({"run": {"task": "dcd_retrieval", "runner": "runner_dcd"}})
    model = model_defaults(user.model)
    for name, section in user.datasets.items():
        kind = section.get("type", "default") if isinstance(section, DictConfig) else None
        files = getattr(registry.get_builder_class(name), "DATASET_CONFIG_DICT", {})
        if among(files, kind):
            default = OmegaConf.load(registry.get_builder_class(name).default_config_path(type=kind))
            merged = OmegaConf.merge(merged, {"datasets": {name: default.datasets.get(name, {})}})
    return merge(merged, model, user)


def model_defaults(section: DictConfig) -> DictConfig:
    """Return the default YAML (`model:`, perhaps `preprocess:`) of a section's `arch` and `model_type`, or {}."""
    model = registered(registry.get_model_class, section.get("arch"))
    types = getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {})
    kind = section.get("model_type")
    if kind is None and len(types) == 1:
        kind = next(iter(types))
    return OmegaConf.load(model.default_config_path(kind)) if among(types, kind) else OmegaConf.create({})


def registered(find: Callable[[str], Any], name: Any) -> Any:
    """Return the class that is registered under a name; None where none is, or the name is no text."""
    return find(name) if isinstance(name, str) else None


def among(names: Collection[str], name: Any) -> bool:
    """Return whether a value that a user wrote, of any kind, is one of the names."""
    return isinstance(name, str) and name in names
