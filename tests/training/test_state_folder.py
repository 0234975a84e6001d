import hashlib
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_dcd.training import checkpoint as state_folder
from lavis_dcd.training.checkpoint import STATE, TENSORS, DamagedError

STATES = {
    "model": {"a.weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.98)}]},
    "rng": {"python": (3, (1, 2**64), None), "torch": torch.arange(9, dtype=torch.uint8)},
    "best": {"step": 10, "metric": 0.1 + 0.2},
    "flags": [True, False, None, "é", -1],
    "$odd": {"$tensor": "no tensor"},
    "empty": torch.empty(0, 4),
}


def assert_equal(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted


def test_what_is_written_is_read(tmp_path):
    state_folder.write(tmp_path / "x", STATES)
    assert_equal(state_folder.read(tmp_path / "x"), STATES)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [STATE, TENSORS]
    assert json.loads((tmp_path / "x" / STATE).read_text())["state"]["best"]["step"] == 10
    assert state_folder.read_plain(tmp_path / "x")["best"] == STATES["best"]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$items"])
nested = st.recursive(
    plain | st.integers(0, 5).map(lambda n: torch.arange(n)),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(keys, nested))
def test_any_nesting_comes_back(tmp_path, content):
    state_folder.write(tmp_path / "any", content)
    assert_equal(state_folder.read(tmp_path / "any"), content)


def test_tied_and_overlapping_tensors(tmp_path):
    whole = torch.arange(12.0)
    content = {"a": whole, "b": whole, "part": whole[3:5], "turned": whole.reshape(3, 4).T}
    state_folder.write(tmp_path / "x", content)
    found = state_folder.read(tmp_path / "x")
    assert_equal(found, {**content, "turned": content["turned"].contiguous()})
    assert found["a"] is found["b"]


def test_other_objects_are_no_state(tmp_path):
    with pytest.raises(TypeError, match="/model/0 is a set"):
        state_folder.write(tmp_path / "x", {"model": [{1}]})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "step-00000001"
    state_folder.write(path, STATES)
    return path


def damaged_copy(sound, folder):
    shutil.rmtree(folder / "x", ignore_errors=True)
    return shutil.copytree(sound, folder / "x")


files = st.sampled_from([STATE, TENSORS])
relaxed = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(name=files, data=st.data())
def test_a_cut_at_any_byte_is_seen(sound, tmp_path, name, data):
    file = damaged_copy(sound, tmp_path) / name
    raw = file.read_bytes()
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    for read in (state_folder.read, state_folder.read_plain)[: 1 if name == TENSORS else 2]:
        with pytest.raises(DamagedError, match=f"{name} is (cut short|empty)"):
            read(tmp_path / "x")


@relaxed
@given(name=files, data=st.data())
def test_a_changed_byte_is_seen(sound, tmp_path, name, data):
    file = damaged_copy(sound, tmp_path) / name
    raw = bytearray(file.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    with pytest.raises(DamagedError, match=f"the checksum of {name} does not fit it|{name} is cut short"):
        state_folder.read(tmp_path / "x")


@pytest.mark.parametrize("name", [STATE, TENSORS])
def test_a_missing_half_an_empty_half_and_a_folder_in_its_place(sound, tmp_path, name):
    file = damaged_copy(sound, tmp_path) / name
    file.unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        state_folder.read(tmp_path / "x")
    file.write_bytes(b"")
    with pytest.raises(DamagedError, match=f"{name} is (empty|cut short)"):
        state_folder.read(tmp_path / "x")
    file.unlink()
    file.mkdir()
    with pytest.raises(DamagedError, match=r"Is a directory|cut short"):
        state_folder.read(tmp_path / "x")


def test_halves_of_two_checkpoints_do_not_pass_for_one(sound, tmp_path):
    path = damaged_copy(sound, tmp_path)
    state_folder.write(tmp_path / "y", {**STATES, "model": {"a.weight": torch.zeros(2, 3)}})
    shutil.copy(tmp_path / "y" / TENSORS, path / TENSORS)
    with pytest.raises(DamagedError, match="tensors"):
        state_folder.read(path)


def test_a_sound_checksum_over_nonsense(tmp_path):
    state_folder.write(tmp_path / "x", {"model": torch.ones(1)})
    file = tmp_path / "x" / STATE
    body = file.read_bytes().partition(b"\n")[2].replace(b'"$tensor": "model"', b'"$tensor": "other"')
    file.write_bytes(b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body)
    with pytest.raises(DamagedError, match="does not fit"):
        state_folder.read(tmp_path / "x")
