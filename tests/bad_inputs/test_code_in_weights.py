"""Every place where a user may name weights, and there a file that runs something when it is read carelessly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from omegaconf import OmegaConf

from lavis_dcd import evaluate, mine, train
from lavis_dcd.common.errors import UserError

pytest.importorskip("lavis")
from lavis.common.registry import registry
from lavis.models.clip_models import model as lavis_clip

from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.models.building import build_matcher, reading_tensors_only

TOWERS = {
    "vision": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2},
    "text": {"family": "bert", "name": "asset:quickstart/vocab.txt",
             "config": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "intermediate_size": 16}},
}  # fmt: skip
TIMM = {"vision": {"backbone": "timm:resnet18", "image_size": 32}, "text": TOWERS["text"]}
ALBEF = {"arch": "albef_retrieval", "image_size": 32, "embed_dim": 16, "max_txt_len": 20, "queue_size": 8,
         "sizes": {"vision": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16},
                   "text": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "fusion_layer": 2,
                            "intermediate_size": 48, "max_position_embeddings": 40, "vocab_size": 16}}}  # fmt: skip
CLIP = {"arch": "clip", "sizes": {"embed_dim": 16,
                                  "vision": {"width": 64, "layers": 1, "patch_size": 8, "image_size": 32},
                                  "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 12}}}  # fmt: skip
LAVIS_CLIP = {"arch": "clip", "model_type": "ViT-B-32"}


@pytest.fixture
def marker(tmp_path) -> Path:
    """What must not appear."""
    return tmp_path / "was run"


@pytest.fixture(params=["TorchScript", "TorchScript in a hub's folder", "a pickle", "a tar file with a pipe"])
def evil(request, tmp_path, marker) -> str:
    """The name of a file, or of a folder as the hub has them."""
    path = tmp_path / "evil.pth"
    if request.param == "a pickle":
        torch.save({"model": {"w": torch.ones(1)}, "hook": hostile.makes_folder(marker)}, path)
    elif request.param == "a tar file with a pipe":
        os.mkfifo(tmp_path / "storages")
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "storages", "storages")
    else:
        hostile.torchscript(path, marker)
    if request.param != "TorchScript in a hub's folder":
        return str(path)
    (tmp_path / "hub").mkdir()
    shutil.move(path, tmp_path / "hub" / "pytorch_model.bin")
    return str(tmp_path / "hub")


@pytest.fixture
def vocabulary(tmp_path) -> str:
    """A file of BERT's special tokens and a few words."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["a", "dog", "cat", "red", "blue", "car", "runs", "sleeps", "on"],
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return str(tmp_path / "vocab.txt")


def one_line(work: Any) -> str:
    with pytest.raises(UserError) as caught:
        work()
    (line,) = caught.value.faults
    assert "\n" not in line
    return line


def telling(line: str) -> bool:
    """Return whether a line names the file and says why it is refused."""
    reasons = ("holds code", "is not a readable PyTorch file", "no file", "a folder", "neither a file", "to null")
    return ("evil.pth" in line or "hub" in line) and any(reason in line for reason in reasons)


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(retrieval_files, tmp_path, monkeypatch, cache) -> Any:
    """Writes a job whose model, or whose teacher, reads ``weights``."""
    monkeypatch.chdir(tmp_path)
    reads = {"vis_processor": {s: {"name": f"dcd_image_{s}", "image_size": 64} for s in ("train", "eval")},
             "text_processor": {s: {"name": "dcd_caption"} for s in ("train", "eval")}}  # fmt: skip

    def write(model: dict[str, Any], **run: Any) -> None:
        sections = {
            "model": model,
            "datasets": {"coco_retrieval": {**reads, "build_info": retrieval_files}},
            "run": {"task": "dcd_retrieval", "runner": "runner_dcd", "device": "cpu", "max_epoch": 1,
                    "batch_size_train": 4, "batch_size_eval": 4, "test_splits": ["test"], "output_dir": "out", **run},
        }  # fmt: skip
        Path("job.yaml").write_text(json.dumps(sections))

    return write


@pytest.mark.parametrize("command", ["train", "evaluate", "mine"])
def test_the_commands_end_with_one_line(job, evil, marker, capsys, command):
    model = {"arch": "meter_retrieval", "model_type": "quickstart", "finetuned": evil}
    mining = {"arch": "dcd", "teacher": model, "student": {"init_from_teacher": {"layers": [0]}},
              "candidates": {"bank": {"shortlist": 3, "random": 2, "keep": 4}},
              "selection": {"hard_negatives": 2}}  # fmt: skip
    job(mining if command == "mine" else model)
    main = {"train": train.main, "evaluate": evaluate.main, "mine": mine.main}[command]
    assert main(["--cfg-path", "job.yaml"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and telling(lines[0])
    assert not marker.exists()


def test_a_model_that_lavis_builds_ends_with_one_line(job, evil, marker, capsys, small_clip):
    job({"arch": "clip", "model_type": "ViT-B-32", "pretrained": evil}, task="retrieval")
    assert train.main(["--cfg-path", "job.yaml"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and telling(lines[0])
    assert not marker.exists()


def test_lavis_s_own_loading_reads_tensors_only(evil, marker, small_clip):
    model_class = registry.get_model_class("clip")
    section = OmegaConf.create({"model_type": "ViT-B-32", "pretrained": evil})
    with pytest.raises((UserError, RuntimeError, OSError)), reading_tensors_only(model_class):
        model_class.from_config(section)
    assert not marker.exists()
    with reading_tensors_only(type("Own", (), {})):
        assert torch.load.__module__ == "torch.serialization"  # a plug-in's model is its own affair


# -- the keys --------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "METER's finetuned": ({"arch": "meter_retrieval", **TOWERS}, "finetuned"),
    "METER's pretrained": ({"arch": "meter_retrieval", **TOWERS}, "pretrained"),
    "ViLT's finetuned": ({"arch": "vilt_retrieval", "text": {"name": TOWERS["text"]["name"]}}, "finetuned"),
    "a dual encoder's finetuned": ({"arch": "dual_encoder", **TOWERS}, "finetuned"),
    "METER's vision.weights": ({"arch": "meter_retrieval", **TOWERS}, "vision.weights"),
    "a dual encoder's vision.weights": ({"arch": "dual_encoder", **TOWERS}, "vision.weights"),
    "timm's vision.weights": ({"arch": "dual_encoder", **TIMM}, "vision.weights"),
    "ALBEF's finetuned": (ALBEF, "finetuned"),
    "ALBEF's pretrained": (ALBEF, "pretrained"),
    "CLIP's finetuned": (CLIP, "finetuned"),
    "CLIP's pretrained": (CLIP, "pretrained"),
    "LAVIS's CLIP's finetuned": (LAVIS_CLIP, "finetuned"),
    "LAVIS's CLIP's pretrained": (LAVIS_CLIP, "pretrained"),
}


@pytest.fixture
def small_clip(monkeypatch) -> None:
    """LAVIS's ViT-B-32 in small."""
    sizes = {"embed_dim": 16, "vision_cfg": CLIP["sizes"]["vision"],
             "text_cfg": {**CLIP["sizes"]["text"], "vocab_size": 49408}}  # fmt: skip
    monkeypatch.setitem(lavis_clip._MODEL_CONFIGS, "ViT-B-32", sizes)


def section_with(name: str, value: str, vocabulary: str) -> dict[str, Any]:
    section, key = SECTIONS[name]
    section = OmegaConf.create({**section, **({"tokenizer": vocabulary} if section is ALBEF else {})})
    OmegaConf.update(section, key, value)
    return section


@pytest.mark.parametrize("name", SECTIONS)
def test_no_key_reads_a_file_that_runs(name, evil, marker, vocabulary, small_clip):
    line = one_line(lambda: build_matcher(section_with(name, evil, vocabulary), "model"))
    assert telling(line) and not marker.exists()


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_no_key_waits_for_a_pipe_or_a_device(name, kind, tmp_path, vocabulary, small_clip):
    path = tmp_path / "evil.pth"
    os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/zero")
    assert "evil.pth" in one_line(lambda: build_matcher(section_with(name, str(path), vocabulary), "model"))


# -- LAVIS's CLIP, whose published weights are TorchScript -----------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch, small_clip):
    """``published(path)``: LAVIS lists the SHA-256 of the file at ``path`` under the tag openai, and finds that one."""

    def publish(path: Path, official: str | None = None) -> None:
        digest = official or hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(
            lavis_clip.get_pretrained_url.__globals__["_PRETRAINED"],
            "ViT-B-32",
            {"openai": f"https://openaipublic.invalid/{digest}/ViT-B-32.pt"},
        )
        monkeypatch.setattr(lavis_clip, "download_pretrained", lambda url: str(path))

    return publish


def test_openai_s_archive_is_run_for_its_official_checksum_alone(published, tmp_path, marker):
    evil = hostile.torchscript(tmp_path / "evil.pth", marker)
    published(evil, "0" * 64)
    line = one_line(lambda: build_matcher({**LAVIS_CLIP, "pretrained": "openai"}, "model"))
    assert "evil.pth has the SHA-256" in line and "it was not run" in line
    assert not marker.exists()


def test_a_model_type_or_pretrained_that_is_a_path_is_none(published, tmp_path, monkeypatch, marker):
    evil = hostile.torchscript(tmp_path / "evil.pth", marker)
    clip = adapter_for("clip")
    for section in ({"arch": "clip", "model_type": str(evil), "pretrained": "openai"},
                    {"arch": "clip", "model_type": str(evil), "pretrained": str(evil)}):  # fmt: skip
        one_line(lambda s=section: clip.from_config(registry.get_model_class("clip"), OmegaConf.create(s)))
    # a file of the tag's name does not take its place
    monkeypatch.chdir(tmp_path)
    hostile.torchscript(Path("openai"), marker)
    published(evil, "0" * 64)
    assert "SHA-256" in one_line(lambda: build_matcher({**LAVIS_CLIP, "pretrained": "openai"}, "model"))
    assert not marker.exists()


def test_a_file_exchanged_after_its_checksum_was_taken_does_not_run(published, tmp_path, monkeypatch, marker):
    from lavis_dcd.matching.adapters import clip

    evil, good = hostile.torchscript(tmp_path / "evil.pth", marker), tmp_path / "good.pth"
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(good))
    published(good)
    original = clip.load_script

    def exchanged(source: Any, **options: Any) -> Any:
        os.replace(evil, good)
        return original(source, **options)

    monkeypatch.setattr(clip, "load_script", exchanged)
    one_line(lambda: build_matcher({**LAVIS_CLIP, "pretrained": "openai"}, "model"))  # a Linear is no CLIP
    assert not marker.exists()
