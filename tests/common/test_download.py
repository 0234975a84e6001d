from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import CONTENT, Server, dripping, raw, redirect, running, self_signed

from lavis_dcd.common import download, locks
from lavis_dcd.common.connection import Limits
from lavis_dcd.common.errors import UserError

SHA = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]
HURRIED = Limits(silence=5, rate=2000, window=0.3)
SMALL = Limits(most=2 << 20)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running(Server()) as found:
        yield found


def refused(url: str, target: Path | None = None, **options) -> str:
    """Return the one line with which a download is refused."""
    with pytest.raises(UserError) as caught:
        download.fetch(url, target, **options)
    (line,) = caught.value.faults
    assert line.isprintable()
    return line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- a file arrives --------------------------------------------------------------------------------------------------


def test_a_file_arrives_in_the_cache_and_is_not_fetched_twice(server, cache):
    path = download.fetch(server.url(), sha256=SHA, size=len(CONTENT))
    assert path == download.cached_path(server.url())
    assert path.parent.parent == cache / "checkpoints" and path.name == "weights v1.pth"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["weights v1.pth", "weights v1.pth.download.json"]
    assert download.fetch(server.url()) == path
    assert server.asked == [None]


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.drop_after = 400_000
    path = download.fetch(server.url(), tmp_path / "x", md5=hashlib.md5(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=800000-"]


def interrupt(server: Server, target: Path, url: str | None = None) -> None:
    """Leave the first 400,000 bytes of a download beside `target`."""
    server.drop_after = 100_000
    assert "broke at 400000 of 1048576" in refused(url or server.url(), target)
    assert not target.exists() and target.with_name(target.name + ".part").stat().st_size == 400_000
    server.drop_after = None
    server.asked.clear()


def test_an_interrupted_download_is_resumed_by_the_next_run(server, tmp_path):
    interrupt(server, tmp_path / "x")
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == ["bytes=400000-"]
    assert names(tmp_path) == ["x", "x.download.json"]


@pytest.mark.parametrize("change", ["content", "no ranges"])
def test_a_part_of_another_file_is_thrown_away(server, tmp_path, change):
    interrupt(server, tmp_path / "x")
    if change == "content":
        server.content, server.etag = OTHER, '"v2"'
    else:
        server.ranges = False
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == server.content


def test_a_part_that_is_complete_only_needs_its_name(server, tmp_path):
    for extra, asked in ((b"", ["bytes=1048576-"]), (b"more", ["bytes=1048580-", None])):
        target = tmp_path / f"x{len(extra)}"
        interrupt(server, target)
        target.with_name(f"{target.name}.part").write_bytes(CONTENT + extra)
        assert download.fetch(server.url(), target).read_bytes() == CONTENT
        assert server.asked == asked


def test_a_part_of_another_address_is_never_continued(server, tmp_path):
    interrupt(server, tmp_path / "x", server.url("first/x"))
    assert download.fetch(server.url("second/x"), tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == [None]


@pytest.mark.parametrize("record", [None, "{", "[]", '{"address": "a", "key": "b", "validator": 3, "total": "x"}'])
def test_a_part_without_its_record_is_not_continued(server, tmp_path, record):
    interrupt(server, tmp_path / "x")
    (tmp_path / "x.part").write_bytes(OTHER[:1000])
    (tmp_path / "x.part.json").unlink()
    if record:
        (tmp_path / "x.part.json").write_text(record)
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == CONTENT


def test_halves_that_nothing_tells_apart_are_not_put_together(server, tmp_path):
    server.etag = None  # no validator, no checksum: another version could follow
    server.drop_after = 100_000
    refused(server.url(), tmp_path / "x")
    server.content, server.drop_after = OTHER, None
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == OTHER
    server.content, server.drop_after = CONTENT, 400_000
    assert download.fetch(server.url(), tmp_path / "y", sha256=SHA).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=800000-"


@pytest.mark.parametrize(
    "head",
    [
        "Content-Range: bytes 0-648575/1048576",  # another place
        "Content-Range: bytes 400000-500000/1048576",  # not to the end
        "Content-Range: bytes 400000-1048575/2000000",  # another total
        "Content-Range: bytes 400000-2000000/2000001",
        "Content-Range: bytes x-y/z",
        "Content-Type: multipart/byteranges; boundary=x",
        'Content-Range: bytes 400000-1048575/1048576\nETag: "v2"',  # another version
    ],
)
def test_another_part_than_the_missing_one_makes_it_begin_anew(server, tmp_path, head):
    interrupt(server, tmp_path / "weights.pth")
    wrong = raw(f"HTTP/1.1 206 Partial Content\n{head}\nContent-Length: 648576", OTHER[400_000:])

    def answer(handler) -> None:
        if handler.headers.get("Range"):
            return wrong(handler)
        del server.answers[handler.path]
        handler.do_GET()

    server.answers["/weights%20v1.pth"] = answer
    assert download.fetch(server.url(), tmp_path / "weights.pth").read_bytes() == CONTENT


def test_a_part_that_nobody_wanted_is_refused(server, tmp_path):
    partial = "HTTP/1.1 206 Partial Content\nContent-Range: bytes 0-9/1048576\nContent-Length: 10"
    server.answers["/x.pth"] = raw(partial, CONTENT[:10])
    assert "a part where the whole was wanted" in refused(server.url("x.pth"), tmp_path / "x")
    assert names(tmp_path) == []


# -- the right file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"size": 3}])
def test_another_file_than_expected_is_not_kept(server, tmp_path, expected):
    assert "another file than expected" in refused(server.url(), tmp_path / "x", **expected)
    assert names(tmp_path) == []


@pytest.mark.parametrize("sums", [{"sha256": "0" * 63}, {"sha256": "g" * 64}, {"md5": "0" * 64}])
def test_a_text_that_is_no_checksum_is_told_before_anything_is_fetched(server, tmp_path, sums):
    assert "digits" in refused(server.url(), tmp_path / "x", **sums)
    assert server.asked == []


@pytest.mark.parametrize("expected", [{"sha256": SHA}, {"md5": hashlib.md5(CONTENT).hexdigest()}, {"size": 1048576}])
def test_a_file_that_is_there_must_be_the_expected_one(server, tmp_path, expected):
    (tmp_path / "x").write_bytes(OTHER[1:])
    line = refused(server.url(), tmp_path / "x", **expected)
    assert "another file than expected" in line and "remove it to fetch it again" in line
    assert (tmp_path / "x").read_bytes() == OTHER[1:] and server.asked == []
    (tmp_path / "x").write_bytes(CONTENT)
    assert download.fetch(server.url(), tmp_path / "x", **expected) == tmp_path / "x"


def test_the_sum_may_stand_in_the_address(server, cache):
    good, bad = f"{server.url('x.pth')}#sha256={SHA.upper()}", f"{server.url('x.pth')}#sha256={'0' * 64}"
    assert "another file than expected" in refused(bad)
    path = download.fetch(good)
    assert path == download.cached_path(server.url("x.pth")) and path.read_bytes() == CONTENT
    assert "another file than expected" in refused(bad)
    assert "leave one out" in refused(good, sha256="0" * 64)
    assert "no sha256" in refused(f"{server.url('x.pth')}#sha256=12")


def test_the_digits_in_a_name_are_the_first_of_its_sum(server, cache):
    assert download.fetch(server.url(f"net-{SHA[:8]}.pth")).read_bytes() == CONTENT
    line = refused(server.url("net-0aa007d2.pth"))
    assert SHA in line and "0aa007d2" in line and "nothing was kept" in line
    # a date is no sum, and a given sum goes over the name
    download.fetch(server.url("net-20240131.pth"))
    path = download.fetch(server.url("mine-deadbeef.pth"), sha256=SHA)
    path.write_bytes(OTHER)
    assert "another file than expected" in refused(server.url("mine-deadbeef.pth"), sha256=SHA)
    # the file that is there is held against them, too
    path = download.fetch(server.url(f"net-{SHA[:8]}.pth"))
    path.write_bytes(OTHER)
    assert "begin with" in refused(server.url(f"net-{SHA[:8]}.pth"))


def test_two_addresses_with_one_last_part_are_two_files(server, cache):
    server.answers["/b/student.pth"] = raw(f"HTTP/1.1 200 OK\nContent-Length: {len(OTHER)}", OTHER)
    first, second = (download.fetch(server.url(f"{folder}/student.pth")) for folder in "ab")
    assert first.read_bytes() == CONTENT and second.read_bytes() == OTHER
    assert first.name == second.name == "student.pth"
    queries = [download.cached_path(server.url(f"student.pth{query}")) for query in ("", "?v=1", "?v=2", "?token=a")]
    assert len({first, second, *queries}) == 6


def test_at_a_given_place_another_addresss_file_is_refused(server, tmp_path):
    download.fetch(server.url("a/student.pth"), tmp_path / "student.pth")
    line = refused(server.url("b/student.pth"), tmp_path / "student.pth")
    assert server.url("a/student.pth") in line and server.url("b/student.pth") in line and "move it" in line
    # unless a checksum says that it is the right one
    assert download.fetch(server.url("b/student.pth"), tmp_path / "student.pth", sha256=SHA).is_file()


def test_a_file_that_changed_since_it_came_is_refused(server, cache):
    path = download.fetch(server.url())
    changed = bytearray(CONTENT)
    changed[500_000] ^= 1
    state = path.stat()
    path.write_bytes(changed)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # the same size and time
    line = refused(server.url())
    assert "has changed since" in line and SHA in line and "remove it to fetch it again" in line
    path.unlink()
    assert download.fetch(server.url()).read_bytes() == CONTENT


def test_a_file_that_changed_at_its_address_is_refused(server, cache):
    path = download.fetch(server.url())
    path.unlink()
    server.content, server.etag = OTHER, '"v2"'
    line = refused(server.url())
    record = download.record_of(path)
    assert "another file than on" in line and str(record) in line and not path.exists()
    record.unlink()
    assert download.fetch(server.url()).read_bytes() == OTHER


def test_a_file_that_was_put_there_by_hand(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "x").write_bytes(CONTENT)
    download.fetch(server.url(), tmp_path / "x")
    (line,) = (record.getMessage() for record in caplog.records)
    assert "by hand" in line and SHA in line and server.asked == []
    (tmp_path / "x").write_bytes(OTHER)
    assert "has changed since" in refused(server.url(), tmp_path / "x")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"sha256": "x", "manifest": 1}'])
def test_a_record_that_is_none(server, tmp_path, content):
    download.fetch(server.url(), tmp_path / "x")
    download.record_of(tmp_path / "x").write_text(content)
    line = refused(server.url(), tmp_path / "x")
    assert "x.download.json" in line and "remove it" in line


def test_records_say_where_a_file_came_from(server, cache):
    path = download.fetch(server.url("x.pth?token=s3cret").replace("//", "//user:pa55@"))
    text = download.record_of(path).read_text()
    assert json.loads(text)["files"]["x.pth"] == {"bytes": len(CONTENT), "sha256": SHA}
    assert "/x.pth?token=***" in text and "s3cret" not in text and "pa55" not in text


@pytest.mark.parametrize("kind", ["folder", "pipe", "lost link"])
def test_what_is_no_file_is_told(server, tmp_path, kind):
    place = tmp_path / "x"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "nowhere")
    assert f"{place} is " in refused(server.url(), place)
    assert server.asked == [] and os.path.lexists(place)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_part_that_is_no_file_is_not_written_to(server, tmp_path, kind):
    (tmp_path / "mine").write_bytes(b"mine")
    if kind == "pipe":
        os.mkfifo(tmp_path / "x.part")
        os.mkfifo(tmp_path / "x.part.json")
    else:
        (tmp_path / "x.part").symlink_to(tmp_path / "mine")
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == CONTENT
    assert (tmp_path / "mine").read_bytes() == b"mine"


# -- answers that are no file ----------------------------------------------------------------------------------------

HTML = b"\r\n  <!DOCTYPE html><html><head><title>Sign in</title></head></html>" + b" " * 5000


@pytest.mark.parametrize(
    ("body", "name", "told"),
    [
        (HTML, "x.pth", "a page"),
        (b"\xef\xbb\xbf<html>", "x.json", "a page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "x", "a page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "x.safetensors", "a Git LFS pointer"),
        (b'{"error": "no such model"}', "x.safetensors", "a text"),
        ("Zugang nur f\u00fcr Mitglieder".encode(), "x.ckpt", "a text"),
        (b"Not found", "x.json", "no JSON"),
        (b"Not found", "download", "a text"),  # without an ending, weights are meant
        (b"", "x.pth", "an empty file"),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_page_instead_of_the_file_is_told_and_not_kept(server, tmp_path, body, name, told, framing):
    head = "HTTP/1.1 200 OK\nContent-Type: application/octet-stream\n"
    if framing == "length":
        server.answers[f"/{name}"] = raw(f"{head}Content-Length: {len(body)}", body)
    else:
        chunk = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
        server.answers[f"/{name}"] = raw(f"{head}Transfer-Encoding: chunked", chunk + b"0\r\n\r\n")
    assert told in refused(server.url(name), tmp_path / name)
    assert names(tmp_path) == []
    assert server.asked == [None]


def test_json_and_text_are_files_where_they_are_expected(server, tmp_path):
    for name, body in (("a.json", b'[{"image": "a.jpg"}]'), ("vocab.txt", b"[PAD]\n"), ("page.html", b"<html>")):
        server.answers[f"/{name}"] = raw(f"HTTP/1.1 200 OK\nContent-Length: {len(body)}", body)
        assert download.fetch(server.url(name), tmp_path / name).read_bytes() == body


def test_a_page_where_a_checksum_is_expected_is_told_as_such(server, tmp_path):
    server.answers["/x.pth"] = raw(f"HTTP/1.1 200 OK\nContent-Length: {len(HTML)}", HTML)
    assert "a page" in refused(server.url("x.pth"), tmp_path / "x", sha256=SHA)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "header",
    [
        "Content-Encoding: gzip",
        "Content-Encoding: br",
        "Content-Encoding: gzip, identity",
        "Transfer-Encoding: gzip, chunked",
    ],
)
def test_a_packed_answer_is_refused(server, tmp_path, header):
    server.answers["/x"] = raw(f"HTTP/1.1 200 OK\nContent-Length: 5\n{header}", b"\x1f\x8babc")
    assert "packed" in refused(server.url("x"), tmp_path / "x")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "status", ["204 No Content", "202 Accepted", "203 Else", "304 Not Modified", "451 No", "500 \x1b[2J"]
)
def test_other_answers_than_200_are_told(server, tmp_path, status):
    server.answers["/x"] = raw(f"HTTP/1.1 {status}\nContent-Length: 0")
    assert status[:3] in refused(server.url("x"), tmp_path / "x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("answer", ["", "nonsense", "HTTP/1.1 abc x", "HTTP/1.1 200 OK\n" + "A: b\n" * 200 + "C: d"])
def test_an_answer_that_is_no_http(server, tmp_path, answer):
    server.answers["/x"] = raw(answer)
    assert "cannot be fetched" in refused(server.url("x"), tmp_path / "x")


# -- lengths ---------------------------------------------------------------------------------------------------------


def test_a_body_without_a_length_needs_a_checksum(server, tmp_path):
    server.answers["/x.pth"] = raw("HTTP/1.0 200 OK", CONTENT)
    assert "does not say how long the file is" in refused(server.url("x.pth"), tmp_path / "x")
    assert names(tmp_path) == []
    assert download.fetch(server.url("x.pth"), tmp_path / "x", sha256=SHA).read_bytes() == CONTENT
    server.answers["/cut.pth"] = raw("HTTP/1.0 200 OK", CONTENT[:-1])
    assert "another file than expected" in refused(server.url("cut.pth"), tmp_path / "cut", sha256=SHA)
    server.answers["/odd.pth"] = raw("HTTP/1.1 200 OK\nContent-Length: -5", CONTENT)
    assert "does not say how long" in refused(server.url("odd.pth"), tmp_path / "odd")


def test_a_chunked_body_must_end(server, tmp_path):
    chunk = b"%x\r\n%s\r\n" % (len(CONTENT), CONTENT)
    head = "HTTP/1.1 200 OK\nTransfer-Encoding: chunked"
    server.answers["/x.pth"] = raw(head, chunk + b"0\r\n\r\n")
    assert download.fetch(server.url("x.pth"), tmp_path / "x").read_bytes() == CONTENT
    for name, body in (("a", chunk), ("b", chunk[:500_000]), ("c", b"-1\r\n" + CONTENT), ("d", b"zz\r\n" + CONTENT)):
        server.answers[f"/{name}"] = raw(head, body)
        refused(server.url(name), tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_body_shorter_or_longer_than_it_says(server, tmp_path):
    server.answers["/short"] = raw("HTTP/1.1 200 OK\nContent-Length: 1048577", CONTENT)
    assert "broke at 1048576 of 1048577" in refused(server.url("short"), tmp_path / "short")
    server.answers["/long"] = raw("HTTP/1.1 200 OK\nContent-Length: 1048576", CONTENT + b"more")
    assert download.fetch(server.url("long"), tmp_path / "long").read_bytes() == CONTENT


def endless(start: str) -> object:
    return dripping(start, CONTENT[:65536], 0)


@pytest.mark.parametrize("checked", [{}, {"sha256": SHA}, {"size": 500_000}])
def test_an_endless_body_is_bounded(server, tmp_path, checked):
    chunk = b"10000\r\n" + CONTENT[:65536] + b"\r\n"
    server.answers["/chunks.pth"] = dripping("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", chunk, 0)
    line = refused(server.url("chunks.pth"), tmp_path / "x", limits=SMALL, **checked)
    assert f"more than {checked.get('size', SMALL.most)} bytes" in line
    if "sha256" in checked:
        server.answers["/plain.pth"] = endless("HTTP/1.0 200 OK\n\n")
        assert "more than" in refused(server.url("plain.pth"), tmp_path / "x", limits=SMALL, **checked)
    assert names(tmp_path) == []


def test_what_is_too_large_is_told_before_it_comes(server, tmp_path, monkeypatch):
    server.answers["/x.pth"] = endless("HTTP/1.1 200 OK\nContent-Length: 60000000000\n\n")
    assert "60.0 GB, at most 50.0 GB" in refused(server.url("x.pth"), tmp_path / "x")
    server.answers["/x.pth"] = endless(f"HTTP/1.1 200 OK\nContent-Length: {10**17}\n\n")
    limits = Limits(most=10**18)
    assert "free some space" in refused(server.url("x.pth"), tmp_path / "x", limits=limits)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        ("HTTP/1.1 200 OK\nContent-Length: 1048576\n\n", b"\x00"),  # the body
        ("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", b"1\r\n\x00\r\n"),
        ("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", b"0"),  # a chunk's length without an end
        ("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n1\n\x00\n0\n", b"Trailer: x\r\n"),
        ("", b"H"),  # the first line
        ("HTTP/1.1 200 OK\nX: ", b"x"),
        ("", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("HTTP/1.1 302 Found\nLocation: ", b"x"),
    ],
)
def test_a_server_that_drips_is_left(server, tmp_path, head, drop):
    server.answers["/x.pth"] = dripping(head, drop)
    line = refused(server.url("x.pth"), tmp_path / "x", limits=HURRIED)
    assert "less than 2000 bytes a second came for 0.3 s" in line
    assert not (tmp_path / "x").exists()


def test_a_slow_but_steady_server_is_not_left(server, tmp_path):
    def answer(handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n")
        for start in range(0, 20000, 500):
            handler.wfile.write(CONTENT[start : start + 500])
            time.sleep(0.06)

    server.answers["/x.pth"] = answer
    patient = Limits(rate=100, window=0.8)
    assert download.fetch(server.url("x.pth"), tmp_path / "x", limits=patient).read_bytes() == CONTENT[:20000]
    assert server.asked == [None]


def test_a_server_that_says_nothing_is_left(server, tmp_path):
    server.answers["/x.pth"] = lambda handler: time.sleep(3)
    line = refused(server.url("x.pth"), tmp_path / "x", limits=Limits(silence=0.2))
    assert "timed out" in line


# -- redirects, names and passwords ----------------------------------------------------------------------------------


def test_redirects_are_followed(server, tmp_path):
    for at, to in (("/1", "/2"), ("/2", "3"), ("/3", server.url("weights.pth"))):
        server.answers[at] = redirect(to, 307)
    assert download.fetch(server.url("1"), tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "file:///etc/passwd", "gopher://h/x", "data:,x", "http://[bad"])
def test_redirects_to_other_places_than_the_web_are_refused(server, tmp_path, place):
    server.answers["/x"] = redirect(place)
    assert "redirects" in refused(server.url("x"), tmp_path / "x")
    assert names(tmp_path) == []


def test_redirects_have_an_end(server, tmp_path):
    server.answers["/x"] = redirect("/x")
    assert "more than 10 times" in refused(server.url("x"), tmp_path / "x")
    assert len(server.paths) == 11
    server.answers["/y"] = raw("HTTP/1.1 302 Found\nContent-Length: 0")
    assert "without saying where to" in refused(server.url("y"), tmp_path / "y")


def test_a_redirect_with_an_endless_body_is_followed(server, tmp_path):
    server.answers["/x"] = endless("HTTP/1.1 302 Found\nLocation: /y\n\n")
    assert download.fetch(server.url("x"), tmp_path / "x").read_bytes() == CONTENT


def test_over_https_nothing_comes_from_http(tmp_path, monkeypatch, server):
    """A real server of https, whose certificate this process trusts."""
    certificate = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with running(Server(certificate)) as secure:
        assert download.fetch(secure.url("good.pth"), tmp_path / "good").read_bytes() == CONTENT
        secure.answers["/x"] = redirect(server.url("x"))
        line = refused(secure.url("x"), tmp_path / "x")
        assert "redirects from https" in line and not (tmp_path / "x").exists()
        # on the way up it may be followed
        server.answers["/up"] = redirect(secure.url("good.pth"))
        assert download.fetch(server.url("up"), tmp_path / "up").read_bytes() == CONTENT
        # dripping within TLS is no way around the limits
        secure.answers["/slow"] = dripping("HTTP/1.1 200 OK\nContent-Length: 1048576\n\n", b"\x00")
        assert "less than" in refused(secure.url("slow"), tmp_path / "slow", limits=HURRIED)
        monkeypatch.delenv("SSL_CERT_FILE")
        assert "certificate" in refused(secure.url("good.pth"), tmp_path / "bad").lower()


def test_a_password_goes_to_its_own_server_only(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with running(Server()) as other:
        server.answers["/a"] = redirect("/b")
        server.answers["/b"] = redirect(other.url("x"))
        url = server.url("a?token=s3cret").replace("//", "//user:pa55@")
        server.answers["/a?token=s3cret"] = redirect("/b")
        download.fetch(url, tmp_path / "x")
        assert server.authorizations == ["Basic dXNlcjpwYTU1"] * 2 and other.authorizations == [None]
    lines = [record.getMessage() for record in caplog.records]
    lines += [path.read_text() for path in tmp_path.glob("*.json")]
    missing = server.url("missing").replace("//", "//user:pa55@")
    lines.append(refused(missing, tmp_path / "y"))
    server.drop_after = 1000
    lines.append(refused(server.url("w?key=s3cret").replace("//", "//user:pa55@"), tmp_path / "z"))
    lines += [path.read_text() for path in tmp_path.glob("*.part.json")]
    lines.append(str(download.unreachable([missing])).replace(missing, ""))
    assert sum("***@" in line for line in lines) > 4
    assert not any(secret in line for line in lines for secret in ("pa55", "s3cret"))


# -- several at once, and ends ---------------------------------------------------------------------------------------


def test_two_downloads_of_one_file_wait_for_each_other(server, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_POLL", 0.01)
    begun, go_on = threading.Event(), threading.Event()

    def answer(handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n" + CONTENT[:400_000])
        begun.set()
        go_on.wait(20)
        handler.wfile.write(CONTENT[400_000:])

    server.answers["/x.pth"] = answer
    got: list[Path] = []
    threads = [threading.Thread(target=lambda: got.append(download.fetch(server.url("x.pth"), tmp_path / "x")))
               for _ in range(3)]  # fmt: skip
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.1)  # for them to come to the lock; without one they would write by now
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert got == [tmp_path / "x"] * 3 and (tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == [None]
    assert names(tmp_path) == ["x", "x.download.json"]


SCRIPT = """
import sys
from lavis_dcd.common.download import fetch
fetch(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_download_leaves_its_part_alone_and_the_next_goes_on(server, tmp_path):
    """In a process of its own, killed while bytes come; its lock goes with it."""
    begun = threading.Event()

    def answer(handler) -> None:
        head = b'HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\nETag: "v1"\r\n\r\n'
        handler.wfile.write(head + CONTENT[:600_000])
        begun.set()
        time.sleep(20)

    server.answers["/x.pth"] = answer
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, server.url("x.pth"), str(tmp_path / "x")])
    assert begun.wait(60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "x.part").is_file() or not (tmp_path / "x.part").stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set(names(tmp_path)) == {"x.part", "x.part.json", ".x.part.lock"}
    del server.answers["/x.pth"]
    assert download.fetch(server.url("x.pth"), tmp_path / "x").read_bytes() == CONTENT
    assert server.asked[-1].startswith("bytes=")
    assert names(tmp_path) == ["x", "x.download.json"]


def test_an_end_between_record_and_name_loses_nothing(server, tmp_path, monkeypatch):
    real = os.replace

    def end(source, target) -> None:
        if str(source).endswith(".part"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", end)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(server.url(), tmp_path / "x")
    assert names(tmp_path) == ["x.download.json", "x.part", "x.part.json"]
    monkeypatch.setattr(os, "replace", real)
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1048576-"]


def test_a_proxy_that_is_none_is_told_without_its_password(tmp_path, monkeypatch):
    for proxy in (
        "http:/user:pa55@proxy",
        "http://user:pa55@[proxy",
        "http://user:pa55@127.0.0.1:port",
        "http://user:pa55/x@h",
    ):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("no_proxy", "")
        line = refused("http://models.invalid/x.pth", tmp_path / "x")
        assert "cannot be fetched" in line and "pa55" not in line


def test_a_full_disk_is_told_and_what_came_stays(server, tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the write itself fails."""
    import resource

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        line = refused(server.url(), tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "make room" in line and not (tmp_path / "x").exists()
    assert download.fetch(server.url(), tmp_path / "x").read_bytes() == CONTENT
    assert server.asked[-1].startswith("bytes=")


def test_a_cache_that_cannot_be_written_to_serves_all_the_same(server, tmp_path, permissions_count, caplog):
    (tmp_path / "x").write_bytes(CONTENT)
    tmp_path.chmod(0o500)
    try:
        assert download.fetch(server.url(), tmp_path / "x") == tmp_path / "x"
        assert "no record can be written" in caplog.text
        assert "Permission denied" in refused(server.url("y"), tmp_path / "y")
    finally:
        tmp_path.chmod(0o700)


def test_what_cannot_be_reached_says_so(server, tmp_path, offline):
    line = refused(server.url("missing"), tmp_path / "x")
    assert "answers 404" in line and f"by hand to {tmp_path / 'x'}" in line
    far = "https://models.invalid/x.pth"
    assert f"{far} cannot be fetched" in refused(far, tmp_path / "x")
    mute = download.unreachable([server.url(), server.url("missing"), far, "https://h:port/x"])
    assert set(mute) == {server.url("missing"), far, "https://h:port/x"}
    assert "404" in mute[server.url("missing")]


def test_a_folder_that_cannot_be_made_is_a_user_error(server, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be fetched" in refused(server.url(), tmp_path / "file" / "x")


def test_is_url():
    assert download.is_url("https://a/b") and download.is_url("HTTP://a") and download.is_url("http://[")
    assert not download.is_url("a/b.pth") and not download.is_url("/a") and not download.is_url("asset:x")


def test_files_of_the_hub_begin_with_their_repository(cache):
    of = "https://huggingface.co/{}/resolve/main/pytorch_model.bin"
    paths = [download.cached_path(of.format(name)) for name in ("openai/clip", "some/other")]
    assert [path.name for path in paths] == ["openai--clip--pytorch_model.bin", "some--other--pytorch_model.bin"]
    assert all(path.parent.parent == cache / "checkpoints" for path in paths)
    assert download.cached_path("https://a.b/c/d/resolve.ckpt?download=1").name == "resolve.ckpt"
    long = download.cached_path(of.format("a" * 96 + "/" + "b" * 96))
    assert long.name == "pytorch_model.bin"
    # the revision counts, too
    assert download.cached_path(of.format("a/b")) != download.cached_path(of.format("a/b").replace("main", "v2"))


def test_a_file_of_an_earlier_cache_is_not_taken_but_told(server, cache, caplog):
    caplog.set_level(logging.INFO)
    (cache / "checkpoints").mkdir(parents=True)
    (cache / "checkpoints" / "x.pth").write_bytes(OTHER)
    assert download.fetch(server.url("x.pth")).read_bytes() == CONTENT
    assert "does not say which address" in caplog.text
