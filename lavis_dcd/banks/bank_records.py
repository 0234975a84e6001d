"""The records of a feature bank's shards: sums of their bytes, kept from the first shard on.

A finished bank has a manifest, written last. Until then the sums of the finished shards lie in a manifest of another
name, so that a build that was interrupted trusts no shard but those that are as they were written.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import clear_leftovers
from lavis_dcd.common.manifest import MANIFEST, AbsentError, DamagedError, FileRecord, Identity, Manifest

log = logging.getLogger(__name__)

FORMAT = 4  # of the folder, and of how pictures are read; part of a bank's identity
KIND, UNFINISHED_KIND = "feature bank", "feature bank, unfinished"
UNFINISHED = "unfinished.json"


def read_finished(folder: Path, identity: Identity) -> Manifest:
    """Return the manifest of the finished bank of ``identity``; the shards are not looked at.

    Raises:
        AbsentError: there is none.
        DamagedError: the manifest is not whole, or is another bank's.
    """
    return _read(folder, identity, KIND, MANIFEST)


def _read(folder: Path, identity: Identity, kind: str, name: str) -> Manifest:
    manifest = Manifest.read(folder, kind, FORMAT, name)
    if changed := manifest.identity.differences(identity):
        raise DamagedError(f"{name} is of another bank: {', '.join(changed)} differ")
    return manifest


class BankRecords:
    """The records of a bank that is being built, in its folder.

    Whoever makes one holds the lock of the folder. Records of an interrupted build, or of a bank that was finished and
    damaged since, are taken over; the bank counts as unfinished from now on.

    Args:
        folder: the bank's.
        identity: of the bank.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self._identity = folder, identity
        self._files: dict[str, FileRecord] = {}
        for kind, name in ((UNFINISHED_KIND, UNFINISHED), (KIND, MANIFEST)):
            try:
                self._files.update(_read(folder, identity, kind, name).files)
            except AbsentError:
                continue
            except DamagedError as damage:
                log.warning("%s: %s; what it stands for is made again", folder, damage)
        if not folder.is_dir():
            return  # made with the first file: a disk that is too small is told before anything is written
        try:
            clear_leftovers(folder)
            self._write()
            remove(folder / MANIFEST)
        except OSError as error:
            raise cannot_write(folder, UNFINISHED, error) from error

    def __contains__(self, path: Path) -> bool:
        return path.name in self._files

    def check(self, path: Path) -> None:
        """Compare a file in the folder with its record; raises a ``DamagedError`` where it is not as it was written."""
        if path not in self:
            raise DamagedError(f"{path.name} was not recorded as whole")
        self._files[path.name].check(path)

    def add(self, path: Path) -> None:
        """Record a file that was just written; raises a ``UserError`` where the record cannot be kept."""
        try:
            self._files[path.name] = FileRecord.of(path)
            self._write()
        except OSError as error:
            raise cannot_write(self.folder, UNFINISHED, error) from error

    def forget(self, path: Path) -> None:
        """Delete a file that is of no use, and its record; raises a ``UserError`` where it cannot be deleted."""
        self._files.pop(path.name, None)
        try:
            remove(path)
        except OSError as error:
            raise cannot_write(self.folder, path.name, error) from error

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest, by which the bank is finished; ``facts`` are for people.

        Raises:
            UserError: it cannot be written.
        """
        try:
            Manifest(KIND, FORMAT, self._identity, dict(sorted(self._files.items())), dict(facts)).write(self.folder)
            remove(self.folder / UNFINISHED)
        except OSError as error:
            raise cannot_write(self.folder, MANIFEST, error) from error

    def _write(self) -> None:
        Manifest(UNFINISHED_KIND, FORMAT, self._identity, self._files).write(self.folder, UNFINISHED)


def remove(path: Path) -> None:
    """Delete whatever has this name, if anything has."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cannot_write(folder: Path, name: str, error: BaseException | str) -> UserError:
    """Return the error for a file of features that the disk does not take."""
    why = error.strerror or error if isinstance(error, OSError) else error
    return UserError(
        f"run.cache_features: {name} cannot be written to {folder} ({why}); what is there serves the next start. Make "
        "room, or choose another place with LAVIS_CACHE"
    )
