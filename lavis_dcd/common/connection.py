"""Connections to servers: each redirect checked, and cut when too little comes for too long."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from typing_extensions import Self, override

from lavis_dcd.common.address import Address
from lavis_dcd.common.address_secrets import without_secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line

_AGENT = {"User-Agent": "lavis-dcd"}
_REDIRECTS = 10
_PROXY_FAULT = "the proxy that the environment names cannot be used"
_REDIRECTING = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Limits:
    """The patience with a server.

    Args:
        silence: seconds without a byte.
        rate: bytes per second that must arrive, on average over each `window` seconds; the answer's head, redirects
            and whatever frames the body bring none.
        window: see `rate`.
        most: bytes of a file of which nothing says how large it is, and of any other.
    """

    silence: float = 30.0
    rate: float = 1024.0
    window: float = 60.0
    most: int = 50 * 10**9


class SlowError(Exception):
    """A server brought too little for too long; the message says how little."""


class Watch:
    """Shuts a connection down that brings less than `limits.rate`, from a thread of its own.

    A timeout of the socket does not: every byte starts it anew, and one byte in 29 s would keep a job for months.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.cut = False
        self._arrived = 0
        self._sockets: list[socket.socket] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="download-watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for connected in self._sockets:
            connected.close()
        if self.cut and (kind is None or issubclass(kind, Exception)):
            limits = self.limits
            raise SlowError(f"less than {limits.rate:g} bytes a second came for {limits.window:g} s") from error

    def connect(self, *args: Any, **kwargs: Any) -> socket.socket:
        """Do as `socket.create_connection`, and watch the connection from there on (through TLS's beginning, too)."""
        connected = socket.create_connection(*args, **kwargs)
        self._sockets.append(connected.dup())
        if self.cut:
            self._shut_down()
        return connected

    def arrived(self, count: int) -> None:
        """Count bytes of the body."""
        self._arrived += count

    def stop(self) -> None:
        """Expect no more bytes."""
        self._over.set()

    def _look(self) -> None:
        before = 0
        while not self._over.wait(self.limits.window):
            if self._arrived - before < self.limits.rate * self.limits.window:
                self.cut = True
                self._shut_down()
                return
            before = self._arrived

    def _shut_down(self) -> None:
        for connected in list(self._sockets):
            with suppress(OSError):  # closed by now
                connected.shutdown(socket.SHUT_RDWR)


def _watched(kind: type[http.client.HTTPConnection], watch: Watch) -> Callable[..., http.client.HTTPConnection]:
    def build(host: str, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, **options)
        connection._create_connection = watch.connect  # type: ignore[attr-defined]
        return connection

    return build


class _Http(urllib.request.HTTPHandler):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    @override
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        build: Any = _watched(http.client.HTTPConnection, self.watch)
        return self.do_open(build, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    @override
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        build: Any = _watched(http.client.HTTPSConnection, self.watch)
        return self.do_open(build, request, context=ssl.create_default_context())


def _opener(watch: Watch) -> urllib.request.OpenerDirector:
    """Return an opener of http and https alone: no files, no ftp, and redirects are left to the caller."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(watch),
        _Https(watch),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


@contextmanager
def opened(
    address: Address, watch: Watch, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> Iterator[http.client.HTTPResponse]:
    """Open what is at an address, wherever the server sends on to.

    Raises:
        UserError: a redirect to an address that is not as safe as this one, or in circles.
        urllib.error.HTTPError: the server's refusal; it is open until the end of the exception's handling.
        OSError, http.client.HTTPException: the network's.
    """
    opener, at = _opener(watch), address
    for _ in range(_REDIRECTS + 1):
        request = urllib.request.Request(at.url, headers={**_AGENT, **(headers or {})}, method=method)
        if at.authorization:
            request.add_unredirected_header("Authorization", at.authorization)
        try:
            response = opener.open(request, timeout=watch.limits.silence)
        except urllib.error.HTTPError as error:
            if error.code not in _REDIRECTING:
                raise
            # its body is not read: it may have no end
            error.close()
            at = at.redirected(error.headers.get("Location"))
            continue
        except ValueError as error:  # of a proxy that is no address, with the password in its words
            raise urllib.error.URLError(_PROXY_FAULT) from error
        with response:
            yield response
        return
    raise UserError(f"{address}: the server redirects more than {_REDIRECTS} times; name the file's own address")


def reason(error: BaseException) -> str:
    """Return one short line that says why the network failed, without secrets."""
    if isinstance(error, urllib.error.HTTPError):
        text = f"the server answers {error.code} {error.reason}"
    elif isinstance(error, http.client.InvalidURL):  # addresses were checked before
        text = _PROXY_FAULT
    elif isinstance(error, urllib.error.URLError):
        text = str(error.reason)
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        text = str(error) or type(error).__name__
    return one_line(without_secrets(text), 200)
