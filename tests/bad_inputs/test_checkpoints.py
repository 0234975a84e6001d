"""Checkpoints that are cut, scrambled, of another shape or no checkpoints at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.tensor_files import load_tensors

pytest.importorskip("lavis")

from lavis_dcd.models.weights import LoadReport, fill, read

TENSORS = {"weight": torch.arange(600.0).view(20, 30), "bias": torch.ones(20)}


@dataclass
class Config:
    arch: str = "tiny"


def _file(folder: Path, kind: str) -> Path:
    path = folder / f"x.{kind}"
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save({"model": TENSORS}, path, _use_new_zipfile_serialization=kind != "ckpt")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth", "ckpt"])
@pytest.mark.parametrize("seed", range(8))
def test_cut_at_a_random_byte(tmp_path, kind, seed):
    path = _file(tmp_path, kind)
    raw = path.read_bytes()
    path.write_bytes(raw[: np.random.default_rng(seed).integers(len(raw) - 64)])
    start = f"checkpoint {path} is not a readable {'safetensors' if kind == 'safetensors' else 'PyTorch'} file: "
    for use in (load_tensors, lambda path: read(path, Config)):
        with pytest.raises(UserError) as caught:
            use(path)
        assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]
        assert caught.value.faults[0].startswith(start)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", bytes(99)])
def test_other_files_of_that_name(tmp_path, kind, content):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tensors(path)
    what = "safetensors" if kind == "safetensors" else "PyTorch"
    assert caught.value.faults[0].startswith(f"checkpoint {path} is not a readable {what} file: ")


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as caught:
        load_tensors(tmp_path / "x.pth")
    assert caught.value.faults == [f"checkpoint {tmp_path / 'x.pth'} does not exist"]


def test_a_checkpoint_of_a_list(tmp_path):
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        load_tensors(tmp_path / "x.pth")
    assert caught.value.faults == [f"checkpoint {tmp_path / 'x.pth'} holds a list, expected a dictionary of tensors"]


def test_another_shape(tmp_path):
    path = _file(tmp_path, "pth")
    model = nn.Linear(31, 20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        fill(model, read(path, Config).tensors, LoadReport(), path)
    assert caught.value.faults == [
        f"{path}: weight is (20, 30) there, (20, 31) in the model; make the model's sizes fit"
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_too_few(tmp_path):
    path = _file(tmp_path, "safetensors")
    named = {"weight": read(path, Config).tensors["weight"]}
    with pytest.raises(UserError) as caught:
        fill(nn.Linear(30, 20), named, LoadReport(), path)
    assert caught.value.faults == [
        f"{path}: lacks 1 of the 2 weights that inference reads, among them bias; choose a retrieval checkpoint of "
        "these sizes"
    ]


def test_another_arch(tmp_path):
    torch.save({"model": TENSORS, "config": {"arch": "large"}}, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "x.pth", Config)
    assert caught.value.faults == [
        f"{tmp_path / 'x.pth'}: holds a large, this model is a tiny; name a file of the same arch"
    ]


def test_a_configuration_of_other_keys(tmp_path):
    torch.save({"model": TENSORS, "config": {"arch": "tiny", "depth": 3}}, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "x.pth", Config)
    assert caught.value.faults == [f"{tmp_path / 'x.pth'}.depth: unknown key; legal keys: arch"]
