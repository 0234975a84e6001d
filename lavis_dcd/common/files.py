"""Files: written whole or not at all, found in a checkout or a wheel, and hashed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lavis_dcd.common.errors import UserError

_BLOCK = 1 << 20


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears complete or keeps its former content.

    Args:
        path: the file to (re)place; its folder is made when missing.
        mode: "wb" (default) yields a binary file, "w" a UTF-8 text file.

    Yields:
        The open temporary file, as :func:`atomic_path` names and keeps it.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write: mode must be 'wb' or 'w', got {mode!r}")
    with atomic_path(path) as temporary, open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
        yield handle


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Do the same as :func:`atomic_write` for writers that want the name of a file.

    Yields:
        An empty temporary file in the same folder. Leaving the block without an error brings it to the disk and
        renames it over `path`; an exception removes it and passes through.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield Path(name)
        sync(Path(name))
        os.chmod(name, 0o666 & ~umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; without it a power cut may undo a rename.

    Raises:
        OSError: a file cannot be brought there. File systems that cannot sync a folder are left alone.
    """
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not folder:
            raise


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left unfinished in a folder (`atomic_write`'s temporary files)."""
    for path in folder.glob(".*.tmp"):
        if path.is_file():
            path.unlink(missing_ok=True)


def umask() -> int:
    """Return the process's mask: a finished file gets the permissions of this user's other files, not 0600."""
    current = os.umask(0)
    os.umask(current)
    return current


def cache_root() -> Path:
    """Return the folder of downloads (not created): `LAVIS_CACHE`, else `lavis` in the user's cache folder."""
    chosen = os.environ.get("LAVIS_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lavis"


def packaged_folder(name: str) -> Path:
    """Return the folder `name` ("configs" or "projects") that ships with the package.

    In a wheel it lies inside the package, in a checkout (also an editable install) beside it.

    Raises:
        FileNotFoundError: neither is there; the installation is broken.
    """
    package = Path(__file__).resolve().parent.parent
    if (package / name).is_dir():
        return package / name
    # In site-packages the neighbour is not ours: LAVIS installs a top-level folder of the name projects.
    if (package.parent / "setup.py").is_file() and (package.parent / name).is_dir():
        return package.parent / name
    raise FileNotFoundError(f"{name}/ is neither in {package} nor beside it: reinstall lavis-dcd")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


ASSET_PREFIX = "asset:"  # of files that ship inside the package, under lavis_dcd/assets
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def asset_path(path: str) -> str:
    """Return ``asset:x/y`` as an absolute path; any other string unchanged.

    Raises:
        UserError: when the package carries no such file.
    """
    if not path.startswith(ASSET_PREFIX):
        return path
    file = (_ASSETS / path.removeprefix(ASSET_PREFIX)).resolve()
    if _ASSETS not in file.parents or not file.exists():
        raise UserError(f"{path}: the package ships no such file; it has {', '.join(available_assets())}")
    return str(file)


def available_assets() -> list[str]:
    """Return the names of all shipped files, with the prefix."""
    return [ASSET_PREFIX + str(p.relative_to(_ASSETS)) for p in sorted(_ASSETS.rglob("*")) if p.is_file()]


def update_with_tensors(digest: hashlib._Hash, named: Iterable[tuple[str, Tensor]]) -> None:
    """Feed names, shapes, types and contents to ``digest``, in the order given."""
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
