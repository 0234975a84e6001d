import hashlib
import os
import stat
from pathlib import Path

import pytest

from lavis_dcd.common import files


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
