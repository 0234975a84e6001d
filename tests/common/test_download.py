from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lavis_dcd.common import download
from lavis_dcd.common.errors import UserError

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(ThreadingHTTPServer):
    """Serves CONTENT at every path but /missing; `drop_after` cuts each answer short after so many bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges, self.drop_after = CONTENT, '"v1"', True, None
        self.asked: list[str | None] = []

    def url(self, name: str = "weights%20v1.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
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
        self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(rest[: server.drop_after])


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def test_a_file_arrives_in_the_cache_and_is_not_fetched_twice(server, cache):
    path = download.fetch(server.url(), sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))
    assert path == cache / "checkpoints" / "weights v1.pth"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["weights v1.pth"]
    assert download.fetch(server.url()) == path
    assert server.asked == [None]


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.drop_after = 400_000
    path = download.fetch(server.url(), tmp_path / "x", md5=hashlib.md5(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=800000-"]


def test_an_interrupted_download_is_resumed_by_the_next_run(server, tmp_path):
    server.drop_after = 100_000
    with pytest.raises(UserError, match=r"broke at 400000 of 1048576.*by hand"):
        download.fetch(server.url(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    server.drop_after = None
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=400000-"


@pytest.mark.parametrize("change", ["content", "no ranges"])
def test_a_part_of_another_file_is_thrown_away(server, tmp_path, change):
    server.drop_after = 100_000
    with pytest.raises(UserError):
        download.fetch(server.url(), tmp_path / "x")
    server.drop_after = None
    if change == "content":
        server.content, server.etag = CONTENT[::-1], '"v2"'
    else:
        server.ranges = False
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == server.content


def test_a_part_that_is_complete_only_needs_its_name(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT)
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == CONTENT
    (tmp_path / "y.part").write_bytes(CONTENT + b"more")
    assert download.fetch(server.url(), tmp_path / "y").read_bytes() == CONTENT


@pytest.mark.parametrize("expected", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"size": 3}])
def test_another_file_than_expected_is_not_kept(server, tmp_path, expected):
    with pytest.raises(UserError, match="another file than expected"):
        download.fetch(server.url(), tmp_path / "x", **expected)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_left_to_the_user(server, tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(UserError, match="has 3 bytes, expected 4"):
        download.fetch(server.url(), tmp_path / "x", size=4)
    assert (tmp_path / "x").read_bytes() == b"abc"


def test_what_cannot_be_reached_says_so(server, tmp_path, offline):
    with pytest.raises(UserError, match=r"answers 404.*by hand to .*x") as caught:
        download.fetch(server.url("missing"), tmp_path / "x")
    assert len(caught.value.faults) == 1
    far = "https://models.invalid/x.pth"
    with pytest.raises(UserError, match=r"https://models.invalid/x.pth cannot be fetched"):
        download.fetch(far, tmp_path / "x")
    mute = download.unreachable([server.url(), server.url("missing"), far])
    assert set(mute) == {server.url("missing"), far}
    assert "404" in mute[server.url("missing")]


def test_a_folder_that_cannot_be_made_is_a_user_error(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be fetched"):
        download.fetch(server.url(), tmp_path / "file" / "x")


def test_is_url():
    assert download.is_url("https://a/b") and download.is_url("http://a")
    assert not download.is_url("a/b.pth") and not download.is_url("/a") and not download.is_url("asset:x")


def test_files_of_the_hub_do_not_take_each_others_place(cache):
    of = "https://huggingface.co/{}/resolve/main/pytorch_model.bin"
    paths = [download.cached_path(of.format(name)) for name in ("openai/clip", "some/other")]
    names = ("openai--clip--pytorch_model.bin", "some--other--pytorch_model.bin")
    assert paths == [cache / "checkpoints" / name for name in names]
    assert download.cached_path("https://a.b/c/d/resolve.ckpt?download=1") == cache / "checkpoints" / "resolve.ckpt"
