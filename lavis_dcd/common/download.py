"""Fetch a file into the cache: resumable, checked, and complete or absent."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlparse

from tqdm import tqdm

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write, cache_root

log = logging.getLogger(__name__)

_BLOCK = 1 << 18
_ATTEMPTS = 4
_AGENT = {"User-Agent": "lavis-dcd"}


@dataclass(frozen=True)
class Expected:
    """The checksums and the size that a file must have; None where they are not given."""

    sha256: str | None = None
    md5: str | None = None
    size: int | None = None  # bytes


class _InterruptedError(Exception):
    """The connection broke; what has arrived is kept."""


def is_url(text: str) -> bool:
    """Return whether `text` is an http(s) address."""
    return urlparse(text).scheme in ("http", "https")


def cached_path(url: str) -> Path:
    """Return where `fetch(url)` puts the file: `<cache root>/checkpoints/<its name>`.

    The hub's files share a few names (`pytorch_model.bin`), so theirs begin with their repository's.
    """
    path = Path(unquote(urlparse(url).path))
    repository = path.parts[1:3] if path.parts[3:4] == ("resolve",) else ()
    return cache_root() / "checkpoints" / "--".join([*repository, path.name])


def fetch(
    url: str,
    target: str | os.PathLike[str] | None = None,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    timeout: float = 30.0,
) -> Path:
    """Download `url` unless `target` is there already; a broken download goes on where it stopped.

    In a distributed run let one process fetch, and the others after it.

    Args:
        url: an http(s) address.
        target: the file to make; by default `cached_path(url)`.
        sha256, md5, size: checked before the file gets its name, where given.
        timeout: seconds that the server may stay silent.

    Returns:
        The path of the complete file.

    Raises:
        UserError: the address cannot be reached, or what it gives is not the file that was expected.
    """
    path = cached_path(url) if target is None else Path(target)
    expected = Expected(sha256, md5, size)
    if path.is_file():
        there = path.stat().st_size
        if size not in (None, there):
            raise UserError(f"{path} has {there} bytes, expected {size}: remove it to fetch it again")
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("fetching %s to %s", url, path)
        _receive(url, part, timeout)
        _check(url, part, expected)
        os.replace(part, path)
    except (OSError, HTTPException, _InterruptedError) as error:
        raise UserError(
            f"{url} cannot be fetched ({reason(error)}): with a network run again, or bring the file by hand to {path}"
        ) from error
    _etag_file(part).unlink(missing_ok=True)
    return path


def reason(error: BaseException) -> str:
    """Return one short line that says why the network failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


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
    request = urllib.request.Request(url, method="HEAD", headers=_AGENT)
    try:
        with urllib.request.urlopen(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        # Some servers refuse HEAD; they are there all the same.
        return None if error.code in (403, 405, 501) else reason(error)
    except (OSError, HTTPException) as error:
        return reason(error)


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _receive(url: str, part: Path, timeout: float) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive_once(url, part, timeout)
            return
        except (_InterruptedError, ConnectionError, TimeoutError, HTTPException) as error:
            arrived = part.stat().st_size if part.exists() else 0
            if attempt == _ATTEMPTS or arrived == before:
                raise
            log.warning("%s: %s after %d bytes; going on from there", url, reason(error), arrived)


def _receive_once(url: str, part: Path, timeout: float) -> None:
    headers = dict(_AGENT)
    have = part.stat().st_size if part.exists() else 0
    etag_file = _etag_file(part)
    if have and etag_file.exists():
        # The server sends the rest only of the very same file, else all of it.
        headers |= {"Range": f"bytes={have}-", "If-Range": etag_file.read_text(encoding="utf-8")}
    elif have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if _total(error.headers) == have:
            return  # everything had arrived already
        part.unlink()
        return _receive_once(url, part, timeout)
    with response:
        resumed = response.status == 206
        _remember_etag(etag_file, response.headers)
        total = _total(response.headers)
        arrived = _copy(response, part, have if resumed else 0, total)
    if total is not None and arrived < total:
        raise _InterruptedError(f"the connection broke at {arrived} of {total} bytes")


def _remember_etag(path: Path, headers: Message) -> None:
    # A weak tag does not promise equal bytes, so it cannot guard a resumption.
    etag = headers.get("ETag") or headers.get("Last-Modified")
    if etag and not etag.startswith("W/"):
        with atomic_write(path, "w") as handle:
            handle.write(etag)
    else:
        path.unlink(missing_ok=True)


def _total(headers: Message) -> int | None:
    whole = (headers.get("Content-Range") or "").rpartition("/")[2]
    if whole.isdigit():
        return int(whole)
    length = headers.get("Content-Length")
    return int(length) if length and length.isdigit() else None


def _copy(response: IO[bytes], part: Path, start: int, total: int | None) -> int:
    arrived = start
    with (
        open(part, "ab" if start else "wb") as handle,
        tqdm(
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=part.stem,
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        while block := response.read(_BLOCK):
            handle.write(block)
            arrived += len(block)
            bar.update(len(block))
        handle.flush()
        os.fsync(handle.fileno())
    return arrived


def _check(url: str, part: Path, expected: Expected) -> None:
    size = part.stat().st_size
    found = f"size {size}" if expected.size not in (None, size) else None
    for name, wanted in (("sha256", expected.sha256), ("md5", expected.md5)):
        if wanted and not found and (digest := _digest(part, name)) != wanted.lower():
            found = f"{name} {digest}"
    if found:
        part.unlink()
        _etag_file(part).unlink(missing_ok=True)
        told = {key: value for key, value in vars(expected).items() if value is not None}
        raise UserError(f"{url} gave another file than expected: {found}, not {told}; nothing was kept")


def _digest(path: Path, name: str) -> str:
    digest = hashlib.new(name)
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
