"""Fetch a file into the cache: resumable, complete or absent, and the same file each time."""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import os
import re
import threading
import time
import urllib.error
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lavis_dcd.common.address import Address, sum_fault
from lavis_dcd.common.connection import Limits, SlowError, Watch, opened, reason
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import cache_root
from lavis_dcd.common.locks import one_writer
from lavis_dcd.common.manifest import AbsentError, DamagedError, FileRecord, Identity, Manifest
from lavis_dcd.common.names import LONGEST_NAME
from lavis_dcd.common.part_file import BrokenOffError, PartFile, Wanted, receive, refuse_page

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_KIND, _FORMAT = "download", 1
_KEY_DIGITS = 16
# as torch.hub's own files are called: name-<the first digits of its SHA-256>.pth; eight digits alone may be a date
_NAMED_SUM = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[A-Za-z]+$")
_DISK_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO,
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """The checksums and the size that a file must have; None where they are not given."""

    sha256: str | None = None
    md5: str | None = None
    size: int | None = None  # bytes
    named: str | None = None  # the first digits of its SHA-256, from its name

    @classmethod
    def of(cls, address: Address, sha256: str | None, md5: str | None, size: int | None) -> Expected:
        """Return what is expected at an address, whose own sums must not differ from the given ones.

        Raises:
            UserError: a text that is no checksum, or two that differ.
        """
        given = {"sha256": sha256, "md5": md5}
        for name, value in given.items():
            for text in filter(None, (value, address.sums.get(name))):
                if fault := sum_fault(name, text):
                    raise UserError(f"{address}: {fault}; correct it, or leave it out")
            own = address.sums.get(name)
            if value and own and value.lower() != own.lower():
                raise UserError(f"{address}: {name} {value} is expected, its address says {own}; leave one out")
            given[name] = (value or own or "").lower() or None
        named = _NAMED_SUM.search(address.file_name)
        return cls(given["sha256"], given["md5"], size, named[1] if named and not any(given.values()) else None)

    @property
    def whole(self) -> bool:
        """Whether a checksum is given; the few digits in a name are none."""
        return bool(self.sha256 or self.md5)

    def fault(self, path: Path, measured: FileRecord) -> str | None:
        """Return in what a file, whose size and SHA-256 are `measured`, is another; None where it is the expected one.

        Raises:
            OSError: it cannot be read.
        """
        if self.size not in (None, measured.bytes):
            return f"size {measured.bytes}, not {self.size}"
        if self.sha256 not in (None, measured.sha256):
            return f"sha256 {measured.sha256}, not {self.sha256}"
        if self.named and not measured.sha256.startswith(self.named):
            return f"sha256 {measured.sha256}, which the address's last part says to begin with {self.named}"
        if self.md5 and (md5 := _md5_of(path)) != self.md5:
            return f"md5 {md5}, not {self.md5}"
        return None


def is_url(text: str) -> bool:
    """Return whether `text` is an http(s) address, sound or not."""
    return text.lower().startswith(("http:", "https:"))


def address_fault(text: str) -> str | None:
    """Return why nothing can be fetched from the address `text`, in one line; None where that can be tried."""
    try:
        Expected.of(Address.parse(text), None, None, None)
    except UserError as error:
        return error.faults[0]
    return None


def cached_path(url: str) -> Path:
    """Return where `fetch(url)` puts the file: `<cache root>/checkpoints/<digits of the address>/<its name>`.

    The hub's files share a few names (`pytorch_model.bin`), so theirs begin with their repository's.

    Raises:
        UserError: no address of a file.
    """
    address = Address.parse(url)
    name = "--".join([*address.repository, address.file_name])
    if len(name.encode()) > LONGEST_NAME:
        name = address.file_name
    return cache_root() / "checkpoints" / address.key[:_KEY_DIGITS] / name


def record_of(path: Path) -> Path:
    """Return where the record of a fetched file lies: its address, size and SHA-256."""
    return path.with_name(path.name + ".download.json")


def fetch(
    url: str,
    target: str | os.PathLike[str] | None = None,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    limits: Limits | None = None,
) -> Path:
    """Download `url` unless `target` is there already; a broken download goes on where it stopped.

    A file that is there is read whole and must be the one that is meant: of the given checksum, else as its record
    beside it says (`record_of`). Of several processes one fetches, the others wait for it.

    Args:
        url: an http(s) address; it may end in `#sha256=<64 digits>`.
        target: the file to make; by default `cached_path(url)`.
        sha256, md5, size: of the file, where known. Else what came first is expected from then on.
        limits: the patience with the server.

    Returns:
        The path of the complete file.

    Raises:
        UserError: the address cannot be reached, or what it gives or what is there is not the file that was expected.
    """
    address = Address.parse(url)
    expected = Expected.of(address, sha256, md5, size)
    path = cached_path(url) if target is None else Path(target)
    try:
        if os.path.lexists(path):
            return _checked(path, address, expected)
        if target is None:
            _tell_of_former(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = PartFile(path, address)
        with one_writer(part.path, "the download", wait=True):
            if os.path.lexists(path):  # by the process that held the lock before
                return _checked(path, address, expected)
            _bring(part, path, expected, limits or Limits())
    except (BrokenOffError, SlowError, OSError, http.client.HTTPException) as error:
        raise UserError(_told(address, path, error)) from error
    return path


def _bring(part: PartFile, path: Path, expected: Expected, limits: Limits) -> None:
    """Fetch, check and name a file; its bytes are checked under the lock, so that no other writer comes between."""
    address, record = part.address, _record(path)
    log.info("fetching %s to %s", address, path)
    if address.url.startswith("http:") and not expected.whole:
        log.warning("%s: anyone on the way can change what comes over http; prefer https, or give a checksum", address)
    receive(part, Wanted(expected.size, expected.whole or expected.named is not None), limits)
    measured = FileRecord.of(part.path)
    fault = expected.fault(part.path, measured)
    try:
        # what is no checked file may be a page
        if fault or not expected.whole:
            refuse_page(part)
        if fault:
            raise UserError(f"{address} gave another file than expected: {fault}; nothing was kept")
        same_address = record is not None and record.identity == _identity(address.key)
        if record and same_address and not expected.whole and record.files[path.name] != measured:
            raise UserError(
                f"{address} gave another file than on {record.facts.get('date')}: sha256 {measured.sha256}, not "
                f"{record.files[path.name].sha256}; nothing was kept. If the change is meant, remove {record_of(path)}"
            )
    except UserError:
        part.discard()
        raise
    _write_record(path, address, measured)
    os.replace(part.path, path)
    part.discard()


def _checked(path: Path, address: Address, expected: Expected) -> Path:
    """Return a file that is there, if it is the one that is meant.

    Raises:
        UserError: it is another one, or no file.
        OSError: it cannot be read.
    """
    if not path.is_file():
        what = "a link to what is not there" if path.is_symlink() and not path.exists() else "no regular file"
        raise UserError(f"{path} is {what}; remove it, and {address} is fetched to that place")
    record, measured = _record(path), FileRecord.of(path)
    if fault := expected.fault(path, measured):
        raise UserError(f"{path} is another file than expected: {fault}; remove it to fetch it again from {address}, "
                        "or correct the checksum")  # fmt: skip
    if expected.whole:
        if record is None or record.files[path.name] != measured:
            _write_record(path, address, measured, by_hand=True)
        return path
    if record is None:
        log.info("%s was put there by hand and is taken as %s (sha256 %s); from now on a change is refused",
                 path, address, measured.sha256)  # fmt: skip
        _write_record(path, address, measured, by_hand=True)
    elif record.identity != _identity(address.key):
        raise UserError(
            f"{path} came from {record.facts.get('address')}, and {address} would lie at the same place; move it "
            f"away with {record_of(path).name}, or give this job another cache (LAVIS_CACHE, TORCH_HOME)"
        )
    elif record.files[path.name] != measured:
        was = record.files[path.name].sha256
        raise UserError(
            f"{path} has changed since {record.facts.get('date')}: sha256 {measured.sha256}, not {was}; remove it to "
            f"fetch it again, or, if the change is meant, remove {record_of(path)}"
        )
    return path


def _identity(key: str) -> Identity:
    return Identity({"the address": key})


def _record(path: Path) -> Manifest | None:
    """Return the record beside a file; None without one.

    Raises:
        UserError: it cannot be read.
    """
    at = record_of(path)
    try:
        if at.exists() and not at.is_file():
            raise DamagedError("it is no regular file")
        record = Manifest.read(at.parent, _KIND, _FORMAT, at.name)
        if path.name not in record.files:
            raise DamagedError(f"it does not speak of {path.name}")
    except AbsentError:
        return None
    except DamagedError as error:
        raise UserError(f"{at}, the record of a download, cannot be used: {error}; remove it") from error
    return record


def _write_record(path: Path, address: Address, measured: FileRecord, by_hand: bool = False) -> None:
    facts = {"address": address.shown, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "by hand": by_hand}
    record = Manifest(_KIND, _FORMAT, _identity(address.key), {path.name: measured}, facts)
    try:
        record.write(path.parent, record_of(path).name)
    except OSError as error:
        if not by_hand:
            raise
        log.warning("%s: no record can be written beside it (%s); a change is not noticed", path, reason(error))


def _tell_of_former(path: Path) -> None:
    # before the address was a part of its place, a file lay here
    former = path.parent.parent / path.name
    if former.is_file():
        log.info("%s does not say which address it came from and is not used; if it is this file, move it to %s",
                 former, path)  # fmt: skip


def _told(address: Address, path: Path, error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return (
            f"{address} cannot be fetched to {path} ({where}{reason(error)}): make room or permit it, or name another "
            "place (LAVIS_CACHE); what has arrived stays"
        )
    return (
        f"{address} cannot be fetched ({reason(error)}): with a network run again, or bring the file by hand to {path}"
    )


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def unreachable(urls: Iterable[str], seconds: float = 5.0) -> dict[str, str]:
    """Return the addresses that do not answer, with the reason; all are tried at once, for `seconds` at most."""
    answers: dict[str, str | None] = dict.fromkeys(urls, f"no answer within {seconds:g} s")

    def ask(url: str) -> None:
        answers[url] = _refusal(url, seconds)

    # Name resolution ignores timeouts, so the wait is bounded from outside, by threads left behind.
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return {url: answer for url, answer in answers.items() if answer is not None}


def _refusal(url: str, seconds: float) -> str | None:
    limits = replace(Limits(), silence=seconds, window=seconds)
    try:
        with Watch(limits) as watch, opened(Address.parse(url), watch, method="HEAD"):
            return None
    except UserError as error:
        return error.faults[0]
    except urllib.error.HTTPError as error:
        with error:
            # Some servers refuse HEAD; they are there all the same.
            return None if error.code in (403, 405, 501) else reason(error)
    except (SlowError, OSError, http.client.HTTPException) as error:
        return reason(error)
