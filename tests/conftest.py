"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

# One thread per process keeps float sums, hence golden values, independent of the machine's cores. Whatever the caller
# exports: some tests compare a process of their own, which has one thread, with this one bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Photographs, weights and golden values that do not ship with the product; skips without them."""
    folder = Path(os.environ.get("LAVIS_DCD_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder} (set LAVIS_DCD_SHARED)")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache root for this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LAVIS_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address but the loopback can be resolved."""
    import socket

    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        if host in ("localhost", "127.0.0.1"):
            return real(host, *args, **kwargs)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
