from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lavis.models import clip_vit, eva_vit
from omegaconf import OmegaConf
from servers import CONTENT, Server, running
from torch import nn

from lavis_dcd.common.download import record_of
from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.base import Adapter, AdapterOptions
from lavis_dcd.matching.adapters.lavis_files import cached_by_lavis, fetched_for_lavis, towers_fetched_here


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with running(Server()) as found:
        yield found


def test_a_file_lies_where_lavis_looks_for_it(server, tmp_path):
    url = server.url("a/vit.pth?download=1")
    path = fetched_for_lavis(url)
    assert path == cached_by_lavis(url) == tmp_path / "torch/hub/checkpoints/vit.pth"
    assert path.read_bytes() == CONTENT and record_of(path).is_file()
    with pytest.raises(UserError, match=r"came from .*/a/vit\.pth"):
        fetched_for_lavis(server.url("b/vit.pth"))


def test_towers_come_through_the_checks(server):
    url = server.url("vit.pth")
    before = eva_vit.download_cached_file, clip_vit.download_cached_file
    with towers_fetched_here():
        for module in (eva_vit, clip_vit):
            path = Path(module.download_cached_file(url=url, check_hash=False, progress=True))
            assert record_of(path).is_file()
        path.write_bytes(CONTENT[::-1])
        with pytest.raises(UserError, match="has changed since"):
            eva_vit.download_cached_file(url)
    assert (eva_vit.download_cached_file, clip_vit.download_cached_file) == before


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)
        self.read: list[str] = []

    def load_checkpoint(self, url_or_filename):
        self.read.append(url_or_filename)
        return self.load_state_dict(torch.load(url_or_filename, weights_only=True)["model"])


@dataclass
class Options(AdapterOptions):
    pass


class OneLayer(Adapter):
    options_class = Options
    inference_modules = ("head",)

    @classmethod
    def build(cls, model_class, section, options):
        return model_class()

    def encode_images(self, images):
        raise NotImplementedError

    encode_texts = match = encoder_modules = encoder_settings = encode_images


def test_lavis_gets_a_checked_file_and_no_address(server):
    saved = io.BytesIO()
    torch.save({"model": {"head.weight": torch.ones(1, 2), "head.bias": torch.zeros(1)}}, saved)
    server.content = saved.getvalue()
    url = server.url("student.pth?token=s3cret").replace("//", "//user:pa55@")
    adapter = OneLayer.from_config(Inner, OmegaConf.create({"arch": "one_layer", "finetuned": url}))
    assert adapter.model.read == [str(cached_by_lavis(url))]
    torch.testing.assert_close(adapter.model.head.weight, torch.ones(1, 2))
    with pytest.raises(UserError) as caught:
        adapter.load_checkpoint(server.url("other/student.pth?token=s3cret"))
    assert "student.pth" in str(caught.value) and not any(word in str(caught.value) for word in ("s3cret", "pa55"))
