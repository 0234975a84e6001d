"""Bounds of what a job file may make of a few lines: its size, its aliases and its interpolations."""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig

MOST_BYTES = 1_000_000  # of a job file, and of all options together
MOST_VALUES = 100_000  # of a job, aliases and interpolations counted as often as they are used
MOST_LETTERS = 100_000  # of one option
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as quick
_LETTERS_PER_VALUE = 100  # a long text counts as several values
_REFERENCE = re.compile(r"\$\{\s*(\.*)\s*([A-Za-z_][^\s:{}$]*)?\s*\}")
_PART = re.compile(r"[^.\[\]]+")


def bounded_text(path: Path) -> str:
    """Return the text of a job file, of which no more than the bound is read.

    Raises:
        ValueError: it is no regular file, or larger than a job file can be; the message has no name.
        OSError, UnicodeDecodeError: it cannot be read as UTF-8.
    """
    # a FIFO that nobody writes to would hold up a plain open
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as handle:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file but a device, a pipe or the like; name a YAML file")
        content = handle.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes, which no job needs; name a YAML file of a job")
    return content.decode("utf-8")


def check_aliases(text: str) -> None:
    """Refuse YAML whose aliases (`*name`) stand for more values than a job has; nothing is expanded for that.

    Raises:
        ValueError: they do, or an alias stands inside of what it stands for.
        YAMLError, RecursionError: it is no YAML.
    """
    root = yaml.compose(io.StringIO(text), Loader=_LOADER)
    if root is not None and _count(root, {}) > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values below a node; an alias shares its node with what it stands for."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise ValueError("YAML recursive aliases are not supported: one stands inside of what it stands for")
        return counts[id(node)]
    counts[id(node)] = 0  # being counted
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, counts) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_count(part, counts) for pair in node.value for part in pair)
    else:
        total += len(node.value) // _LETTERS_PER_VALUE
    counts[id(node)] = min(total, MOST_VALUES + 1)
    return counts[id(node)]


def resolved_too_large(config: DictConfig) -> bool:
    """Return whether a configuration's interpolations make more of it than a job has; nothing is resolved."""
    return _Sizes(config).of(config) > MOST_VALUES


class _Sizes:
    """The numbers of values that nodes have once their references (`${a.b}`) are followed."""

    def __init__(self, root: DictConfig) -> None:
        self._root = root
        self._known: dict[int, int] = {}

    def of(self, node: Any) -> int:
        """Return the size of a node, 1 for one that is being measured: a circle is refused when it is resolved."""
        if node is None:
            return 0
        if id(node) not in self._known:
            self._known[id(node)] = 1
            self._known[id(node)] = min(self._measured(node), MOST_VALUES + 1)
        return self._known[id(node)]

    def _measured(self, node: Any) -> int:
        if node._is_interpolation():
            text = str(node._value())
            targets = [self._target(node, match[1], match[2] or "") for match in _REFERENCE.finditer(text)]
            return 1 + len(text) // _LETTERS_PER_VALUE + sum(map(self.of, targets))
        if isinstance(node, DictConfig | ListConfig):
            if node._is_none() or node._is_missing():
                return 1
            keys: Any = range(len(node)) if isinstance(node, ListConfig) else list(node.keys())
            return 1 + sum(self.of(node._get_node(key, validate_access=False)) for key in keys)
        return 1 + len(str(node._value())) // _LETTERS_PER_VALUE

    def _target(self, node: Any, dots: str, path: str) -> Any:
        """Return the node that a reference names, or the interpolation on the way there; None where there is none."""
        here: Any = self._root
        if dots:
            here = node
            for _ in dots:
                here = here._get_parent() if here is not None else None
        for part in _PART.findall(path):
            if not isinstance(here, DictConfig | ListConfig) or here._is_interpolation() or here._is_none():
                break
            key: Any = int(part) if isinstance(here, ListConfig) and part.isdigit() else part
            if isinstance(here, ListConfig) and (not isinstance(key, int) or key >= len(here)):
                return None
            here = here._get_node(key, validate_access=False)
        return here
