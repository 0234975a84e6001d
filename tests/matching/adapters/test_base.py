"""What all adapters share, on a model of two layers."""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.base import Adapter, AdapterOptions
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class Plain(nn.Module):
    """Reads no checkpoints."""

    def __init__(self, width: int = 3):
        super().__init__()
        if width < 1:
            raise ValueError(f"width {width} is too small")
        self.vision, self.text = nn.Linear(2, width), nn.Linear(2, width)
        self.head = nn.Linear(width, 1)
        self.copy_m = nn.Linear(width, 1)

    def forward(self, samples):
        return {"loss": self.head.weight.sum(), "logits": torch.zeros(3), "epoch": torch.tensor(samples["epoch"])}


class Finetuned(Plain):
    """With LAVIS's ``BaseModel.load_checkpoint``."""

    def load_checkpoint(self, url_or_filename):
        return self.load_state_dict(torch.load(url_or_filename)["model"], strict=False)


class Pretrained(Finetuned):
    """With a ``load_from_pretrained`` too."""

    def load_from_pretrained(self, url_or_filename):
        message = self.load_checkpoint(url_or_filename)
        self.pretrained = True
        return message


@dataclass
class Options(AdapterOptions):
    width: int = 3


class TwoLayers(Adapter):
    options_class = Options
    inference_modules = ("vision", "text", "head.weight")

    @classmethod
    def build(cls, model_class, section, options):
        return model_class(options.width)

    def encode_images(self, images):
        return ImageFeatures(self.model.vision(images.flatten(1)[:, None, :2]))

    def encode_texts(self, texts):
        return TextFeatures(self.model.text(torch.tensor([[[len(t), 1.0]] for t in texts])))

    def match(self, images, texts, pairs):
        def score(image, text):
            return self.model.head(images.tokens[image, 0] * texts.tokens[text, 0])[:, 0]

        return self.in_chunks(score, pairs, bytes_per_pair=2**20)

    def encoder_modules(self):
        return [self.model.vision, self.model.text]

    def encoder_settings(self):
        return {"width": self.options.width}


def build(model_class=Finetuned, **section):
    return TwoLayers.from_config(model_class, OmegaConf.create({"arch": "two_layers", **section}), "model.teacher")


def saved(path, drop: tuple[str, ...] = (), width: int = 3) -> str:
    state = {k: v for k, v in Plain(width).state_dict().items() if k not in drop}
    torch.save({"model": state}, path)
    return str(path)


def test_options_come_from_the_section_in_both_ways_of_wrapping():
    assert build(width=5).options.width == 5
    wrapped = TwoLayers(Plain(), OmegaConf.create({"arch": "two_layers", "width": 4, "queue_size": 9}))
    assert wrapped.options.width == 4
    assert wrapped.section == {"arch": "two_layers", "width": 4, "queue_size": 9}
    with pytest.raises(UserError, match=r"model.teacher.width: 'wide' \(text\) is not an integer"):
        build(width="wide")


def test_sizes_that_the_model_refuses_are_the_users_error():
    with pytest.raises(UserError, match=r"model.teacher: Finetuned cannot be built: width 0 is too small"):
        build(width=0)


def test_without_a_checkpoint_the_weights_are_random_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO):
        build()
        build(finetuned="unused.pth", load_finetuned=False)
    assert caplog.text.count("starts from random weights") == 2


@pytest.mark.parametrize("model_class", [Finetuned, Pretrained])
def test_fine_tuned_weights_go_before_pre_trained_ones(model_class, tmp_path):
    first, second = saved(tmp_path / "a.pth"), saved(tmp_path / "b.pth")
    for section, expected in (({"finetuned": first, "pretrained": second}, first),
                              ({"finetuned": first, "pretrained": second, "load_finetuned": False}, second),
                              ({"pretrained": second}, second)):  # fmt: skip
        model = build(model_class, **section).model
        torch.testing.assert_close(model.state_dict(), torch.load(expected)["model"], check_device=False)
        assert getattr(model, "pretrained", False) == (expected == second and model_class is Pretrained)


def test_files_that_do_not_serve_are_refused_in_one_line(tmp_path):
    def refused(match, path, model_class=Finetuned):
        with pytest.raises(UserError, match=match) as caught:
            build(model_class, finetuned=str(path))
        assert len(caught.value.faults) == 1
        assert "\n" not in str(caught.value)

    refused("model.teacher.finetuned: no file .*absent.pth", tmp_path / "absent.pth")
    refused("leaves 2 weights that scoring needs at random, first vision.weight",
            saved(tmp_path / "a.pth", drop=("vision.weight", "head.weight")))  # fmt: skip
    refused("Plain reads no checkpoints", saved(tmp_path / "b.pth"), Plain)
    refused("cannot be loaded into Finetuned: Error.* size mismatch for vision.weight",
            saved(tmp_path / "c.pth", width=7))  # fmt: skip
    torch.save({"weights": {}}, tmp_path / "d.pth")
    refused("cannot be loaded into Finetuned: it has no 'model'", tmp_path / "d.pth")
    torch.save({"model": {"vision.weight": Plain()}}, tmp_path / "e.pth")
    refused("leaves 5 weights that scoring needs at random", tmp_path / "e.pth")
    (tmp_path / "f.pth").write_bytes(pickle.dumps({"model": {}})[:5])
    refused("f.pth", tmp_path / "f.pth")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.to(torch.int8), "holds numbers of type int8"),
        (lambda w: w.bool(), "holds numbers of type bool"),
        (lambda w: w.to(torch.complex64), "holds numbers of type complex64"),
        (lambda w: w * torch.nan, "holds NaN or infinite values"),
        (lambda w: "a text", "leaves 1 weights that scoring needs at random, first vision.weight"),
    ],
)
def test_weights_of_another_kind_are_told_by_name(tmp_path, change, words):
    state = Plain().state_dict()
    torch.save({"model": {**state, "vision.weight": change(state["vision.weight"])}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"model\.teacher\.finetuned: .*a\.pth.*{words}") as caught:
        build(finetuned=str(tmp_path / "a.pth"))
    assert len(caught.value.faults) == 1


def test_weights_under_lavis_s_other_names_are_compared_too(tmp_path):
    state = Plain().state_dict()
    # as in ALBEF's pre-trained files; LAVIS takes "bert." out
    state["vision.bert.weight"] = state.pop("vision.weight").to(torch.int8)
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: vision\.weight holds numbers of type int8"):
        build(finetuned=str(tmp_path / "a.pth"))


def test_what_scoring_does_not_use_may_be_absent(tmp_path):
    path = saved(tmp_path / "a.pth", drop=("copy_m.weight", "copy_m.bias", "head.bias"))
    assert build().load_checkpoint(path) == ["head.bias", "copy_m.weight", "copy_m.bias"]


def test_its_file_holds_plain_containers(tmp_path):
    adapter = build(width=4, sizes={"text": {"layers": [1, 2]}}, finetuned=saved(tmp_path / "a.pth", width=4))
    torch.save(adapter.checkpoint(), tmp_path / "student.pth")
    content = torch.load(tmp_path / "student.pth", weights_only=True)
    assert content["arch"] == "two_layers"
    assert content["config"] == {"arch": "two_layers", "width": 4, "sizes": {"text": {"layers": [1, 2]}}}
    again = build(width=4, finetuned=str(tmp_path / "student.pth"))
    torch.testing.assert_close(again.model.state_dict(), adapter.model.state_dict())


def test_frozen_parts_neither_learn_nor_drop_out():
    adapter = build(freeze=["vision"]).train()
    assert not adapter.model.vision.weight.requires_grad
    assert not adapter.model.vision.training
    assert adapter.model.text.training
    assert not adapter.encoders_frozen()
    assert build(freeze=["encoders"]).encoders_frozen()
    with pytest.raises(UserError, match=r"model.freeze: 'visual' is no part of the model; parts: encoders, vision"):
        build(freeze=["visual"])


def test_forward_gives_the_wrapped_losses_and_fills_in_the_steps():
    losses = build()({"image": None})
    assert set(losses) == {"loss", "epoch"}
    assert losses["epoch"] == 0
    assert build()({"image": None, "epoch": 3})["epoch"] == 3
    adapter = build()
    torch.testing.assert_close(adapter.own_loss({}), adapter.model.head.weight.sum())


def test_chunks_hold_what_the_memory_allows():
    adapter = build(match_memory_mb=2.0)
    images, texts = adapter.encode_images(torch.randn(3, 2, 1, 1)), adapter.encode_texts(["a", "bcd"])
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(2))[:5]
    sizes = []
    adapter.model.head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    scores = adapter.match(images, texts, pairs)
    assert sizes == [2, 2, 1]
    for (image, text), score in zip(pairs.tolist(), scores, strict=True):
        expected = adapter.model.head(images.tokens[image, 0] * texts.tokens[text, 0])[0]
        torch.testing.assert_close(score, expected)
    assert adapter.match(images, texts, pairs[:0]).shape == (0,)


def test_signature_follows_weights_settings_and_kind():
    frozen = build(freeze=["encoders"])
    assert build().encoder_signature() is None
    signature = frozen.encoder_signature()
    twin = build(freeze=["encoders"])
    assert twin.encoder_signature() != signature
    twin.model.load_state_dict(frozen.model.state_dict())
    assert twin.encoder_signature() == signature
    assert twin.shares_encoders_with(frozen)
    twin.model.head.weight.data.add_(1.0)
    assert twin.encoder_signature() == signature
    twin.options.width = 99
    fresh = TwoLayers(twin.model, {}, twin.options)
    assert fresh.encoder_signature() != signature

    class Other(TwoLayers):
        pass

    assert Other(frozen.model, {}, frozen.options).encoder_signature() != signature
    assert frozen.double().encoder_signature() != signature


def test_signature_is_kept_until_a_weight_changes(monkeypatch):
    adapter = build(freeze=["encoders"])
    before = adapter.encoder_signature()
    monkeypatch.setattr(adapter, "encoder_settings", lambda: pytest.fail("computed again"))
    assert adapter.encoder_signature() == before
    monkeypatch.undo()
    with torch.no_grad():
        adapter.model.text.bias[0] += 1
    assert adapter.encoder_signature() != before


def test_fusion_parameters_are_all_but_the_encoders_unless_told():
    adapter = build()
    assert isinstance(adapter, Matcher)
    assert adapter.fusion_parameters() == 8
    assert adapter.head_parameter_names() == set()
    adapter.fusion_modules = lambda: [adapter.model.head, adapter.model]
    assert adapter.fusion_parameters() == sum(p.numel() for p in adapter.parameters())
    adapter.fusion_modules = lambda: [adapter.model.head]
    assert adapter.fusion_parameters() == 4
    assert adapter.head_parameter_names() == {"model.head.weight", "model.head.bias"}
