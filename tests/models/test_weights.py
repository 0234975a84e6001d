"""Files of weights that others made."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lavis_dcd import cli
from lavis_dcd.common.errors import UserError
from lavis_dcd.models import weights
from lavis_dcd.models.meter.config import MeterConfig


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """What must not appear."""
    return tmp_path / "was run"


@pytest.mark.parametrize("name", ["meter.ckpt", "albef.pth", "pytorch_model.bin"])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path, marker, name):
    path = tmp_path / name
    torch.save({"state_dict": {"w": torch.ones(1)}, "model": {"w": torch.ones(1)}, "hook": Payload(marker)}, path)
    with pytest.raises(UserError, match=rf"{name} holds code: it would call posix.mkdir"):
        weights.read(path, MeterConfig)
    assert not marker.exists()


@pytest.mark.parametrize("forced", [False, True])
def test_lavis_own_reader_runs_nothing_either(tmp_path, marker, monkeypatch, forced):
    from lavis.models.base_model import BaseModel

    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        monkeypatch.setattr(cli, "set_up_logging", lambda: None)
        cli.ready_process()
    path = tmp_path / "evil.pth"
    torch.save({"model": {"w": torch.ones(1)}, "hook": Payload(marker)}, path)
    with pytest.raises(pickle.UnpicklingError):
        BaseModel().load_checkpoint(str(path))
    assert not marker.exists()


def test_a_configuration_that_is_none_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for config, words in (("{half", "is not JSON"), (json.dumps(["a"]), "configuration as a list")):
        save_file({"w": torch.ones(1)}, str(path), metadata={"config": config})
        with pytest.raises(UserError, match=words):
            weights.read(path, MeterConfig)
    torch.save({"model": [torch.ones(1)]}, tmp_path / "y.pth")
    with pytest.raises(UserError, match="tensors as a list"):
        weights.read(tmp_path / "y.pth", MeterConfig)
