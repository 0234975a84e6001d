"""Files: written whole or not at all, found in a checkout or a wheel, and hashed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lavis_dcd.common.errors import UserError

_BLOCK = 1 << 20
# Of a disk or its file system, not of the program that writes to it
_OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG),
}
_RUST_NUMBER = re.compile(r"(?:os error|code:) (\d+)")
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a write that fails raises inside into an `OSError` that names `path`, whoever wrapped it.

    torch and safetensors put a full disk into exceptions of their own, which say neither the file nor the cause.

    Args:
        path: the file as its readers call it; a temporary one that becomes it is not named.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _number_of_system(error, Path(path))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _number_of_system(error: Exception, target: Path) -> int | None:
    """Return the errno of a write that failed; None for any other error, and for one that names its own file."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError):
        named = error.filename is not None and not _is_temporary(error.filename, target)
        return None if named or error.errno not in _OF_THE_DISK else error.errno
    text = str(error)
    if isinstance(error, SafetensorError):
        match = _RUST_NUMBER.search(text)
        return int(match[1]) if match else None
    if not any(words in text for words in _TORCH_WRITER):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (cause and cause.errno) or (errno.ENOSPC if _is_full(target.parent) else errno.EIO)


def _is_temporary(name: Any, target: Path) -> bool:
    return isinstance(name, str) and Path(name).name.startswith(f".{target.name}.")


def _is_full(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(b"\0" * _BLOCK)
            os.fsync(handle.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


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
        renames it over `path`; an exception removes it and passes through, as :func:`writing` puts it.
    """
    target = Path(path)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(descriptor)
        try:
            yield Path(name)
            sync(Path(name))
            os.chmod(name, 0o666 & ~umask())
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):  # its folder may have gone; the first error says so
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
    """Return the folder of downloads (not created): `LAVIS_CACHE`, else `lavis` in the user's cache folder.

    Raises:
        UserError: neither variable names one, and the user has no home folder.
    """
    chosen = os.environ.get("LAVIS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return (Path(base) if base else Path.home() / ".cache") / "lavis"
    except RuntimeError as error:
        user = os.getuid() if hasattr(os, "getuid") else "this one"
        raise UserError(f"LAVIS_CACHE: user {user} has no home folder; set LAVIS_CACHE to a folder for downloads, "
                        "or HOME") from error  # fmt: skip


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
