"""Values that come from the environment into a job: its texts show and store where they come from, not what they are.

`${oc.env:TOKEN}` in a job file brings in a value that the file was meant to leave out. Logs, reports and checkpoints
are shared, so they keep the text of the interpolation.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_dcd.common.address_secrets import without_secrets

_SHORTEST = 4  # letters: a shorter value stands in too many words that have nothing to do with it
_SHORTEST_NUMBER = 12  # digits: steps, seeds and numbers of cluster jobs are no secrets
_LONG = 8  # letters: a value so long is hidden inside words, too
_VARIABLE = re.compile(r"oc\.env\s*:\s*[\"']?([^\s,:${}\"'()]+)")
# a resolver of a plug-in; or a variable whose name is itself put together
_OTHER = re.compile(r"\$\{\s*(?!oc\.)[A-Za-z_][\w.]*\s*:|oc\.env\s*:\s*[\"']?\$")

_PLACES = {"name", "path", "root", "storage", "url", "weights", "finetuned", "pretrained"}  # keys of paths
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,31}")

# By value, the text that stands for it. Logging is one per process and so is this: whoever formats a line, in any
# room, must hide the same values. `remember` is its only writer, `forget` empties it for the next job.
_NAMES: dict[str, str] = {}


def forget() -> None:
    """Hide nothing any more: another job is read."""
    _NAMES.clear()


def hides_something() -> bool:
    """Return whether there is any value to hide."""
    return bool(_NAMES)


def remember(config: Any) -> None:
    """Hide the values that `config`'s interpolations take from the environment, or from a resolver of a plug-in."""
    for node in _interpolations(config):
        raw = str(node._value())
        for name in _VARIABLE.findall(raw):  # also of one that cannot be resolved: the error may show the value
            _add(os.environ.get(name), f"${{oc.env:{name}}}")
        if _OTHER.search(raw):  # the whole text stands for the whole value
            # a plug-in's resolver may raise anything; that is told where the setting is read
            with suppress(Exception):
                value = node._dereference_node()
                plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value._value()
                for leaf in _leaves(plain):
                    _add(leaf, raw)


def _interpolations(config: Any) -> Iterator[Any]:
    """Yield the nodes of a configuration that are interpolations."""
    if not isinstance(config, DictConfig | ListConfig) or config._is_none() or config._is_missing():
        return
    keys = range(len(config)) if isinstance(config, ListConfig) else list(config.keys())
    for key in keys:
        node: Any = config._get_node(key, validate_access=False)
        if node is not None and node._is_interpolation():
            yield node
        else:
            yield from _interpolations(node)


def _add(value: str | None, name: str) -> None:
    for spelt in () if value is None else (value, os.path.normpath(value)):
        if len(spelt) >= (_SHORTEST_NUMBER if spelt.isdigit() else _SHORTEST):
            _NAMES.setdefault(spelt, name)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def hidden(text: str) -> str:
    """Return a text with the names of the variables in place of their values, however the text quotes them.

    Passwords, tokens and signatures in addresses are left out as well.
    """
    for value in sorted(_NAMES, key=len, reverse=True):
        for spelt in dict.fromkeys((value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe=""))):
            if spelt in text:
                text = _word(spelt).sub(_NAMES[value].replace("\\", r"\\"), text)
    return without_secrets(text)


def _word(value: str) -> re.Pattern[str]:
    """Return the pattern of a value: a short one stands for itself, not inside a longer word."""
    short = len(value) < _LONG
    before = r"(?<!\w)" if short and value[0].isalnum() else ""
    after = r"(?!\w)" if short and value[-1].isalnum() else ""
    return re.compile(f"{before}{re.escape(value)}{after}")


def as_stored(value: Any) -> Any:
    """Return plain containers with every text in them `hidden`."""
    if isinstance(value, Mapping):
        return {key: as_stored(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_stored(item) for item in value)
    return hidden(value) if isinstance(value, str) else value


def as_exported(config: Any) -> Any:
    """Return the configuration in a file of weights as it is stored; words such as "bert" stay, whatever equals them.

    The file's readers need them, and what a schema takes as the name of a family or a pooling is no secret.
    """
    if isinstance(config, Mapping):
        return {key: as_stored(item) if key in _PLACES else as_exported(item) for key, item in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(as_exported(item) for item in config)
    return config if isinstance(config, str) and _IDENTIFIER.fullmatch(config) else as_stored(config)


def as_written(resolved: Any, section: Any) -> Any:
    """Return plain containers with the text of an interpolation wherever `section` has one.

    Args:
        resolved: the section's values as the job reads them, perhaps with defaults that the section lacks.
        section: a configuration that may have interpolations.
    """
    if not isinstance(section, DictConfig | ListConfig) or section._is_none() or section._is_missing():
        return resolved
    if isinstance(resolved, Mapping) and isinstance(section, DictConfig):
        return {key: _item_as_written(item, section, key) for key, item in resolved.items()}
    if isinstance(resolved, list | tuple) and isinstance(section, ListConfig) and len(resolved) == len(section):
        return [_item_as_written(item, section, key) for key, item in enumerate(resolved)]
    return resolved


def _item_as_written(item: Any, section: Any, key: Any) -> Any:
    node: Any = section._get_node(key, validate_access=False)
    if node is None:
        return item
    return str(node._value()) if node._is_interpolation() else as_written(item, node)
