"""Every job under projects/dcd that can be made tiny trains, evaluates and exports on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jobs import assert_finished
from omegaconf import OmegaConf

from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.schema import parse
from lavis_dcd.distillation.objective import LossConfig, loss_defaults
from lavis_dcd.models.dcd.config import DcdConfig

GOLDEN = Path(__file__).parent / "golden"
VOCAB = "asset:quickstart/vocab.txt"
TINY = {  # a METER of a few thousand weights with BERT's kind of vocabulary
    "load_finetuned": False,
    "vision": {"image_size": 48, "patch_size": 16, "width": 32, "layers": 1, "heads": 2},
    "text": {
        "family": "bert",
        "name": VOCAB,
        "config": {
            "vocab_size": 200,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 48,
        },
    },
    "fusion": {"width": 16, "layers": 6, "heads": 2},
}
PROCESSORS = {"vis_processor": {"train": {"image_size": 48}, "eval": {"image_size": 48}}}
FEW_NEGATIVES = {"selection": {"hard_negatives": 3}}


def _assert_distilled(folder: Path, found: dict[str, dict]) -> None:
    assert list(found) == ["teacher", "student before training", "student"]
    # half the fusion layers; poolers, projections and heads stay
    assert found["student"]["fusion_parameters"] < 0.7 * found["teacher"]["fusion_parameters"]
    assert (folder / "student.pth").is_file()


# -- the shipped scenes ------------------------------------------------------------------------------------------

SCENES = {"shape_scenes": {"build_info": {"scenes": {"train": 30, "val": 12, "test": 12}}}}


def test_quickstart(job):
    folder = job("quickstart", {"model": FEW_NEGATIVES, "datasets": SCENES})
    _assert_distilled(folder, assert_finished(folder))


@pytest.mark.slow
def test_quickstart_teacher(job):
    folder = job("quickstart_teacher", {"datasets": SCENES})
    assert list(assert_finished(folder)) == ["model"]
    assert (folder / "model.pth").is_file()


@pytest.mark.slow
def test_quickstart_ablation(job):
    folder = job("quickstart_ablation", {"model": FEW_NEGATIVES, "datasets": SCENES, "seeds": [0]})
    table = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["name"] for row in table] == [
        "teacher", "student before training", "student", "ground truth alone",
        "plain distillation, random negatives",
    ]  # fmt: skip
    # one seed, one start: the student before training is the same for all
    assert (folder / "ground-truth-alone-seed0" / "student.pth").is_file()


# -- one's own pictures ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_photos_from_teacher_to_student(job, pictures, tmp_path, monkeypatch):
    lines = [f'{row["image"]},"{caption}"' for row in pictures for caption in row["caption"]]
    (tmp_path / "photos" / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    monkeypatch.setenv("OWN_PHOTOS", str(tmp_path / "photos"))
    data = {"image_text_retrieval": {**PROCESSORS, "build_info": {"val_fraction": 0.2, "test_fraction": 0.2}}}

    folder = job("own_photos_teacher", {"model": TINY, "datasets": data})
    assert list(assert_finished(folder)) == ["model before training", "model"]

    # the file's own sizes win; the tokenizer named here is only looked for
    model = {"teacher": {"finetuned": str(folder / "model.pth"), "text": {"name": VOCAB}}, **FEW_NEGATIVES}
    student = job("own_photos", {"model": model, "datasets": data})
    _assert_distilled(student, assert_finished(student))
    kept = list((tmp_path / "cache" / "dcd_features").glob("*/manifest.json"))
    assert len(kept) == 1, "the student reads the features that its teacher kept"


# -- the paper's recipes -----------------------------------------------------------------------------------------


@pytest.fixture
def golden_meter(tmp_path, words) -> dict:
    """The `teacher:` section of the reference METER, with a RoBERTa tokenizer of a few words."""
    sizes = json.loads((GOLDEN / "meter_tiny_config.json").read_text())
    clip, meter = sizes["clip_visual"], sizes["meter"]
    return {
        "finetuned": str(GOLDEN / "meter_tiny_state_dict.safetensors"),
        "vision": {
            "image_size": clip["image_resolution"],
            "patch_size": clip["vision_patch_size"],
            "width": clip["vision_width"],
            "layers": clip["vision_layers"] - 1,
        },
        "text": {"name": str(_tokenizer(tmp_path / "roberta", words)), "config": sizes["roberta"]},
        "fusion": {"width": meter["hidden_size"], "layers": meter["num_layers"], "heads": meter["num_heads"]},
    }


def _tokenizer(folder: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("meter_coco", "coco_retrieval"), ("meter_flickr30k", "flickr30k"),
        ("meter_coco_stratified", "coco_retrieval"), ("meter_flickr30k_stratified", "flickr30k"),
    ],
)  # fmt: skip
def test_the_paper_recipes_on_a_dozen_pictures(job, retrieval_files, golden_meter, name, builder):
    candidates = {} if name.endswith("_stratified") else {"image_to_text": {"count": 10}}
    model = {"teacher": golden_meter, "candidates": candidates}
    folder = job(name, {"model": model, "datasets": {builder: {**PROCESSORS, "build_info": retrieval_files}}})
    _assert_distilled(folder, assert_finished(folder))


PAPER = ["meter_coco", "meter_coco_joint_head", "meter_flickr30k", "vilt_coco", "vilt_flickr30k"]


def _method(name: str) -> DcdConfig:
    """What a job says of the method, over the defaults."""
    job = OmegaConf.load(packaged_folder("projects") / "dcd" / f"{name}.yaml")
    defaults = OmegaConf.load(packaged_folder("configs") / "models" / "dcd_default.yaml")
    return parse(DcdConfig, OmegaConf.to_container(OmegaConf.merge(defaults.model, job.model)), "model")


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_recipes_are_the_papers_whatever_the_defaults(name):
    config = _method(name)
    assert loss_defaults(config.loss, "fusion", "fusion") == LossConfig(
        reference="paper", alpha=0.2, distill="mse", contrastive="bce", weighting="entropy_share", gamma=2.0,
        temperature=1.0, teacher_temperature=1.0, entropy_floor=0.0, in_batch_weight=0.0,
        student_weight=1.0 if name.endswith("joint_head") else 0.0,
    )  # fmt: skip
    chosen = config.selection
    assert (chosen.hard_negatives, chosen.strategy, chosen.reweight, chosen.margin) == (7, "hardest", False, None)
    assert config.candidates.sources() == {"image_to_text": "random"}
    assert config.candidates.random_captions == (63 if name.endswith("flickr30k") else 15)
    written = OmegaConf.load(packaged_folder("projects") / "dcd" / f"{name}.yaml").model.loss
    assert {"alpha", "distill", "contrastive", "weighting", "gamma"} <= set(written)  # not left to the defaults


@pytest.mark.parametrize("name", [name for name in PAPER if not name.endswith("joint_head")])
def test_the_stratified_jobs_differ_from_the_papers_in_the_method_alone(name):
    ours, theirs = (
        OmegaConf.load(packaged_folder("projects") / "dcd" / f"{job}.yaml") for job in (f"{name}_stratified", name)
    )
    for key in ("candidates", "selection", "loss"):
        assert ours.model.pop(key) != theirs.model.pop(key)
    assert ours == theirs
    config = _method(f"{name}_stratified")
    assert (config.selection.hard_negatives, config.selection.strategy) == (7, "stratified")
    assert set(config.candidates.sources().values()) == {"in_batch"} and len(config.candidates.sources()) == 2
    loss = loss_defaults(config.loss, "fusion", "fusion")
    assert (loss.alpha, loss.distill, loss.weighting, loss.teacher_temperature) == (1.0, "kl", "uniform", 1.667)


@pytest.mark.slow
def test_a_student_with_a_joint_head_of_its_own(job, retrieval_files, golden_meter):
    model = {"teacher": golden_meter, "candidates": {"image_to_text": {"count": 10}}}
    data = {"coco_retrieval": {**PROCESSORS, "build_info": retrieval_files}}
    folder = job("meter_coco_joint_head", {"model": model, "datasets": data, "run": {"k_test": 2}})
    found = assert_finished(folder)
    _assert_distilled(folder, found)
    assert torch.load(folder / "student.pth", weights_only=True)["config"]["joint_head"]["dim"] == 256
    assert {row["how"] for row in found.values()} == {"shortlist k=2 (student)"}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # in-batch InfoNCE of four captions at a random start
    assert all(0.1 < line["student_loss"] < 5 for line in steps if line["kind"] == "train")


# -- the fusion teacher of real photographs, on the scenes ---------------------------------------------------------


def _on_scenes(name: str, job_id: str, model: dict) -> dict:
    """A packaged job with a tiny METER's towers, and scenes in place of photographs."""
    sections = OmegaConf.to_container(OmegaConf.load(packaged_folder("projects") / "dcd" / f"{name}.yaml"))
    for key in ("vision", "text", "fusion"):
        if key in sections["model"]:
            kept = {k: v for k, v in sections["model"][key].items() if k in ("freeze", "init_from_text", "dropout")}
            sections["model"][key] = {**TINY[key], **kept}
    sections["model"] = OmegaConf.to_container(OmegaConf.merge(sections["model"], model))
    given = ("seed", "max_epoch", "job_id", "batch_size_train", "log_freq")
    keep = {k: v for k, v in sections["run"].items() if k not in given}
    run = {**keep, "cache_features": "memory", "k_test": 3, "job_id": job_id, "eval_every_epochs": 1}
    return {"model": sections["model"], "datasets": {"shape_scenes": SCENES["shape_scenes"]}, "run": run}


@pytest.mark.slow
def test_the_fusion_teacher_in_two_stages_and_its_students(job_file, tmp_path):
    # as many layers as the tiny text tower has to start from, as wide inside
    depth = {"vision": {"image_size": 64}, "fusion": {"layers": 1, "mlp_ratio": 2}}
    job_file(_on_scenes("flickr8k_fusion_joint", "joint", depth))
    runs = tmp_path / "output" / "job"
    start = torch.load(runs / "joint" / "model.pth", weights_only=True)
    second = {**depth, "finetuned": str(runs / "joint" / "model.pth"), "loss": {"group": 2, "queries": 4}}
    job_file(_on_scenes("flickr8k_fusion_teacher", "teacher", second))
    teacher = torch.load(runs / "teacher" / "model.pth", weights_only=True)
    moved = {n for n, t in teacher["model"].items() if not torch.equal(t, start["model"][n])}
    assert moved and not any(n.startswith(("joint_head", "vision_tower", "text_tower")) for n in moved)
    assert start["config"]["fusion_weight"] == 0.0 and teacher["config"]["fusion_weight"] == 0.5
    given = {"teacher": {"finetuned": str(runs / "teacher" / "model.pth"), "text": {"name": VOCAB}}}
    job_file(_on_scenes("flickr8k_fusion_thinned", "thinned",
                        {**given, **FEW_NEGATIVES, "student": {"init_from_teacher": {"layers": [0]}}}))  # fmt: skip
    student = torch.load(runs / "thinned" / "student.pth", weights_only=True)
    assert student["config"]["fusion_weight"] == 0.5
    job_file(_on_scenes("flickr8k_fusion_students", "dual",
                        {**given, **FEW_NEGATIVES, "candidates": {"source": "in_batch"}}))  # fmt: skip
    found = assert_finished(runs / "dual")
    assert found["student"]["fusion_parameters"] == 0 < found["teacher"]["fusion_parameters"]


# -- COCO's official captions ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_coco_captions_train_on_the_mini_set(job_file, shared_folder):
    data = shared_folder / "data" / "coco_val2017_mini"
    if not data.is_dir():
        pytest.skip(f"no {data}")
    split = dict.fromkeys(("train", "val"), "captions_val2017_mini.json")
    images = dict.fromkeys(("train", "val"), "val2017")
    settings = {
        "model": {"arch": "meter_retrieval", "model_type": "student_coco", **TINY, "joint_head": {"dim": 8}},
        "datasets": {
            "coco_captions": {**PROCESSORS, "build_info": {"root": str(data), "annotations": split, "images": images}}
        },
        "run": {"valid_splits": ["val"], "k_test": 2, "evaluate_before": False},
    }
    assert assert_finished(job_file(settings))["model"]["how"] == "shortlist k=2 (joint)"
