"""Configurations in files of weights: bounds of numbers, and of the models that they describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.models.sizes import check_configuration, no_larger_than

FILE = Path("x.pth")


@pytest.mark.parametrize(
    "config, words",
    [
        ({"vision": {"width": 10**7}}, "vision.width in its configuration is 10000000, not between 0 and 2,097,152"),
        ({"vision": {"width": -4}}, "vision.width in its configuration is -4, not between 0 and 2,097,152"),
        ({"vision": {"heads": 0}}, "vision.heads in its configuration is 0, not between 1 and 2,097,152"),
        ({"vision": {"image_size": 4096}}, "vision.image_size in its configuration is 4096, not between"),
        ({"vision": {"layers": float("nan")}}, "vision.layers in its configuration is nan, no number"),
        ({"text": {"config": {"eps": -1.0}}}, "text.config.eps in its configuration is -1.0, not between 0 and 1"),
        ({"text": {"config": {"axes": [1, 1e300]}}}, r"text.config.axes\[1\] in its configuration is 1e\+300"),
        ({"number": 10**400}, "number in its configuration is"),
        ({"name": "x" * 5000}, "name in its configuration is a text of 5000 characters"),
        ({"tensor": torch.ones(1)}, "tensor in its configuration is a Tensor"),
        ({"list": [0] * 20_000}, "too many values"),
    ],
)
def test_numbers_out_of_bounds_are_one_line_each(config, words):
    with pytest.raises(UserError, match=rf"^x\.pth: .*{words}") as caught:
        check_configuration(config, FILE)
    assert len(caught.value.faults) == 1 and len(caught.value.faults[0]) < 300


def test_sections_without_end_are_refused():
    itself: dict = {}
    itself["section"] = itself
    twice: list = []
    for _ in range(15):
        twice = [twice] * 2
    for config in (itself, {"lists": twice}):
        with pytest.raises(UserError, match="too many values"):
            check_configuration(config, FILE)


def test_sizes_of_real_models_pass():
    check_configuration(
        {"vision": {"image_size": 1024, "grid": None, "freeze": True}, "text": {"config": {"vocab_size": 1_114_112,
         "pad_token_id": -1, "layer_norm_eps": 1e-12}}, "fast_parameters": ["a"]}, FILE)  # fmt: skip


def test_a_model_of_the_file_s_size_is_built():
    with no_larger_than(nn.Linear(3, 4).state_dict(), FILE):
        model = nn.Linear(3, 4)
    assert model.weight.shape == (4, 3)


@pytest.mark.parametrize("layers, width", [(1, 1 << 16), (10**6, 1)])
def test_a_model_that_outgrows_its_file_is_not_finished(layers, width):
    built = []
    larger = pytest.raises(UserError, match=r"^x\.pth: .* describes a larger model than its 2 tensors")
    with larger, no_larger_than(nn.Linear(3, 4).state_dict(), FILE):
        for _ in range(layers):
            built.append(nn.Linear(width, width))
    assert len(built) < 300
    nn.Linear(width, 1)  # later models are not counted


@pytest.mark.parametrize("work", [lambda: nn.Linear(-4, 3), lambda: 8 % 0, lambda: {}["gelu"], lambda: nn.Dropout(7)])
def test_what_modules_stumble_over_is_one_line(work):
    refused = pytest.raises(UserError, match=r"^x\.pth: no model of the configuration that comes with it")
    with refused as caught, no_larger_than({}, FILE):
        work()
    assert "\n" not in caught.value.faults[0]


def test_the_lines_of_a_model_are_kept():
    with pytest.raises(UserError) as caught, no_larger_than({}, FILE):
        raise UserError(["model.vision: no", "x.pth: is cut"])
    assert caught.value.faults == ["x.pth: by its own configuration: model.vision: no", "x.pth: is cut"]
