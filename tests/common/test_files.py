import errno
import hashlib
import os
import pickle
import resource
import stat
import sys
import tarfile
import types
import zipfile
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


def test_a_lightning_file_gives_its_tensors_and_runs_nothing(tmp_path, foreign, monkeypatch):
    content = {
        "state_dict": {"w": torch.arange(4.0), "h": torch.nn.Parameter(torch.ones(2, dtype=torch.float16))},
        "callbacks": {foreign.ModelCheckpoint: foreign.ModelCheckpoint()},
        "hyper_parameters": foreign.Settings(lr=1),
        "epoch": 7,
        "shapes": [torch.Size([2]), torch.float32],
        "view": torch.arange(12.0).view(3, 4).T[1:, ::2],
        "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
    }
    path = tmp_path / "lightning.ckpt"
    torch.save(content, path)
    monkeypatch.delitem(sys.modules, "foreign_trainer")
    loaded = files.load_tensors(path)
    torch.testing.assert_close(dict(loaded["state_dict"]), content["state_dict"])
    torch.testing.assert_close(loaded["view"], content["view"])
    assert loaded["empty"].shape == (0, 3) and loaded["empty"].dtype == torch.bfloat16
    assert loaded["shapes"] == content["shapes"]
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


def test_a_file_with_code_is_refused_with_the_reason_and_runs_nothing(tmp_path, marker, code):
    name, payload = code
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": payload}, path)
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


class Mapping(torch.nn.Module):
    """As TorchScript, makes a file and fills it when it is read."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.w = torch.ones(1)

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path, self.training = state[0], state[2]
        # kept, or the compiler would leave it out
        self.w = torch.from_file(self.path, shared=True, size=4, dtype=torch.uint8).fill_(65)

    def forward(self, x):
        return x + self.w


@pytest.fixture
def torchscript(tmp_path, marker):
    """An archive that fills ``marker`` when it is read."""
    path = tmp_path / "evil.pt"
    torch.jit.script(Mapping(str(marker))).save(str(path))
    return path


def renamed(path, old, new):
    """The archive with a part of its records' names changed."""
    copy = path.with_name("renamed.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for record in source.infolist():
            target.writestr(record.filename.replace(old, new), source.read(record))
    return copy


def test_the_torchscript_archive_is_a_real_one(torchscript, marker):
    torch.jit.load(torchscript)
    assert marker.read_bytes() == b"AAAA"


@pytest.mark.parametrize("change", [None, ("constants.pkl", "CONSTANTS.PKL"), ("code/", "Code/"), ("constants", "c")])
def test_a_torchscript_archive_is_refused_and_runs_nothing(torchscript, marker, change):
    path = renamed(torchscript, *change) if change else torchscript
    with pytest.raises(UserError) as caught:
        files.load_tensors(path)
    assert caught.value.faults == [
        f"checkpoint {path} holds code: it is a TorchScript archive, which runs when it is read; nothing of it was "
        "run. Name a file from another place, or one of tensors only"
    ]
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["an old file", "a zip of another kind", "a tar file"])
def test_containers_of_other_kinds_are_refused_unread(tmp_path, kind, marker):
    path = tmp_path / "x.pth"
    if kind == "an old file":
        torch.save({"a": malicious((os.mkdir, (str(marker),)))}, path, _use_new_zipfile_serialization=False)
    elif kind == "a tar file":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "storages")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/readme", "no tensors")
    with pytest.raises(UserError, match="is not a readable PyTorch file: it is ") as caught:
        files.load_tensors(path)
    assert len(caught.value.faults) == 1 and not marker.exists()


def test_compressed_and_cut_records_of_a_foreign_file_are_refused(tmp_path, foreign):
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.zeros(1000), "h": foreign.Settings(lr=1)}, path)
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(UserError, match=r"not a readable PyTorch file: the record data/0 is not 1000 numbers"):
        files.load_tensors(bomb)


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
