"""Files of weights by the one reader, which runs nothing."""

import copy
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import hostile
import pytest
import torch
from safetensors.torch import save_file

from lavis_dcd.common import archives, tensor_files, unpickling
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.unpickling import unpickled


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


@pytest.fixture
def torchscript(tmp_path, marker):
    """An archive that fills ``marker`` when it is read."""
    return hostile.torchscript(tmp_path / "evil.pt", marker)


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


# -- what is no regular file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("kind", ["a pipe", "a link to a device", "a folder", "a link to nothing"])
def test_only_regular_files_are_opened(tmp_path, name, kind):
    path = tmp_path / name
    words = {
        "a pipe": (lambda: os.mkfifo(path), "is no regular file but a named pipe"),
        "a link to a device": (lambda: path.symlink_to("/dev/zero"), "is no regular file but a device"),
        "a folder": (path.mkdir, "is no regular file but a folder"),
        "a link to nothing": (lambda: path.symlink_to(tmp_path / "none"), "does not exist"),
    }
    make, expected = words[kind]
    make()
    with pytest.raises(UserError, match=expected) as caught:
        tensor_files.load_tensors(path)
    assert len(caught.value.faults) == 1 and str(path) in caught.value.faults[0]


def test_a_file_that_is_exchanged_while_it_is_read_is_still_the_one_that_was_checked(tmp_path, torchscript, marker):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(2)}, path)
    with archives.opened_file(path) as file:
        archive = archives.Archive(file, path)
        os.replace(torchscript, path)
        torch.testing.assert_close(unpickled(archive.pickle(), archive), {"a": torch.ones(2)})
    assert not marker.exists()


# -- containers that lie about their contents ------------------------------------------------------------------------


def archive_of(path, pickle_bytes, compression=zipfile.ZIP_STORED, **records):
    """An archive of `torch.save` with this pickle and these records of numbers."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickle_bytes)
        for key, value in records.items():
            archive.writestr(f"x/data/{key}", value)
    return path


def refused(path, words):
    with pytest.raises(UserError, match=words) as caught:
        tensor_files.load_tensors(path)
    (line,) = caught.value.faults
    assert str(path) in line and "\n" not in line and len(line) < 700 + len(str(path))


@pytest.mark.parametrize("with_archive", [False, True])
def test_an_old_tar_file_with_a_pipe_inside_does_not_hang(tmp_path, with_archive):
    path, inside = tmp_path / "old.pth", tmp_path / "storages"
    os.mkfifo(inside)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(inside, name)
    if with_archive:  # zip archives are found from their end, torch's own reader looks at the start
        torch.save({"a": torch.ones(2)}, tmp_path / "new.pth")
        path.write_bytes(path.read_bytes() + (tmp_path / "new.pth").read_bytes())
        torch.testing.assert_close(tensor_files.load_tensors(path), {"a": torch.ones(2)})
    else:
        refused(path, "it is no whole zip archive")


def test_a_pickle_that_inflates_is_refused_unread(tmp_path, peak_memory_of):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as record:
        for _ in range(64):
            record.write(b"]" * (1 << 20))
    assert path.stat().st_size < 1 << 20
    assert peak_memory_of(lambda: refused(path, "its records are compressed")) < 8 << 20


@pytest.fixture
def peak_memory_of():
    def measure(work):
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure


def test_records_of_one_name_are_refused(tmp_path):
    path = archive_of(tmp_path / "x.pth", pickle.dumps({"a": 1}, 2))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x/data.pkl", pickle.dumps({"a": 2}, 2))
    refused(path, "two of its records have one name")
    path = archive_of(tmp_path / "y.pth", pickle.dumps({"a": 1}, 2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("X/DATA.PKL", pickle.dumps({"a": 2}, 2))
    refused(path, "two of its records have one name")


def test_records_that_overlap_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("x/data/0", bytes(100_000))
        first = archive.getinfo("x/data/0")
        for key in range(1, 50):
            again = copy.copy(first)
            again.filename = f"x/data/{key}"
            archive.filelist.append(again)
    refused(path, "its records say that they are larger than the file")


def test_a_record_larger_than_the_file_is_refused(tmp_path):
    path = archive_of(tmp_path / "x.pth", pickle.dumps({"a": 1}, 2), **{"0": b"1234"})
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")  # the list's entry of the last record
    raw[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(raw)
    refused(path, "its records say that they are larger than the file")


# -- pickles that take more than they bring --------------------------------------------------------------------------


def tensor_pickle(size, stride, offset=0, count=4, key="0"):
    """The pickle of {"a": a tensor on a record of float32 numbers}."""

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(value, Stored) else None

    buffer = io.BytesIO()
    arguments = (Stored(), offset, size, stride, False, OrderedDict())
    Pickler(buffer, 2).dump({"a": hostile.Calls(torch._utils._rebuild_tensor_v2, *arguments)})
    return buffer.getvalue()


def test_a_tensor_of_this_form_is_read(tmp_path):
    numbers = torch.arange(4.0)
    path = archive_of(tmp_path / "x.pth", tensor_pickle((2, 2), (1, 2)), **{"0": numbers.numpy().tobytes()})
    torch.testing.assert_close(tensor_files.load_tensors(path)["a"], numbers.view(2, 2).T)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (10**9,), "stride": (1,)},  # torch's own function would allocate that much
        {"size": (10**12,), "stride": (0,)},  # a copy of it would
        {"size": (2,), "stride": (1,), "offset": 3},
        {"size": (2,), "stride": (-1,)},
        {"size": (-2,), "stride": (1,)},
        {"size": (2,), "stride": (1, 1)},
        {"size": (2.0,), "stride": (1,)},
        {"size": (2,), "stride": (1,), "count": 1 << 50},
        {"size": (2,), "stride": (1,), "count": -4},
        {"size": (2,), "stride": (1,), "key": "1"},
        {"size": (2,), "stride": (1,), "key": "../data.pkl"},
        {"size": (1,) * 65, "stride": (1,) * 65},
    ],
)
def test_a_tensor_larger_than_its_numbers_is_refused(tmp_path, arguments):
    path = archive_of(tmp_path / "x.pth", tensor_pickle(**arguments), **{"0": bytes(16)})
    refused(path, "is not a readable PyTorch file")


def laughs(depth):
    """The pickle of {"a": lists of two lists of two lists...}, each list in it twice."""
    made = b"\x80\x02]q\x00K\x01a0"
    for number in range(depth):
        made += b"]q%c(h%ch%ce0" % (number + 1, number, number)
    return made + b"}X\x01\x00\x00\x00ah%cs." % depth


@pytest.mark.parametrize(
    "made",
    [
        laughs(50),
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dictionary that holds itself
        b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 5000 + b"a" * 4999 + b"s.",  # nested deeper than Python's stack
        b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",  # a key whose hash would overflow C's stack
        b"\x80\x02}X\x01\x00\x00\x00a" + b"]0" * 11_000 + b"K\x01s.",  # too many values
        b"\x80\x02}X\x01\x00\x00\x00a\x8b\x00\x00\x01\x00" + b"\x7f" * (1 << 16) + b"s.",  # a number of 500,000 bits
        b"\x80\x02}ccollections\nOrderedDict\n}\x85Rs.",
        b"\x80\x02.",
        b"",
    ],
    ids=["laughs", "itself", "deep", "key", "many", "number", "copy", "nothing", "empty"],
)
def test_a_pickle_that_would_take_more_than_it_brings_is_refused(tmp_path, monkeypatch, made, request):
    if request.node.callspec.id == "many":
        monkeypatch.setattr(unpickling, "_LONGEST", 20_000)
    refused(archive_of(tmp_path / "x.pth", made), "is not a readable PyTorch file")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_what_torch_s_own_reader_gives(tmp_path, protocol):
    content = {
        "model": OrderedDict(w=torch.arange(6.0).view(2, 3).T, h=torch.ones(3, dtype=torch.bfloat16)),
        "flags": (True, None, 1.5, -(1 << 70), "text", [1, [2, (3,)]], {1: {"a": 2}}),
        "kinds": [torch.zeros(2, dtype=kind) for kind in (torch.int64, torch.uint8, torch.bool, torch.complex64)],
    }
    content["tied"] = content["model"]["w"]
    path = tmp_path / "x.pth"
    torch.save(content, path, pickle_protocol=protocol)
    read = tensor_files.load_tensors(path)
    expected = torch.load(path, weights_only=True) if protocol == 2 else content
    torch.testing.assert_close(read["kinds"], expected["kinds"], rtol=0, atol=0)
    torch.testing.assert_close(dict(read["model"]), dict(expected["model"]), rtol=0, atol=0)
    assert read["flags"] == expected["flags"]
    assert read["tied"].data_ptr() == read["model"]["w"].data_ptr()


def test_safetensors_whose_header_promises_too_much_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    large = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}}).encode()
    for length, rest in (
        (1 << 60, b"{}"),
        (40 << 20, b" " * (41 << 20)),
        (200_005, b'{"a":' + b"[" * 200_000),
        (len(large), large + bytes(16)),
    ):
        path.write_bytes(struct.pack("<Q", length) + rest)
        refused(path, "is not a readable safetensors file")


# -- tensors against a model's own -----------------------------------------------------------------------------------

OWN = {
    "w": torch.zeros(2, 2),
    "half": torch.zeros(2, dtype=torch.float16),
    "position_ids": torch.arange(4),
    "steps": torch.tensor(0),
    "flag": torch.tensor([True]),
    "mask": torch.tensor([0.0, -torch.inf]),
}
NAN, BEYOND = torch.tensor([1.0, torch.nan]), torch.tensor([0, 1, 2, 9])


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("w", torch.ones(2, 2, dtype=torch.int8), "holds numbers of type int8, the model takes float32, float16"),
        ("w", torch.ones(2, 2, dtype=torch.bool), "holds numbers of type bool, the model takes float32, float16"),
        ("w", torch.ones(2, 2, dtype=torch.complex64), "holds numbers of type complex64, the model takes float32"),
        ("w", torch.ones(2, 2, dtype=torch.float8_e4m3fn), "holds numbers of type float8_e4m3fn"),
        ("w", torch.ones(2, 3), r"is \(2, 3\) there, \(2, 2\) in the model"),
        ("w", NAN.expand(2, 2), "holds NaN or infinite values"),
        ("w", torch.full((2, 2), -torch.inf), "holds NaN or infinite values"),
        ("w", torch.full((2, 2), 1e300, dtype=torch.float64), "holds NaN or infinite values"),  # once it is float32
        ("half", torch.full((2,), 1e6), "holds NaN or infinite values"),
        ("position_ids", torch.ones(4), "holds numbers of type float32, the model takes int64"),
        ("position_ids", BEYOND, "counts beyond the model's own"),
        ("position_ids", -torch.arange(4), "counts beyond the model's own"),
        ("steps", torch.tensor(True), "holds numbers of type bool, the model takes int64"),
        ("flag", torch.tensor([1]), "holds numbers of type int64, the model takes bool"),
    ],
)
def test_tensors_of_another_kind_are_told_with_their_names(name, tensor, words):
    (line,) = tensor_files.tensor_faults({name: tensor, "other": NAN}, OWN, "x.pth")
    assert re.match(rf"x\.pth: {name} {words}", line)


def test_tensors_that_fit_pass():
    fitting = {
        "w": torch.ones(2, 2, dtype=torch.bfloat16),
        "half": torch.ones(2, dtype=torch.float64),
        "position_ids": torch.arange(4, dtype=torch.int32),
        "steps": torch.tensor(9000),
        "flag": torch.tensor([False]),
        "mask": torch.tensor([0.0, -torch.inf]),
        "other": torch.ones(1, dtype=torch.int8),
    }
    assert tensor_files.tensor_faults(fitting, OWN, "x.pth") == []
    assert tensor_files.tensor_faults({"w": torch.ones(3, 3)}, OWN, "x.pth", shapes=False) == []
    on_meta = {name: tensor.to("meta") for name, tensor in OWN.items()}
    assert tensor_files.tensor_faults(OWN, on_meta | {"mask": OWN["mask"]}, "x.pth") == []
    assert tensor_files.tensor_faults(on_meta, OWN, "x.pth") == []


# -- the loading of others -------------------------------------------------------------------------------------------


def test_the_loading_of_others_reads_by_this_reader_and_only_within_the_block(tmp_path, torchscript, marker):
    torch.save({"a": torch.ones(2), "settings": OrderedDict(b=1)}, tmp_path / "x.pth")
    load, load_script = torch.load, torch.jit.load
    with tensor_files.tensors_only(lambda content, path: {**content, "path": path}):
        read = torch.load(str(tmp_path / "x.pth"), map_location="cpu", weights_only=False)
        assert read["settings"] == {"b": 1} and read["path"] == tmp_path / "x.pth"
        for reader in (torch.load, torch.jit.load):
            with pytest.raises(UserError):
                reader(str(torchscript))
        with pytest.raises(UserError, match="from memory"):
            torch.load(io.BytesIO(torchscript.read_bytes()))
    assert (torch.load, torch.jit.load) == (load, load_script) and not marker.exists()
