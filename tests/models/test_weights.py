"""Files of weights that others made."""

import copy
import json
import os
import pickle
import re

import hostile
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lavis_dcd import cli
from lavis_dcd.common.errors import UserError
from lavis_dcd.models import weights
from lavis_dcd.models.dual_encoder import DualEncoder
from lavis_dcd.models.meter import MeterRetrieval
from lavis_dcd.models.meter.config import MeterConfig
from lavis_dcd.models.vilt import ViltRetrieval

VOCABULARY = "asset:quickstart/vocab.txt"
TOWERS = {
    "vision": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2},
    "text": {"family": "bert", "name": VOCABULARY,
             "config": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "intermediate_size": 16}},
}  # fmt: skip
MODELS = {
    "meter": (MeterRetrieval, {**TOWERS, "fusion": {"width": 8, "layers": 2, "heads": 2}}),
    "dual encoder": (DualEncoder, {**TOWERS, "head": {"dim": 4, "hidden": 8}}),
    "vilt": (ViltRetrieval, {"image": {"image_size": 8, "patch_size": 4},
                             "fusion": {"width": 8, "heads": 2, "layers": 2},
                             "text": {"name": VOCABULARY, "vocab_size": 200}}),
}  # fmt: skip


@pytest.fixture
def marker(tmp_path):
    """What must not appear."""
    return tmp_path / "was run"


@pytest.mark.parametrize("name", ["meter.ckpt", "albef.pth", "pytorch_model.bin"])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path, marker, name):
    path = tmp_path / name
    torch.save(
        {"state_dict": {"w": torch.ones(1)}, "model": {"w": torch.ones(1)}, "hook": hostile.makes_folder(marker)}, path
    )
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
    torch.save({"model": {"w": torch.ones(1)}, "hook": hostile.makes_folder(marker)}, path)
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


# -- configurations in files -----------------------------------------------------------------------------------------


def changed(config, path, value):
    """The configuration with another value at a dotted path."""
    config = copy.deepcopy(config)
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    return config


def write(path, content, config):
    if path.suffix == ".safetensors":
        tensors = {name: tensor.clone() for name, tensor in content.items()}
        save_file(tensors, str(path), metadata={"config": json.dumps(config)})
    else:
        torch.save({"model": content, "config": config}, path)


@pytest.fixture(params=["x.pth", "x.safetensors"])
def loaded_with(request, tmp_path):
    """``loaded_with(model, key, value, **job)``: a job with other modules reads a file whose configuration says so."""

    def load(name, key, value, **job):
        model_class, section = MODELS[name]
        saved = model_class.from_config(section).checkpoint()
        path = tmp_path / request.param
        write(path, saved["model"], changed(saved["config"], key, value))
        # other modules than the file's, so that the model is built from the file's configuration
        depth = ("fusion", "layers") if name == "vilt" else ("vision", "layers")
        section = {**changed(section, ".".join(depth), section[depth[0]][depth[1]] + 1), **job}
        return model_class.from_config({**section, "finetuned": str(path)})

    return load


@pytest.mark.parametrize("name", MODELS)
def test_a_file_s_sizes_build_its_model(loaded_with, name):
    key = "fusion.layers" if name == "vilt" else "vision.layers"
    model = loaded_with(name, key, MODELS[name][1][key.split(".")[0]]["layers"])
    assert model.config.text.name == VOCABULARY


SIZES_OUT_OF_BOUNDS = [
    ("meter", "vision.heads", 0),
    ("meter", "vision.heads", 3),
    ("meter", "vision.width", -4),
    ("meter", "vision.width", 10**7),
    ("meter", "vision.width", 1 << 20),
    ("meter", "vision.layers", 10**6),
    ("meter", "vision.layers", -1),
    ("meter", "vision.layers", float("nan")),
    ("meter", "vision.image_size", 10**6),
    ("meter", "vision.patch_size", 0),
    ("meter", "vision.grid", 10**6),
    ("meter", "vision.backbone", "timm:vit_huge_patch14_224_in21k"),
    ("meter", "vision.backbone", "timm:../x"),
    ("meter", "text.family", "detr"),
    ("meter", "text.config.num_hidden_layers", 10**6),
    ("meter", "text.config.num_attention_heads", 0),
    ("meter", "text.config.num_attention_heads", -4),
    ("meter", "text.config.hidden_size", 1 << 20),
    ("meter", "text.config.hidden_size", "8"),
    ("meter", "text.config.hidden_act", "os.system"),
    ("meter", "text.config.num_labels", 10**6),
    ("meter", "text.config.layer_norm_eps", float("inf")),
    ("meter", "text.max_length", 10**6),
    ("meter", "fusion.layers", 10**6),
    ("meter", "fusion.mlp_ratio", 10**6),
    ("meter", "fusion.mlp_ratio", -1),
    ("meter", "loss.negatives", 10**400),
    ("dual encoder", "head.hidden", 10**9),
    ("dual encoder", "vision.layers", 10**6),
    ("vilt", "fusion.heads", 0),
    ("vilt", "fusion.layers", 10**6),
    ("vilt", "fusion.width", 1 << 20),
    ("vilt", "text.vocab_size", -4),
    ("vilt", "image.image_size", 10**6),
    ("vilt", "fusion.norm_eps", -1.0),
]


@pytest.mark.parametrize("name, key, value", SIZES_OUT_OF_BOUNDS)
def test_sizes_out_of_bounds_are_one_line(loaded_with, name, key, value):
    with pytest.raises(UserError) as caught:
        loaded_with(name, key, value)
    (line,) = caught.value.faults
    assert "\n" not in line and "x." in line and len(line) < 500


@pytest.mark.parametrize("config", ["[" * 100_000, '{"vision": ' * 5000, '{"vision": {"width": 1' + "0" * 5000 + "}}"])
def test_a_configuration_without_end_is_one_line(tmp_path, config):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(1)}, str(path), metadata={"config": config})
    with pytest.raises(UserError, match=r"is not JSON|too many values") as caught:
        weights.read(path, MeterConfig)
    assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]


@pytest.fixture
def trap(tmp_path):
    """A pipe: a model that opens it waits for ever; its name is in what ``opened`` collects."""
    path = tmp_path / "trap"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "key",
    ["vision.weights", "text.name", "finetuned", "pretrained", "text.config._name_or_path", "text.config.name_or_path"],
)
def test_a_configuration_in_a_file_names_no_other_file(loaded_with, trap, key, monkeypatch):
    opened = []
    original = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *args, **kwargs: opened.append(str(path)) or original(path, *args, **kwargs)
    )
    model = loaded_with("meter", key, str(trap))
    assert str(trap) not in opened
    assert model.config.vision.weights is None and model.config.finetuned != str(trap)
    if key == "text.name":
        assert model.config.text.name == VOCABULARY  # the job's


@pytest.mark.parametrize(
    "name", ["{folder}", "{folder}/vocab.txt", "vocab.txt", "../x", "~/x", "https://x/y", "asset", ""]
)
def test_a_tokenizer_that_a_file_names_is_never_a_path(loaded_with, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asset").mkdir()
    section = {**TOWERS["text"], "name": "roberta-base"}  # the default: such a job takes the file's
    model = loaded_with("meter", "text.name", name.format(folder=tmp_path), text=section)
    assert model.config.text.name == "roberta-base"


def test_switches_stay_the_job_s(loaded_with):
    for switch in ("compile", "grad_checkpoint", "init_from_text"):
        assert getattr(loaded_with("meter", f"fusion.{switch}", True).config.fusion, switch) is False
    assert loaded_with("meter", "vision.freeze", True).config.vision.freeze is False
    assert loaded_with("meter", "text.load_weights", True).config.text.load_weights is False


# -- tensors of files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.to(torch.int8), "holds numbers of type int8"),
        (lambda w: w.bool(), "holds numbers of type bool"),
        (lambda w: w.to(torch.complex64), "holds numbers of type complex64"),
        (lambda w: w * torch.nan, "holds NaN or infinite values"),
        (lambda w: w / 0.0, "holds NaN or infinite values"),
        (lambda w: w[:, 1:].clone(), r"is \(\d+, \d+\) there"),
        (lambda w: w.sum(), r"is \(\) there"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("file", ["x.pth", "x.safetensors"])
def test_weights_of_another_kind_are_told_by_name(tmp_path, name, file, change, words):
    model_class, section = MODELS[name]
    saved = model_class.from_config(section).checkpoint()
    key = next(
        k for k, v in saved["model"].items() if (v.ndim == 2 and k.endswith("dense.weight")) or "fc1.weight" in k
    )
    write(tmp_path / file, {**saved["model"], key: change(saved["model"][key])}, saved["config"])
    with pytest.raises(UserError) as caught:
        model_class.from_config({**section, "finetuned": str(tmp_path / file)})
    (line,) = caught.value.faults
    assert re.search(rf"{file}: {re.escape(key)} {words}", line)


def test_whole_numbers_that_a_model_counts_with_pass():
    model = nn.Sequential(nn.BatchNorm1d(2))
    named = {**model.state_dict(), "0.num_batches_tracked": torch.tensor(7, dtype=torch.int32)}
    weights.fill(model, named, weights.LoadReport(), "x.pth")
    assert model[0].num_batches_tracked == 7


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("vit_model.visual.transformer.resblocks.0.attn.in_proj_weight", torch.tensor(1.0)),
        ("vit_model.visual.transformer.resblocks.0.attn.in_proj_weight", torch.ones(2)),
        ("itm_score.fc.weight", torch.tensor(1.0)),
        ("cross_modal_text_layers." + "9" * 5000 + ".x", torch.ones(1)),
        ("vit_model.visual.positional_embedding", torch.ones(0, 8)),
        ("vit_model.visual.positional_embedding", torch.tensor(1.0)),
        ("vit_model.visual.positional_embedding", torch.ones(8)),
    ],
)
def test_official_names_on_tensors_of_odd_shapes_are_one_line(tmp_path, name, tensor):
    torch.save({"state_dict": {name: tensor}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError) as caught:
        MeterRetrieval.from_config({**MODELS["meter"][1], "finetuned": str(tmp_path / "x.ckpt")})
    (line,) = caught.value.faults
    assert "x.ckpt" in line and "\n" not in line


def test_entries_that_are_no_named_tensors_are_left_aside(tmp_path):
    model_class, section = MODELS["meter"]
    saved = model_class.from_config(section).checkpoint()
    torch.save({**saved, "model": {**saved["model"], 3: torch.ones(1), "note": "text", ("a",): 1}}, tmp_path / "x.pth")
    model_class.from_config({**section, "finetuned": str(tmp_path / "x.pth")})
