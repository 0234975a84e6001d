"""Register this plug-in as soon as LAVIS is imported, without importing LAVIS."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOST, _OURS = "lavis", "lavis_dcd."


def install() -> None:
    """Register now if LAVIS is there, else right after it is imported. Calling it again changes nothing."""
    if _HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterHost) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterHost())


def _register() -> None:
    from lavis_dcd.plugins import register_all

    register_all()


class _AfterHost(MetaPathFinder):
    """Watches for the import of LAVIS; once it is complete and our modules are registered, it removes itself.

    One of our own modules may be the one that imports LAVIS. Registering in the middle of it could import, from a
    module that is only half executed, names that it has not defined yet; so registration waits until the
    outermost of our modules is complete.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._host_is_here = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the other finders' spec; for LAVIS and our modules with a loader that notes when they are complete."""
        if fullname != _HOST and not fullname.startswith(_OURS):
            return None
        spec = self._spec_of_others(fullname, path, target)
        loader: Any = spec.loader if spec is not None else None
        if hasattr(loader, "exec_module"):
            wrap = self._around_host if fullname == _HOST else self._around_ours
            loader.exec_module = wrap(loader.exec_module)
        return spec

    def _spec_of_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if not isinstance(finder, _AfterHost) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None

    def _around_host(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_then_register(module: ModuleType) -> None:
            with warnings.catch_warnings():
                # fairscale, timm and pkg_resources greet every import of LAVIS with their deprecations.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                execute(module)
            self._host_is_here = True
            self._settle()

        return execute_then_register

    def _around_ours(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_counted(module: ModuleType) -> None:
            self._depth += 1
            try:
                execute(module)
            finally:
                self._depth -= 1
            self._settle()

        return execute_counted

    def _settle(self) -> None:
        if self._host_is_here and self._depth == 0 and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()
