"""Files of weights by the one reader, which runs nothing."""

import os
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavis_dcd.common import tensor_files
from lavis_dcd.common.errors import UserError


def test_tensors_of_safetensors_and_of_torch(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int8)}
    save_file(tensors, str(tmp_path / "x.safetensors"))
    torch.save({"state_dict": tensors, "step": 3}, tmp_path / "x.pth")
    torch.testing.assert_close(tensor_files.load_tensors(tmp_path / "x.safetensors"), tensors)
    loaded = tensor_files.load_tensors(tmp_path / "x.pth")
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
    loaded = tensor_files.load_tensors(path)
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
        tensor_files.load_tensors(path)
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
        tensor_files.load_tensors(path)
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
        tensor_files.load_tensors(path)
    assert len(caught.value.faults) == 1 and not marker.exists()


def test_compressed_and_cut_records_of_a_foreign_file_are_refused(tmp_path, foreign):
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.zeros(1000), "h": foreign.Settings(lr=1)}, path)
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(UserError, match=r"not a readable PyTorch file: its records are compressed"):
        tensor_files.load_tensors(bomb)


def test_a_bare_pickle_with_code_runs_nothing(tmp_path, marker):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": malicious((os.mkdir, (str(marker),)))}))
    with pytest.raises(UserError, match=r"holds code: it would call posix\.mkdir|not a readable"):
        tensor_files.load_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1})])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_refused_in_one_line(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable") as caught:
        tensor_files.load_tensors(path)
    assert len(caught.value.faults) == 1 and "\n" not in str(caught.value)


def test_missing_and_wrong_kinds_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        tensor_files.load_tensors(tmp_path / "none.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        tensor_files.load_tensors(tmp_path / "list.pth")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="not a readable"):
        tensor_files.load_tensors(path)
