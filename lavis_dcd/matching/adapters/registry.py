"""Adapters by the LAVIS name of the model that they make a matcher of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.base import Adapter

A = TypeVar("A", bound=type[Adapter])

_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(*names: str) -> Callable[[A], A]:
    """Return a class decorator: the adapter serves the LAVIS models registered under ``names``.

    Raises:
        ValueError: when a name is taken by another class.
    """

    def register(adapter: A) -> A:
        for name in names:
            if _ADAPTERS.get(name, adapter) is not adapter:
                raise ValueError(f"an adapter for {name!r} is already registered: {_ADAPTERS[name]!r}")
            _ADAPTERS[name] = adapter
        return adapter

    return register


def adapter_for(name: str | None) -> type[Adapter] | None:
    """Return the adapter of a LAVIS name; ``None`` where there is none."""
    return _ADAPTERS.get(name or "")


def adapted_names() -> list[str]:
    """Return the LAVIS names that have an adapter, sorted."""
    return sorted(_ADAPTERS)


def require_adapter(name: str, path: str) -> type[Adapter]:
    """Return the adapter of a LAVIS model that is no matcher itself.

    Raises:
        UserError: there is none.
    """
    adapter = adapter_for(name)
    if adapter is None:
        raise UserError(
            f"{path}.arch: {name} cannot score pairs: it is no lavis_dcd Matcher and has no adapter; "
            f"adapters: {', '.join(adapted_names())} (register one with lavis_dcd.matching.adapters.registry)"
        )
    return adapter
