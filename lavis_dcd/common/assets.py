"""Files that ship inside the package, named ``asset:<path under lavis_dcd/assets>`` in configurations."""

from __future__ import annotations

from pathlib import Path

from lavis_dcd.common.errors import UserError

PREFIX = "asset:"
_FOLDER = Path(__file__).resolve().parent.parent / "assets"


def resolve(path: str) -> str:
    """``asset:x/y`` as an absolute path; any other string unchanged.

    Raises:
        UserError: when the package carries no such file.
    """
    if not path.startswith(PREFIX):
        return path
    found = (_FOLDER / path.removeprefix(PREFIX)).resolve()
    if _FOLDER not in found.parents or not found.exists():
        raise UserError(f"{path}: the package ships no such file; it has {', '.join(available())}")
    return str(found)


def available() -> list[str]:
    """Names of all shipped files, with the prefix."""
    return [PREFIX + str(p.relative_to(_FOLDER)) for p in sorted(_FOLDER.rglob("*")) if p.is_file()]
