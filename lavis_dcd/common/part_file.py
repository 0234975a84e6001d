"""The beginning of a download: bound to its address, continued where that is safe, and never without an end."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import shutil
import ssl
import stat
import sys
import urllib.error
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_dcd.common.address import Address
from lavis_dcd.common.connection import Limits, SlowError, Watch, opened, reason
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.texts import one_line, size_in_words

log = logging.getLogger(__name__)

_BLOCK = 1 << 18
_ATTEMPTS = 4
_HEAD = 1024  # bytes by which a page is told from a file
_RECORD = 1 << 16  # bytes of a record at most
_FREE_SHARE = 0.95  # of the free disk that a body of no stated length may take

_WEIGHTS = {".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz", ".npy", ".h5", ".onnx", ".tar", ".zip", ""}
_MARKUP = {".html", ".htm", ".xml", ".svg"}


class BrokenOffError(Exception):
    """The connection broke; what has arrived is kept."""


class _OtherPartError(Exception):
    """The server sent another part than the wanted one; the download begins anew."""


@dataclass(frozen=True)
class Wanted:
    """The things said about a file before it has come.

    Args:
        size: in bytes.
        pinned: its checksum is given, so that bytes of another file are noticed at the end.
    """

    size: int | None = None
    pinned: bool = False


@dataclass(frozen=True)
class _Begun:
    """The record beside a part: whose it is, and which version of the file."""

    address: str
    key: str
    validator: str = ""  # ETag, else Last-Modified
    total: int | None = None


class PartFile:
    """`<target>.part` and the record beside it.

    Args:
        target: the file that it is to become.
        address: where it comes from; what came from another is thrown away.
    """

    def __init__(self, target: Path, address: Address) -> None:
        self.path = target.with_name(target.name + ".part")
        self.record = target.with_name(target.name + ".part.json")
        self.address = address

    def size(self) -> int:
        """Return its bytes on the disk; 0 where it is no regular file."""
        try:
            state = self.path.lstat()
        except OSError:
            return 0
        return state.st_size if stat.S_ISREG(state.st_mode) else 0

    def begun(self, pinned: bool) -> _Begun | None:
        """Return the record of a part that may be continued: of this address, and of a version that can be told.

        Without a validator of the server, only a checksum (`pinned`) shows that both halves are of the same file.
        """
        if not self.size():
            return None
        try:
            with open(os.open(self.record, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as handle:
                begun = _Begun(**json.loads(handle.read(_RECORD)))
        except (OSError, ValueError, TypeError):
            return None
        sound = isinstance(begun.validator, str) and isinstance(begun.total, int | None)
        return begun if sound and begun.key == self.address.key and (begun.validator or pinned) else None

    def note(self, headers: Message, total: int | None) -> None:
        """Write the record, before any byte of the body."""
        validator = headers.get("ETag") or headers.get("Last-Modified") or ""
        # A weak tag does not promise equal bytes, so it cannot guard a resumption.
        sound = not validator.startswith("W/") and validator.isprintable() and len(validator) < 1000
        begun = _Begun(self.address.shown, self.address.key, validator if sound else "", total)
        with atomic_write(self.record, "w") as handle:
            json.dump(asdict(begun), handle)

    def discard(self) -> None:
        """Delete both."""
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)


def receive(part: PartFile, wanted: Wanted, limits: Limits) -> None:
    """Bring the whole body into `part`; broken connections are taken up again.

    Raises:
        UserError: an answer that cannot be the file; nothing of it is kept.
        BrokenOffError, SlowError, OSError, http.client.HTTPException: the network's; what has arrived is kept.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        before = part.size()
        try:
            return _receive_once(part, wanted, limits)
        except _OtherPartError as error:
            part.discard()
            if attempt == _ATTEMPTS:
                raise BrokenOffError(str(error)) from error
            log.info("%s: %s; beginning anew", part.address, error)
        except (BrokenOffError, SlowError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as e:
            arrived = part.size()
            if attempt == _ATTEMPTS or arrived == before:
                raise
            log.warning("%s: %s after %d bytes; going on from there", part.address, reason(e), arrived)
        except UserError:
            part.discard()
            raise


def _receive_once(part: PartFile, wanted: Wanted, limits: Limits) -> None:
    begun = part.begun(wanted.pinned)
    if begun is None:
        part.discard()
    have, headers = part.size(), {}
    if begun is not None:
        headers["Range"] = f"bytes={have}-"
        if begun.validator:
            # The server sends the rest only of the very same file, else all of it.
            headers["If-Range"] = begun.validator
    with Watch(limits) as watch:
        try:
            with opened(part.address, watch, headers) as response:
                start = _start(part, response, begun)
                total = _total(response, start)
                _check_answer(part, response, total, wanted, limits)
                if not start:
                    part.discard()
                part.note(response.headers, total)
                bound = _bound(part, total, wanted, limits)
                arrived = _copy(response, part, _Body(start, total, bound, wanted.pinned), watch)
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 416 or begun is None:
                    raise
            if _stated_total(error.headers) == have and not _changed(error.headers, begun):
                return  # everything had arrived already
            raise _OtherPartError("what had arrived is no part of the file there") from error
    if total is not None and arrived < total:
        raise BrokenOffError(f"the connection broke at {arrived} of {total} bytes")
    if arrived == 0:
        raise UserError(f"{part.address} gave an empty file; nothing was kept, name another address")


def _start(part: PartFile, response: http.client.HTTPResponse, begun: _Begun | None) -> int:
    """Return the first byte that an answer brings.

    Raises:
        _OtherPartError: it brings another part than the one that is missing, or of another version.
        UserError: neither the file nor a part of it.
    """
    if response.status == 200:
        return 0
    if response.status != 206:
        answer = one_line(f"{response.status} {response.reason}", 100)
        raise UserError(f"{part.address}: the server answers {answer}, not 200; name another address")
    if begun is None:
        raise _OtherPartError("the server sent a part where the whole was wanted")
    given = re.fullmatch(
        r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", (response.headers.get("Content-Range") or "").strip()
    )
    first, last, total = (int(number) for number in given.groups()) if given else (-1, -1, -1)
    have = part.size()
    if first != have or last != total - 1 or begun.total not in (None, total):
        raise _OtherPartError("the server sent another part than the missing one")
    if _changed(response.headers, begun):
        raise _OtherPartError("the file there has changed in between")
    return have


def _changed(headers: Message, begun: _Begun) -> bool:
    etag = headers.get("ETag")
    return bool(etag and begun.validator.startswith('"') and etag != begun.validator)


def _total(response: http.client.HTTPResponse, start: int) -> int | None:
    """Return how long the whole file is; None where the answer does not say."""
    if start:
        whole = _stated_total(response.headers)
        if response.length is not None and whole is not None and response.length != whole - start:
            raise _OtherPartError("the server's answer has two lengths")
        return whole
    return None if response.chunked else response.length


def _stated_total(headers: Message) -> int | None:
    whole = (headers.get("Content-Range") or "").rpartition("/")[2].strip()
    return int(whole) if re.fullmatch(r"\d{1,18}", whole, re.ASCII) else None


def _check_answer(
    part: PartFile, response: http.client.HTTPResponse, total: int | None, wanted: Wanted, limits: Limits
) -> None:
    """Refuse what cannot become the wanted file, before its body is read.

    Raises:
        UserError: nothing of it is kept.
    """
    at, encoding = part.address, response.headers.get("Content-Encoding", "").strip().lower()
    transfer = response.headers.get("Transfer-Encoding", "").strip().lower()
    if encoding not in ("", "identity") or transfer not in ("", "identity", "chunked"):
        packed = one_line(encoding or transfer, 40)
        raise UserError(f"{at}: the server sends the file packed ({packed}), which was not asked for, so that its "
                        "bytes cannot be checked; bring it by hand")  # fmt: skip
    if total is None:
        if not (response.chunked or wanted.pinned):
            raise UserError(f"{at}: the server does not say how long the file is, so that a broken connection looks "
                            "like its end; end the address in #sha256=CHECKSUM, or bring it by hand")  # fmt: skip
        return
    if wanted.size not in (None, total):
        raise UserError(f"{at} gives another file than expected: size {total}, not {wanted.size}; nothing was kept")
    if total > limits.most:
        raise UserError(f"{at}: the file has {size_in_words(total)}, at most {size_in_words(limits.most)} are fetched; "
                        "bring it by hand")  # fmt: skip
    free = shutil.disk_usage(part.path.parent).free
    missing = total - part.size()
    if missing > free:
        raise UserError(f"{at}: {size_in_words(missing)} are missing, and {part.path.parent} has "
                        f"{size_in_words(free)} free; free some space, or name another place")  # fmt: skip


def _bound(part: PartFile, total: int | None, wanted: Wanted, limits: Limits) -> int:
    """Return the bytes after which a body, which may state no length, is taken for endless."""
    given = total if total is not None else wanted.size
    free = part.size() + int(shutil.disk_usage(part.path.parent).free * _FREE_SHARE)
    return given if given is not None else min(limits.most, free)


@dataclass(frozen=True)
class _Body:
    """The first byte that comes, the length of the whole file (None: not stated), and the bytes it cannot exceed."""

    start: int
    total: int | None
    bound: int
    pinned: bool


def _copy(response: http.client.HTTPResponse, part: PartFile, body: _Body, watch: Watch) -> int:
    """Append the body to the part; return the bytes that are there then.

    Raises:
        UserError: it is a page, or has no end.
    """
    # a link or a pipe under this name is not ours to write to
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if body.start else os.O_EXCL)
    arrived, looked_at = body.start, body.start > 0 or body.pinned
    with open(os.open(part.path, flags, 0o666), "wb") as handle, _bar(part, body) as bar:
        for block in _blocks(response, body):
            handle.write(block)
            arrived += len(block)
            watch.arrived(len(block))
            bar.update(len(block))
            if arrived > body.bound:
                raise UserError(f"{part.address} gives more than {body.bound} bytes; nothing was kept")
            if not looked_at and arrived >= _HEAD:
                looked_at = True
                handle.flush()
                refuse_page(part)
        watch.stop()  # the disk may take its time
        handle.flush()
        os.fsync(handle.fileno())
    return arrived


def _blocks(response: http.client.HTTPResponse, body: _Body) -> Iterator[bytes]:
    # read1 gives what has come; read would wait for a whole block of a server that drips
    missing = None if body.total is None else body.total - body.start
    while missing != 0:
        block = response.read1(_BLOCK if missing is None else min(_BLOCK, missing))
        if not block:
            return
        missing = None if missing is None else missing - len(block)
        yield block


def _bar(part: PartFile, body: _Body) -> Any:
    name, quiet = part.path.stem, not sys.stderr.isatty()
    return tqdm(total=body.total, initial=body.start, unit="B", unit_scale=True, desc=name, disable=quiet)


def refuse_page(part: PartFile) -> None:
    """Refuse a text where a file was expected: a log-in page, a server's error, a Git LFS pointer.

    Raises:
        UserError: it is one.
    """
    with open(part.path, "rb") as handle:
        head = handle.read(_HEAD)
    told = _text_kind(head, Path(part.path.stem).suffix.lower())
    if told:
        way_out = "see in a browser whether it is right and needs a log-in, or bring the file by hand"
        raise UserError(f"{part.address} gives {told} instead of the file, and nothing was kept; {way_out}")


def _text_kind(head: bytes, suffix: str) -> str | None:
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer"
    if begin.startswith(b"<") and suffix not in _MARKUP:
        return "a page (HTML or XML)"
    if suffix in (".json", ".jsonl") and not begin.startswith((b"[", b"{", b'"')):
        return "something that is no JSON"
    if suffix in _WEIGHTS and _is_text(head):
        return "a text"
    return None


def _is_text(head: bytes) -> bool:
    """Return whether bytes are plain text, cut anywhere; every format of weights has other bytes at its beginning."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(head) or error.reason != "unexpected end of data":
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\r\n\t\f" for c in text)
