"""Check a configuration mapping against a dataclass, collecting every fault, and build the instance."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import BooleanNode, EnumNode, FloatNode, IntegerNode, PathNode, StringNode

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line, shown

T = TypeVar("T")

_NODES = {int: IntegerNode, float: FloatNode, bool: BooleanNode, str: StringNode, Path: PathNode}
_FAILED = object()


def parse(cls: type[T], mapping: Any, path: str = "model") -> T:
    """Build `cls` from a mapping (a dict, a `DictConfig`, or None for an empty one).

    Supports nested and optional dataclasses, `Optional`, unions, `Literal`, enums, `Path`, `list[...]`,
    `tuple[...]`, `dict[..., ...]` and `Any`. An optional section may also be `true` (all its defaults) or `false`.
    A class may check its values in `__post_init__` by raising `ValueError` or `UserError`.

    Raises:
        UserError: one line per fault: unknown key, missing key, wrong type.
    """
    found: list[str] = []
    value: T = _dataclass(cls, plain(mapping), path, found)
    if found:
        raise UserError(found)
    return value


def faults(cls: type, mapping: Any, path: str) -> list[str]:
    """Return the faults that `parse` would raise, one line each; empty when the mapping is sound."""
    found: list[str] = []
    _dataclass(cls, plain(mapping), path, found)
    return found


def unknown_key(path: str, key: Any, legal: typing.Iterable[str]) -> str:
    """Return the line that reports a key (or name) nothing reads, with the nearest legal ones."""
    names = sorted(str(name) for name in legal)
    near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    where = one_line(f"{path}.{key}" if path else str(key))
    return f"{where}: unknown key; {hint}legal keys: {', '.join(names) or '(none)'}"


def plain(section: Any) -> Any:
    """Return ``section`` as plain containers, which a checkpoint or a hash may hold; ``None`` as an empty mapping."""
    if OmegaConf.is_config(section):
        return OmegaConf.to_container(section, resolve=True)
    if isinstance(section, Mapping):
        return {key: plain(value) if OmegaConf.is_config(value) else value for key, value in section.items()}
    return {} if section is None else section


def _dataclass(cls: type, mapping: Any, path: str, found: list[str]) -> Any:
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        found.append(f"{path}: {shown(mapping)} is not a section; expected keys {', '.join(_names(cls))}")
        return _FAILED
    before = len(found)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    found += [unknown_key(path, key, fields) for key in mapping if key not in fields]
    values = {}
    for name, field in fields.items():
        value = mapping.get(name, "???")
        if isinstance(value, str) and value == "???":
            if _required(field):
                found.append(f"{path}.{name}: missing; expected {_spell(hints[name])}")
            continue
        values[name] = _value(hints[name], value, f"{path}.{name}", found)
    return _FAILED if len(found) > before else _build(cls, values, path, found)


def _build(cls: type, values: dict[str, Any], path: str, found: list[str]) -> Any:
    try:
        return cls(**values)
    except UserError as error:
        found.extend(error.faults)
    except ValueError as error:
        found.append(f"{path}: {error}")
    return _FAILED


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, path: str, found: list[str]) -> Any:
    if hint is Any or hint is object:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(hint, value, path, found)
    if origin is typing.Literal:
        return _literal(hint, value, path, found)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, found)
    container = origin or hint
    if container in (list, tuple, typing.get_origin(typing.Sequence)):
        return _sequence(hint, container, value, path, found)
    if isinstance(container, type) and issubclass(container, Mapping):
        return _mapping(hint, value, path, found)
    return _leaf(hint, value, path, found)


def _union(hint: Any, value: Any, path: str, found: list[str]) -> Any:
    arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
    if value is None and len(arms) < len(typing.get_args(hint)):
        return None
    if len(arms) == 1:
        (arm,) = arms
        if isinstance(value, bool) and isinstance(arm, type) and dataclasses.is_dataclass(arm):
            return _dataclass(arm, {}, path, found) if value else None  # an optional section, on or off
        return _value(arm, value, path, found)
    # An arm of the value's very type goes first, so that "3" stays text in `int | str`.
    for arm in sorted(arms, key=lambda arm: arm is not type(value)):
        tried: list[str] = []
        result = _value(arm, value, path, tried)
        if not tried:
            return result
    found.append(_wrong(hint, value, path))
    return _FAILED


def _literal(hint: Any, value: Any, path: str, found: list[str]) -> Any:
    choices = typing.get_args(hint)
    if isinstance(value, bool) and value not in [c for c in choices if isinstance(c, bool)]:
        # YAML 1.1 reads the bare words off/no and on/yes as booleans.
        words = ("on", "yes", "true") if value else ("off", "no", "false")
        value = next((word for word in words if word in choices), value)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    hint_line = f"; did you mean {near[0]}?" if near else ""
    found.append(f"{path}: {shown(value)} is not one of {', '.join(map(str, choices))}{hint_line}")
    return _FAILED


def _sequence(hint: Any, container: Any, value: Any, path: str, found: list[str]) -> Any:
    if not isinstance(value, (list, tuple)):
        found.append(_wrong(hint, value, path))
        return _FAILED
    arms = typing.get_args(hint)
    if container is tuple and arms and arms[-1] is not Ellipsis:
        if len(arms) != len(value):
            found.append(f"{path}: {shown(value)} has {len(value)} items, expected {len(arms)}")
            return _FAILED
        kinds = list(arms)
    else:
        kinds = [arms[0] if arms else Any] * len(value)
    pairs = zip(kinds, value, strict=True)
    items = [_value(kind, item, f"{path}[{i}]", found) for i, (kind, item) in enumerate(pairs)]
    return tuple(items) if container is tuple else items


def _mapping(hint: Any, value: Any, path: str, found: list[str]) -> Any:
    if not isinstance(value, Mapping):
        found.append(_wrong(hint, value, path))
        return _FAILED
    key_hint, value_hint = typing.get_args(hint) or (Any, Any)
    return {
        _value(key_hint, key, f"{path} key", found): _value(value_hint, item, f"{path}.{key}", found)
        for key, item in value.items()
    }


def _leaf(hint: Any, value: Any, path: str, found: list[str]) -> Any:
    if hint is str and value is False:
        return "off"  # YAML 1.1 reads the bare word off as False
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 is a float to YAML
    mistaken = isinstance(value, bool) and hint in (str, int, float)
    if not mistaken and value is not None:
        try:
            if isinstance(hint, type) and issubclass(hint, enum.Enum):
                return EnumNode(hint, value=value, is_optional=False)._value()
            if hint in _NODES:
                return _finite(_NODES[hint](value=value, is_optional=False)._value(), path, found)
            if isinstance(hint, type) and isinstance(value, hint):
                return value
        except OmegaConfBaseException:
            pass
    found.append(_wrong(hint, value, path))
    return _FAILED


def _finite(value: Any, path: str, found: list[str]) -> Any:
    # NaN compares as neither too small nor too large, so no check of a range would see it
    if isinstance(value, float) and not math.isfinite(value):
        found.append(f"{path}: {value} is not a finite number")
        return _FAILED
    return value


def _wrong(hint: Any, value: Any, path: str) -> str:
    return f"{path}: {shown(value)} ({_spell(type(value))}) is not {_spell(hint)}"


def _spell(hint: Any) -> str:
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "null",
        dict: "a section",
        list: "a list",
    }
    if hint in names:
        return names[hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(arm) for arm in typing.get_args(hint))
    if origin is list:
        return f"a list of ({_spell(typing.get_args(hint)[0])})"
    if origin is dict:
        return "a section"
    return str(hint) if origin else getattr(hint, "__name__", str(hint))
