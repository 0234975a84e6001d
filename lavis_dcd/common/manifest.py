"""The manifest of everything that is stored and reused: what it was made from, and the sums of its bytes.

Presence, size or name of a file say nothing about what it is. A manifest does: it lies beside the stored files, is
written last (so that its presence is the mark of "done"), has the SHA-256 of the settings, rows and pictures that they
were made from and of their bytes, and one of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavis_dcd.common.files import atomic_write, sha256_of

MANIFEST = "manifest.json"
_VERSION = 1  # of this record; the format of what it speaks of is the user's
_LONGEST = 256 << 20  # bytes of a manifest; one of ours with a million files has less
_READERS = 4  # files hashed at a time: a disk gives more than one core takes


class DamagedError(Exception):
    """Something stored is not whole, or not what its manifest says; the message tells what, in a few words."""


class AbsentError(DamagedError):
    """There is no manifest: nothing was stored, or not to its end."""


def digest_of(content: Any) -> str:
    """Return the SHA-256 of plain containers (as JSON with sorted keys; other values as their ``str``)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """The sources of something stored, a SHA-256 each.

    Args:
        settings: by the words for them, as in {"the teacher": ...}.
        rows: of the data sets' rows in their order, by split.
        pictures: of the pictures, by split.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)

    def differences(self, other: Identity) -> list[str]:
        """Return what differs in ``other``, in words: "the teacher", "the rows of val", "the pictures of test"."""
        changed = _changed(self.settings, other.settings)
        changed += [f"the rows of {split}" for split in _changed(self.rows, other.rows)]
        return changed + [f"the pictures of {split}" for split in _changed(self.pictures, other.pictures)]

    @property
    def key(self) -> str:
        """Return one SHA-256 of all, by which a folder may be named."""
        return digest_of(asdict(self))


def _changed(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the SHA-256 of a stored file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read the file at ``path``."""
        return cls(path.stat().st_size, sha256_of(path))

    def check(self, path: Path, contents: bool = True) -> None:
        """Compare the file at ``path``: its size, then its bytes.

        Raises:
            DamagedError: it is missing, unreadable, or another.
        """
        try:
            if path.is_symlink() or not path.is_file():
                raise DamagedError(
                    f"{path.name} is missing" if not os.path.lexists(path) else f"{path.name} is no file"
                )
            size = path.stat().st_size
            if size < self.bytes:
                raise DamagedError(f"{path.name} is cut short ({size:,} of {self.bytes:,} bytes)")
            if size > self.bytes:
                raise DamagedError(f"{path.name} has {size:,} bytes, {self.bytes:,} were written")
            if contents and sha256_of(path) != self.sha256:
                raise DamagedError(f"the checksum of {path.name} does not fit it")
        except OSError as error:
            raise DamagedError(f"{path.name} cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True)
class Manifest:
    """The record of what lies in a folder.

    Args:
        kind: what is stored, as in "score bank".
        format: of the stored files, by their writer.
        identity: what they were made from.
        files: by their names in the folder.
        facts: for people, and for readers of this ``kind``; plain containers.
    """

    kind: str
    format: int
    identity: Identity
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path,
        files: Iterable[str],
        *,
        kind: str,
        format: int,
        identity: Identity,
        facts: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Return the manifest of ``files`` as they lie in ``folder`` now; all of them are read.

        Raises:
            OSError: one cannot be read.
        """
        names = list(files)
        with ThreadPoolExecutor(_READERS) as pool:
            records = pool.map(FileRecord.of, [folder / name for name in names])
            return cls(kind, format, identity, dict(zip(names, records, strict=True)), dict(facts or {}))

    def write(self, folder: Path, name: str = MANIFEST) -> None:
        """Write it, whole or not at all; call it when everything else is on the disk."""
        content = {"manifest": _VERSION, **asdict(self)}
        with atomic_write(folder / name, "w") as handle:
            json.dump({"sha256": digest_of(content), **content}, handle, indent=1)

    @classmethod
    def read(cls, folder: Path, kind: str, format: int, name: str = MANIFEST) -> Manifest:
        """Return the manifest in ``folder``; the files are not looked at.

        Raises:
            AbsentError: there is none.
            DamagedError: it was changed, cut, or is one of another kind or format.
        """
        content = _checked_content(folder / name)
        if content["kind"] != kind:
            raise DamagedError(f"{name} is of a {content['kind']}, expected a {kind}")
        if content["format"] != format:
            raise DamagedError(f"{name} has format {content['format']}, this version reads {format}")
        try:
            files = {
                _file_name(file): _checked_record(FileRecord(**record)) for file, record in content["files"].items()
            }
            identity = _checked_identity(Identity(**content["identity"]))
            return cls(kind, format, identity, files, dict(content["facts"]))
        except (TypeError, AttributeError, ValueError) as error:
            raise DamagedError(f"{name} is not of the form that this version writes") from error

    def check_files(self, folder: Path, contents: bool = True) -> None:
        """Compare the files in ``folder`` with their records.

        Args:
            contents: read all of them; else only their sizes are compared.

        Raises:
            DamagedError: one is missing, cut short or changed; the message has its name.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            checks = [pool.submit(record.check, folder / name, contents) for name, record in self.files.items()]
            for check in checks:
                check.result()


def _checked_content(path: Path) -> dict[str, Any]:
    name = path.name
    try:
        if os.path.lexists(path) and not path.is_file():
            raise DamagedError(f"{name} is no file")  # opening a FIFO could take for ever
        with path.open("rb") as handle:
            raw = handle.read(_LONGEST + 1)
        content: dict[str, Any] = json.loads(raw)
        written = content.pop("sha256")
        if len(raw) > _LONGEST or written != digest_of(content):
            raise DamagedError(f"the checksum of {name} does not fit it")
        if content["manifest"] != _VERSION:
            raise DamagedError(f"{name} has version {content['manifest']}, this version reads {_VERSION}")
        if {"kind", "format", "identity", "files", "facts"} - content.keys():
            raise DamagedError(f"{name} is not of the form that this version writes")
    except FileNotFoundError as error:
        raise AbsentError(f"{name} is missing") from error
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror or error})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{name} is no manifest, or was cut short") from error
    return content


def _checked_record(record: FileRecord) -> FileRecord:
    if type(record.bytes) is not int or not isinstance(record.sha256, str):
        raise ValueError(f"{record} is no file's size and sum")
    return record


def _checked_identity(identity: Identity) -> Identity:
    for sums in (identity.settings, identity.rows, identity.pictures):
        if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
            raise ValueError(f"{sums} are no sums by name")
    return identity


def _file_name(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file in a folder")
    return name
