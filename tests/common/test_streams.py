"""Standard streams that are closed, or whose reader has gone."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from lavis_dcd.common import streams
from lavis_dcd.common.streams import KeptStream, kept_streams


def broken_pipe() -> io.TextIOWrapper:
    """A stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(os.fdopen(writer, "wb"))


def test_a_broken_pipe_takes_every_text(monkeypatch):
    stream = broken_pipe()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with kept_streams():
        sys.stdout.write("on it goes")
        sys.stdout.flush()
        sys.stderr.writelines(["on ", "it goes"])
        assert not sys.stderr.isatty() and sys.stderr.fileno() == stream.fileno()
    assert sys.stdout is stream
    stream.flush()  # as Python itself does at its end: nothing is left to fail at


def test_closed_streams_are_none_and_take_every_text(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with kept_streams():
        sys.stdout.write("nobody listens")
        sys.stderr.write("nobody listens")
        sys.stderr.flush()
    assert sys.stderr is None


def test_a_full_disk_behind_a_stream():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w", buffering=1) as full:
        stream = KeptStream(full)
        assert stream.write("a line\n") == 7
        stream.flush()
        streams._flush_for_good(full)


def test_letters_that_a_stream_has_not():
    raw = io.BytesIO()
    stream = KeptStream(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    stream.write("Grüße")
    assert raw.getvalue() == b"Gr\\xfc\\xdfe"


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """What libraries complain of to descriptor 2 must not land in a checkpoint."""
    code = (
        "import os\nfrom lavis_dcd.common.streams import kept_streams\n"
        "with kept_streams():\n"
        f"    with open({str(tmp_path / 'file')!r}, 'w') as handle:\n"
        "        handle.write(str(handle.fileno()))\n"
        "    os.write(2, b'a complaint')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *command], timeout=60)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2
