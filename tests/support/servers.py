"""Loopback servers that answer as they should, or in any other way a test wants."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTENT = bytes(range(256)) * 4096  # 1 MiB

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Serves `content` at every path but /missing.

    `drop_after` cuts each answer short after so many bytes; `answers` has functions for single paths, which write
    whatever they like.
    """

    daemon_threads = True

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges, self.drop_after = CONTENT, '"v1"', True, None
        self.asked: list[str | None] = []  # the Range of every GET
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        self.answers: dict[str, Answer] = {}
        self.scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def url(self, name: str = "weights%20v1.pth") -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients hang up on bad answers


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        server.paths.append(self.path)
        server.authorizations.append(self.headers.get("Authorization"))
        if self.path in server.answers:
            return server.answers[self.path](self)
        if self.path == "/missing":
            return self.send_error(404, "not here")
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and server.ranges else 0
        if self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            return self.end_headers()
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(rest)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(rest[: server.drop_after])


def raw(head: str, body: bytes = b"") -> Answer:
    """Return an answer of these lines, the status first, and this body."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        handler.close_connection = True

    return answer


def redirect(location: str, status: int = 302) -> Answer:
    """Return an answer that sends on."""
    return raw(f"HTTP/1.1 {status} Found\nLocation: {location}\nContent-Length: 0")


def dripping(head: str, drop: bytes, seconds: float = 0.02) -> Answer:
    """Return an answer of these lines whose body comes in drops for ever."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(head.replace("\n", "\r\n").encode())
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(drop)
                time.sleep(seconds)

    return answer


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Let a server answer within the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def self_signed(folder: Path) -> Path:
    """Return a file with a key and a certificate of 127.0.0.1, signed by itself; made by openssl."""
    key, certificate, both = folder / "key.pem", folder / "certificate.pem", folder / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", certificate,
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both
