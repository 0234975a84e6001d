"""Folders of transformers that others made: tokenizers, sizes and weights."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import hostile
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from lavis_dcd.common.errors import UserError
from lavis_dcd.models import hub
from lavis_dcd.models.towers import TextConfig, TextTower

SIZES = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
         "max_position_embeddings": 16}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat"]


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False)


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """A text encoder with its tokenizer, as the hub would give it."""
    folder = tmp_path / "encoder"
    model.save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def marker(tmp_path) -> Path:
    """What must not appear."""
    return tmp_path / "was run"


def edited(path: Path, **settings) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def tower(folder: Path) -> TextTower:
    return TextTower(TextConfig(family="auto", name=str(folder), load_weights=True, max_length=8))


def refused(match: str, work) -> None:
    with pytest.raises(UserError, match=match) as caught:
        work()
    assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]
    assert caught.value.faults[0].startswith("model.text")


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_folder_s_tokenizer_and_a_vocabulary_are_read(folder, tmp_path):
    for name in (folder, tmp_path / "vocab.txt"):
        assert hub.load_tokenizer(str(name))("a dog")["input_ids"] == [2, 5, 6, 3]


def test_a_tokenizer_that_unpickles_its_vocabulary_is_refused(tmp_path, marker):
    for number, (name, content) in enumerate(
        [("tokenizer_config.json", {"tokenizer_class": "TransfoXLTokenizer"}),
         ("config.json", {"model_type": "transfo-xl"})]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        (folder / "vocab.pkl").write_bytes(pickle.dumps(hostile.makes_folder(marker)))
        (folder / "vocab.bin").write_bytes(pickle.dumps(hostile.makes_folder(marker)))
        refused("TransfoXLTokenizer', which this package does not open", lambda f=folder: hub.load_tokenizer(str(f)))
    assert not marker.exists()


@pytest.mark.parametrize(
    "kind", ["RagRetriever", "BertModel", "RagTokenizer", "Trainer", "AutoModel", "no such", ["x"], 3]
)
def test_another_class_than_a_tokenizer_is_refused(folder, kind):
    edited(folder / "tokenizer_config.json", tokenizer_class=kind)
    refused("model.text.name", lambda: hub.load_tokenizer(str(folder)))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_or_model_with_code_of_its_own_is_refused(folder, marker, file):
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\n")
    code = {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own", "AutoModel": "own.Own"}
    edited(folder / file, auto_map=code, trust_remote_code=True)
    if file == "config.json":
        refused("model.text.name: the sizes cannot be read from folder", lambda: tower(folder))
    else:
        refused("auto_map", lambda: hub.load_tokenizer(str(folder)))
    assert not marker.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"vocab_file": "/etc/passwd"},
        {"tokenizer_file": "elsewhere.json"},
        {"fast_tokenizer_files": ["../../tokenizer.4.0.0.json"]},
        {"init_inputs": ["/etc/passwd"]},
        {"sp_model_kwargs": {"model_file": "/etc/passwd"}},
        {"jumanpp_kwargs": {"command": "~/bin/x"}},
    ],
)
def test_a_tokenizer_that_names_files_elsewhere_is_refused(folder, settings):
    edited(folder / "tokenizer_config.json", **settings)
    refused(f"tokenizer_config.json of .* says {next(iter(settings))}", lambda: hub.load_tokenizer(str(folder)))


def test_usual_settings_of_tokenizers_pass(folder):
    edited(folder / "tokenizer_config.json", special_tokens_map_file="/root/.cache/x.json", name_or_path="a/b",
           sp_model_kwargs={}, mecab_kwargs={"mecab_dic": "ipadic"}, tokenizer_file=None)  # fmt: skip
    assert len(hub.load_tokenizer(str(folder))) == 8


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "config.json", "pytorch_model.bin"])
def test_a_pipe_in_the_folder_does_not_hang(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(f"{name} is no regular file", lambda: hub.load_tokenizer(str(folder)))
    refused(f"{name} is no regular file", lambda: tower(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}', b"null"])
def test_damaged_files_of_a_tokenizer_are_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    try:
        hub.load_tokenizer(str(folder))
    except UserError as error:
        assert len(error.faults) == 1 and "\n" not in error.faults[0]


def test_a_vocabulary_without_a_word_for_unknown_ones_is_one_line(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\ndog")
    refused("the tokenizer cannot be read", lambda: hub.load_tokenizer(str(tmp_path / "vocab.txt")))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    refused("the tokenizer cannot be read", lambda: hub.load_tokenizer(str(tmp_path / "vocab.txt")))


@pytest.mark.parametrize("name", ["pipe", "pipe.txt"])
def test_a_pipe_in_the_place_of_a_folder_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused("is no folder|no vocabulary file", lambda: hub.load_tokenizer(str(tmp_path / name)))
    refused("is no folder", lambda: hub.load_tokenizer("/dev/zero"))


def test_an_address_is_not_fetched():
    refused("is an address", lambda: hub.load_tokenizer("https://127.0.0.1/x"))


# -- weights ---------------------------------------------------------------------------------------------------------


def test_weights_of_a_folder_are_read(folder, model):
    torch.testing.assert_close(tower(folder).model.state_dict(), model.state_dict())
    (folder / "pytorch_model.bin").unlink()
    # of a model with a head, in the first files' names of norms, without the metadata that transformers wants
    named = {f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in model.state_dict().items()}
    save_file({**named, "cls.weight": torch.ones(1)}, folder / "model.safetensors")
    torch.testing.assert_close(tower(folder).model.state_dict(), model.state_dict())


def test_torchscript_and_pickles_among_the_weights_are_refused(folder, marker):
    hostile.torchscript(folder / "pytorch_model.bin", marker)
    refused("pytorch_model.bin holds code: it is a TorchScript archive", lambda: tower(folder))
    torch.save({"w": torch.ones(1), "x": hostile.makes_folder(marker)}, folder / "pytorch_model.bin")
    refused("pytorch_model.bin holds code: it would call posix.mkdir", lambda: tower(folder))
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused("pytorch_model.bin is not a readable PyTorch file", lambda: tower(folder))
    assert not marker.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_weights_in_several_files_are_refused_unread(folder, marker, file):
    (folder / "pytorch_model.bin").unlink()
    hostile.torchscript(folder / "shard.bin", marker)
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "shard.bin"}}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    refused(r"lie in several files .*max_shard_size", lambda: tower(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.to(torch.int8), "holds numbers of type int8"),
        (lambda w: w.bool(), "holds numbers of type bool"),
        (lambda w: w.to(torch.complex64), "holds numbers of type complex64"),
        (lambda w: w * torch.nan, "holds NaN or infinite values"),
        (lambda w: w[:, :4].clone(), "size mismatch for embeddings.word_embeddings.weight"),
    ],
)
def test_weights_of_another_kind_are_told_by_name(folder, model, change, words):
    weights = model.state_dict()
    weights["embeddings.word_embeddings.weight"] = change(weights["embeddings.word_embeddings.weight"])
    torch.save(weights, folder / "pytorch_model.bin")
    refused(f"pytorch_model.bin.*{words}", lambda: tower(folder))


def test_a_folder_without_some_of_the_weights_is_refused(folder, model):
    weights = {k: v for k, v in model.state_dict().items() if "attention.self.query" not in k}
    torch.save(weights, folder / "pytorch_model.bin")
    refused(
        r"lacks 2 weights of the text tower, first encoder\.layer\.0\.attention\.self\.query\.bias",
        lambda: tower(folder),
    )
    (folder / "pytorch_model.bin").unlink()
    refused("has none of model.safetensors, pytorch_model.bin", lambda: tower(folder))


@pytest.mark.parametrize(
    "key, value", [("num_hidden_layers", 10**6), ("hidden_size", 1 << 20), ("num_attention_heads", 0)]
)
def test_sizes_beyond_the_weights_are_refused(folder, key, value):
    edited(folder / "config.json", **{key: value})
    refused("model", lambda: tower(folder))


@pytest.mark.parametrize("labels", [10**9, -1])
def test_labels_without_end_are_refused_before_they_get_names(folder, labels):
    edited(folder / "config.json", num_labels=labels)
    refused(f"config.json of .* says num_labels: {labels}", lambda: tower(folder))
    edited(folder / "tokenizer_config.json", tokenizer_class=None)
    refused(f"config.json of .* says num_labels: {labels}", lambda: hub.load_tokenizer(str(folder)))


@pytest.mark.parametrize("config", [{"hidden_size": -8}, {"num_attention_heads": 0}, {"hidden_act": "no such"}])
def test_sizes_in_a_job_that_no_encoder_has_are_one_line(config):
    text = TextConfig(family="bert", name="x", config={**SIZES, **config}, max_length=8)
    refused("model.text.config: no bert has such sizes", lambda: TextTower(text))


def test_language_models_alone_are_built_of_a_file_s_sizes():
    assert all(map(hub.plain_text_family, ("bert", "roberta", "mpnet", "distilbert", "electra", "xlnet")))
    assert not any(map(hub.plain_text_family, ("detr", "vit", "rag", "vision-encoder-decoder", "no such", None)))
