"""Of ``lavis_dcd.models.weights``: finding a file."""

from __future__ import annotations

import hashlib
import os

import pytest
from servers import CONTENT, Server, running

from lavis_dcd.common.download import cached_path
from lavis_dcd.common.errors import UserError
from lavis_dcd.models.weights import locate


def refused(source: str, sha256: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        locate(source, sha256)
    (line,) = caught.value.faults
    assert line.isprintable()
    return line


def test_addresses_are_fetched_once_and_checked_each_time(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    with running(Server()) as server:
        first, second = (locate(server.url(f"{folder}/student.pth")) for folder in "ab")
        assert first == cached_path(server.url("a/student.pth")) != second
        assert locate(server.url("a/student.pth"), sha256) == first and len(server.asked) == 2
        first.write_bytes(CONTENT[1:])
        assert "has changed since" in refused(server.url("a/student.pth"))
        assert "another file than expected" in refused(server.url("a/student.pth"), sha256)


@pytest.mark.parametrize("source", ["https://h:port/x", "http://[::1/x", "ftp://h/x", "https://h/..", "HTTPS:x"])
def test_odd_addresses_are_one_line(source):
    assert source in refused(source)


def test_local_files(tmp_path, monkeypatch):
    (tmp_path / "x.pth").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/x.pth") == tmp_path / "x.pth"
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(str(tmp_path / "pipe"))
    for source in ("absent.pth", "a" * 5000, "x\0y", "~nobody-here/x.pth"):
        assert "checkpoint " in refused(source)
    assert "has none of" in refused(str(tmp_path))
