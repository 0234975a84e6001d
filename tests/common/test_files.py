import hashlib
import os
import pickle
import stat
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavis_dcd.common import files
from lavis_dcd.common.errors import UserError


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


def test_tensors_of_safetensors_and_of_torch(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int8)}
    save_file(tensors, str(tmp_path / "x.safetensors"))
    torch.save({"state_dict": tensors, "step": 3}, tmp_path / "x.pth")
    torch.testing.assert_close(files.load_tensors(tmp_path / "x.safetensors"), tensors)
    loaded = files.load_tensors(tmp_path / "x.pth")
    torch.testing.assert_close(loaded["state_dict"], tensors)
    assert loaded["step"] == 3


@pytest.fixture
def foreign(monkeypatch, tmp_path):
    """A module of classes that a reader of the file need not have."""
    module = types.ModuleType("foreign_trainer")

    class ModelCheckpoint:
        def __init__(self):
            self.best = 1.0

    class Settings(dict):
        pass

    for cls in (ModelCheckpoint, Settings):
        cls.__module__, cls.__qualname__ = "foreign_trainer", cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "foreign_trainer", module)
    return module


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_file_gives_its_tensors_and_runs_nothing(tmp_path, foreign, monkeypatch, zipped):
    content = {
        "state_dict": {"w": torch.arange(4.0), "h": torch.nn.Parameter(torch.ones(2, dtype=torch.float16))},
        "callbacks": {foreign.ModelCheckpoint: foreign.ModelCheckpoint()},
        "hyper_parameters": foreign.Settings(lr=1),
        "epoch": 7,
        "shapes": [torch.Size([2]), torch.float32],
    }
    path = tmp_path / "lightning.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "foreign_trainer")
    loaded = files.load_tensors(path)
    torch.testing.assert_close(dict(loaded["state_dict"]), content["state_dict"])
    assert loaded["epoch"] == 7
    assert "hyper_parameters" not in loaded


def malicious(reduced):
    class Payload:
        def __reduce__(self):
            return reduced

    return Payload()


@pytest.fixture
def marker(tmp_path):
    """A file that must not appear."""
    return tmp_path / "was run"


@pytest.fixture(params=["posix.system", "builtins.exec", "posix.mkdir", "torch.serialization.load", "main.own"])
def code(request, marker, monkeypatch):
    """(what a file calls when it is unpickled, the object that makes it so)"""
    own = types.ModuleType("main")
    own.own = lambda path: Path(path).touch()
    own.own.__module__, own.own.__qualname__ = "main", "own"
    monkeypatch.setitem(sys.modules, "main", own)
    calls = {
        "posix.system": (os.system, (f"touch '{marker}'",)),
        "builtins.exec": (exec, (f"open({str(marker)!r}, 'w')",)),
        "posix.mkdir": (os.mkdir, (str(marker),)),
        "torch.serialization.load": (torch.load, (str(marker),)),
        "main.own": (own.own, (str(marker),)),
    }
    return request.param, malicious(calls[request.param])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_with_the_reason_and_runs_nothing(tmp_path, marker, code, zipped):
    name, payload = code
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": payload}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        files.load_tensors(path)
    assert caught.value.faults == [
        f"checkpoint {path} holds code: it would call {name} when it is unpickled; nothing of it was run. Name a file "
        "from another place, or one of tensors only"
    ]
    assert not marker.exists()


def test_the_malicious_file_is_a_real_one(tmp_path, marker):
    path = tmp_path / "evil.ckpt"
    torch.save({"callbacks": malicious((os.mkdir, (str(marker),)))}, path)
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_bare_pickle_with_code_runs_nothing(tmp_path, marker):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": malicious((os.mkdir, (str(marker),)))}))
    with pytest.raises(UserError, match=r"holds code: it would call posix\.mkdir|not a readable"):
        files.load_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1})])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_refused_in_one_line(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable") as caught:
        files.load_tensors(path)
    assert len(caught.value.faults) == 1 and "\n" not in str(caught.value)


def test_missing_and_wrong_kinds_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        files.load_tensors(tmp_path / "none.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        files.load_tensors(tmp_path / "list.pth")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="not a readable"):
        files.load_tensors(path)
