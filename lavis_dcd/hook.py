"""Register this plug-in as soon as LAVIS is imported, without importing LAVIS."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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
    """Watches for the import of LAVIS; once it has come and our modules are registered, it removes itself.

    One of our own modules may be what imports LAVIS. Registering in the middle of it could import, from a
    module that is only half executed, names that it has not defined yet; so registration waits until the
    outermost of our modules is complete.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._host_is_here = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOST and not fullname.startswith(_OURS):
            return None
        spec = self._found_by_others(fullname, path, target)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        wrap = self._host if fullname == _HOST else self._own
        spec.loader.exec_module = wrap(spec.loader.exec_module)
        return spec

    def _found_by_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if not isinstance(finder, _AfterHost) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None

    def _host(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_then_register(module: ModuleType) -> None:
            with warnings.catch_warnings():
                # fairscale, timm and pkg_resources greet every import of LAVIS with their deprecations.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                execute(module)
            self._host_is_here = True
            self._settle()

        return execute_then_register

    def _own(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
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
