import errno
import hashlib
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lavis_dcd.common import files
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_path, writing


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with files.atomic_write(target, "w") as handle:
        handle.write("één")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "één"
    with pytest.raises(KeyboardInterrupt), files.atomic_write(target) as handle:
        handle.write(b"half")
        raise KeyboardInterrupt
    assert target.read_text(encoding="utf-8") == "één"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_write_brings_the_file_and_then_its_name_to_the_disk(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def replace(old, new):
        events.append("rename")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    with files.atomic_write(tmp_path / "x"):
        pass
    assert events[1:] == ["rename", tmp_path] and events[0].parent == tmp_path


def test_leftovers_of_killed_processes_are_cleared(tmp_path):
    for name in (".config.yaml.abc.tmp", "config.yaml", ".hidden", "notes.tmp"):
        (tmp_path / name).touch()
    files.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "config.yaml", "notes.tmp"]


def test_atomic_write_gives_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with files.atomic_write(tmp_path / "ours"):
        pass
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    with pytest.raises(ValueError, match="mode"), files.atomic_write(plain, "ab"):
        pass


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path / "a"))
    assert files.cache_root() == tmp_path / "a"
    monkeypatch.delenv("LAVIS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert files.cache_root() == tmp_path / "b" / "lavis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_root() == Path.home() / ".cache" / "lavis"
    assert not (tmp_path / "a").exists()


def test_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 1_000_000)
    assert files.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_packaged_folder(tmp_path):
    assert (files.packaged_folder("configs") / "models").is_dir()
    with pytest.raises(FileNotFoundError, match="reinstall"):
        files.packaged_folder("nothing")


def write_safetensors(path):
    save_file({"a": torch.zeros(50_000)}, str(path))


def write_torch_by_name(path):
    torch.save({"a": torch.zeros(50_000)}, path)


def write_torch_by_handle(path):
    with open(path, "wb") as handle:
        torch.save({"a": torch.zeros(50_000)}, handle)


def write_bytes(path):
    Path(path).write_bytes(bytes(200_000))


@pytest.mark.parametrize("write", [write_safetensors, write_torch_by_name, write_torch_by_handle, write_bytes])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_that_does_not_fit_is_told_by_its_name_whoever_writes_it(tmp_path, write, before):
    """The limit of a file's size is a disk that is full for the process alone: the writers meet the real thing."""
    target = tmp_path / "weights"
    if before is not None:
        target.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught, atomic_path(target) as path:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # torch writes to a name by C++'s streams, which keep no number
    assert caught.value.errno in ((errno.EFBIG,) if write is not write_torch_by_name else (errno.EFBIG, errno.EIO))
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["weights"])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })'),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_whoever_wraps_it(tmp_path, monkeypatch, error):
    monkeypatch.setattr(files, "_is_full", lambda folder: True)
    with pytest.raises(OSError) as caught, writing(tmp_path / "x"):
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        UserError("PytorchStreamWriter failed"),
        RuntimeError("shapes differ"),
        SafetensorError("Error while deserializing header"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a picture"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
)
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, writing(tmp_path / "x"):
        raise error
    assert caught.value is error


def test_without_a_home_the_cache_is_asked_for_in_one_line(monkeypatch):
    for name in ("LAVIS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match=r"LAVIS_CACHE: user \d+ has no home folder; set LAVIS_CACHE"):
        files.cache_root()
