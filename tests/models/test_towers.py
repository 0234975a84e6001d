"""Weights of vision towers that others made."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from lavis_dcd.common.errors import UserError
from lavis_dcd.models.towers import TextConfig, TextTower, VisionConfig, build_vision_tower

KINDS = [
    (lambda w: w.to(torch.int8), "holds numbers of type int8"),
    (lambda w: w.bool(), "holds numbers of type bool"),
    (lambda w: w.to(torch.complex64), "holds numbers of type complex64"),
    (lambda w: w * torch.nan, "holds NaN or infinite values"),
]
CLIP = {"width": 8, "layers": 1, "heads": 2, "image_size": 8, "patch_size": 4}


def refused(match: str, config: VisionConfig) -> None:
    with pytest.raises(UserError, match=match) as caught:
        build_vision_tower(config)
    assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]


@pytest.fixture
def clip() -> dict[str, torch.Tensor]:
    """A CLIP's weights in the names of transformers."""
    sizes = CLIPVisionConfig(hidden_size=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                             image_size=8, patch_size=4)  # fmt: skip
    return CLIPVisionModel(sizes).state_dict()


@pytest.mark.parametrize("change, words", KINDS)
def test_clip_weights_of_another_kind_are_told_by_name(tmp_path, clip, change, words):
    name = "embeddings.patch_embedding.weight"
    torch.save({**clip, f"vision_model.{name}": change(clip[f"vision_model.{name}"])}, tmp_path / "x.pth")
    refused(rf"model\.vision\.weights: .*x\.pth: {name} {words}", VisionConfig(**CLIP, weights=str(tmp_path / "x.pth")))


@pytest.mark.parametrize("value", ["a text", None, 3, [1]])
def test_entries_that_are_no_tensors_count_as_absent(tmp_path, clip, value):
    torch.save({**clip, "vision_model.embeddings.class_embedding": value, 3: 4}, tmp_path / "x.pth")
    refused(r"lacks 1 of the tower's \d+ weights", VisionConfig(**CLIP, weights=str(tmp_path / "x.pth")))


@pytest.mark.parametrize("change, words", [*KINDS, (lambda w: w[:1].clone(), r"is \(1, 3, 7, 7\) there")])
def test_timm_weights_of_another_kind_are_told_by_name(tmp_path, change, words):
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save({**state, "conv1.weight": change(state["conv1.weight"])}, tmp_path / "x.pth")
    config = VisionConfig(backbone="timm:resnet18", image_size=32, weights=str(tmp_path / "x.pth"))
    refused(rf"model\.vision\.weights: .*x\.pth: conv1\.weight {words}", config)


def test_timm_weights_with_another_classifier_are_read(tmp_path):
    state = timm.create_model("resnet18", pretrained=False, num_classes=7).state_dict()
    torch.save(state, tmp_path / "x.pth")
    tower = build_vision_tower(VisionConfig(backbone="timm:resnet18", image_size=32, weights=str(tmp_path / "x.pth")))
    torch.testing.assert_close(tower.backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"width": -4}, "width: -4, at least 1 is needed"),
        ({"width": 0}, "width: 0, at least 1 is needed"),
        ({"heads": 0}, "heads: 0, at least 1 is needed"),
        ({"heads": 3}, "width: 8 is no multiple of heads 3"),
        ({"width": 200, "heads": None}, "width: 200 is no multiple of heads 3"),
        ({"layers": -1}, "layers: -1, at least 0 is needed"),
        ({"image_size": 0}, "image_size: 0, at least 1 is needed"),
        ({"patch_size": 0}, "image_size: 8 is no multiple of patch_size 0"),
        ({"grid": 0}, "grid: 0, at least 1 is needed"),
    ],
)
def test_sizes_of_no_tower_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        VisionConfig(**{**CLIP, **sizes})


def test_a_text_tower_of_no_sizes_is_one_line():
    with pytest.raises(UserError, match=r"model\.text\.config: no bert has such sizes") as caught:
        TextTower(TextConfig(family="bert", config={"hidden_size": -1}))
    assert len(caught.value.faults) == 1
