"""Whole jobs across families at a tiny size: the project files, matchers in both roles, pairs that cannot work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import assert_finished

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets import lavis_sets
from lavis_dcd.job import load_config

pytest.importorskip("lavis")
from lavis_dcd.matching.adapters.albef_blip import AlbefAdapter
from lavis_dcd.matching.adapters.clip import ClipAdapter
from lavis_dcd.models.building import build_matcher
from lavis_dcd.models.dcd import DynamicContrastiveDistillation

GOLDEN = Path(__file__).parent / "golden"
SIDE = 32  # of the pictures that models without a reason for another size read
NO_WEIGHTS = {"load_finetuned": False, "finetuned": None, "pretrained": None}


# -- models of a few thousand weights ----------------------------------------------------------------------------


def reads(matcher: Callable, image_size: int = SIDE) -> dict[str, Any]:
    """``vis_processor`` and ``text_processor`` of a data set or a ``preprocess`` section, as one of these reads."""
    pictures = {"name": "blip_image_eval", "image_size": image_size}
    if matcher is joint_meter:
        pictures = {"name": "dcd_image_eval", "image_size": 64}
    if matcher is vilt:
        pictures = {"name": "vilt_image_eval", "shorter": 48, "longer": 96, "multiple": 16}
    return {"vis_processor": {"train": pictures, "eval": pictures},
            "text_processor": {stage: {"name": "dcd_caption"} for stage in ("train", "eval")}}  # fmt: skip


def vilt(vocabulary: str) -> dict[str, Any]:
    sizes = json.loads((GOLDEN / "vilt_tiny_config.json").read_text())
    return {
        "arch": "vilt_retrieval",
        "image": {"image_size": 96, "patch_size": 16},
        "text": {"name": vocabulary, "vocab_size": sizes["vocab_size"], "max_positions": sizes["max_text_len"]},
        "fusion": {"width": sizes["hidden_size"], "layers": sizes["num_layers"], "heads": sizes["num_heads"]},
    }


def dual(vocabulary: str) -> dict[str, Any]:
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 24}  # fmt: skip
    return {
        "arch": "dual_encoder",
        "vision": {"backbone": "clip_vit", "image_size": SIDE, "patch_size": 16, "width": 32, "layers": 1, "heads": 2,
                   "weights": None},
        "text": {"family": "bert", "name": vocabulary, "max_length": 16, "config": text, "load_weights": False},
        "head": {"dim": 16, "hidden": 0},
    }  # fmt: skip


def cross_attention(arch: str, vocabulary: str, image_size: int = SIDE) -> dict[str, Any]:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
            "max_position_embeddings": 24, "vocab_size": 40}  # fmt: skip
    if arch == "albef_retrieval":
        text["fusion_layer"] = 1
    vision = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 16}
    return {"arch": arch, "tokenizer": vocabulary, "image_size": image_size, "embed_dim": 16, "max_txt_len": 16,
            "queue_size": 8, "sizes": {"vision": vision, "text": text}}  # fmt: skip


def albef(vocabulary: str) -> dict[str, Any]:
    return cross_attention("albef_retrieval", vocabulary)


def blip(vocabulary: str) -> dict[str, Any]:
    return cross_attention("blip_retrieval", vocabulary)


def blip2(vocabulary: str) -> dict[str, Any]:
    sizes = {
        "image_size": SIDE, "patch_size": 16, "num_query_token": 3, "embed_dim": 8, "max_txt_len": 12,
        "vision": {"width": 24, "layers": 1, "heads": 2}, "qformer": {"width": 32, "layers": 2, "heads": 2},
    }  # fmt: skip
    return {"arch": "blip2_image_text_matching", "tokenizer": vocabulary, "sizes": sizes}


def clip(vocabulary: str = "", image_size: int = SIDE) -> dict[str, Any]:
    sizes = {
        "embed_dim": 16,
        "vision": {"width": 64, "layers": 1, "patch_size": 16, "image_size": image_size},
        "text": {"width": 16, "heads": 2, "layers": 1, "context_length": 16},
    }
    return {"arch": "clip", "sizes": sizes}


def joint_meter(vocabulary: str = "") -> dict[str, Any]:
    """The METER with a joint head that ships with its weights."""
    return {"arch": "meter_retrieval", "model_type": "quickstart"}


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[dict], dict]:
    """A section with a file of seeded weights that it names as its own."""

    def save(section: dict) -> dict:
        torch.manual_seed(0)
        file = tmp_path / f"{section['arch']}.pth"
        torch.save(build_matcher({**section, **NO_WEIGHTS}, "model").checkpoint(), file)
        return {**section, "finetuned": str(file)}

    return save


def built(section: dict) -> torch.nn.Module:
    return build_matcher(section, "model")


def assert_distilled(folder: Path, found: dict[str, dict]) -> None:
    """A run's table, finite figures, and a student's file from which its model comes back."""
    assert list(found) == ["teacher", "student before training", "student"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in steps if line["kind"] == "train")
    saved = torch.load(folder / "student.pth", weights_only=True)
    again = built({**saved["config"], "arch": saved["arch"], "finetuned": str(folder / "student.pth"),
                   "load_finetuned": True})  # fmt: skip
    weights = again.checkpoint()["model"]
    assert weights.keys() == saved["model"].keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, saved["model"][name], msg=name)


# -- the project files -------------------------------------------------------------------------------------------

FILES = {
    "vilt_coco": ("vilt_irtr_coco.ckpt", "coco_karpathy_train.json"),
    "vilt_flickr30k": ("vilt_irtr_f30k.ckpt", "flickr30k_train.json"),
    "vilt_coco_stratified": ("vilt_irtr_coco.ckpt", "coco_karpathy_train.json"),
    "vilt_flickr30k_stratified": ("vilt_irtr_f30k.ckpt", "flickr30k_train.json"),
    "albef_coco_to_dual_encoder": ("albef_coco_retrieval_lavis.pt", "coco_karpathy_train.json"),
    "blip_coco_to_dual_encoder": ("blip_coco_retrieval.pth", "coco_karpathy_train.json"),
    "blip2_coco_to_dual_encoder": ("blip2_finetune_coco.pth", "coco_karpathy_train.json"),
    "clip_coco_to_dual_encoder": ("ViT-L-14.pt", "coco_karpathy_train.json"),
}


@pytest.fixture
def bare_machine(tmp_path, monkeypatch, cache, offline) -> Path:
    """An empty working folder on a machine whose caches are empty too and which has no network."""
    from lavis.models.clip_models.pretrained import download_pretrained

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(download_pretrained, "__defaults__", (str(tmp_path / "clip"),))
    return work


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_project_file_on_a_bare_machine_names_what_is_missing_and_where_it_comes_from(name, bare_machine):
    with pytest.raises(UserError) as caught:
        load_config(f"projects/dcd/{name}.yaml")
    lines = caught.value.faults
    fields = [line.partition(":")[0] for line in lines]
    assert len(set(fields)) == len(fields), "one line per missing file"
    # nothing but files is amiss
    missing = [
        r"does not exist; it comes from https://\S+, which cannot be reached",
        r"is not in the hub's cache .* https://huggingface\.co/\S+ cannot be reached",
        r"does not exist; nothing downloads the images",
    ]
    assert all("\n" not in line and re.search("|".join(missing), line) for line in lines), lines
    for file in FILES[name]:
        assert sum(f"/{file}, which" in line for line in lines) == 1, file
    assert list(bare_machine.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("vilt_coco", "coco_retrieval"), ("vilt_flickr30k", "flickr30k"),
        ("vilt_coco_stratified", "coco_retrieval"), ("vilt_flickr30k_stratified", "flickr30k"),
    ],
)  # fmt: skip
def test_the_papers_vilt_recipes(job, retrieval_files, vocabulary, monkeypatch, name, builder):
    batches, forward = [], DynamicContrastiveDistillation.forward
    monkeypatch.setattr(
        DynamicContrastiveDistillation, "forward", lambda self, batch: batches.append(batch) or forward(self, batch)
    )
    canvas = {"shorter": 48, "longer": 96, "multiple": 16}
    processors = {"vis_processor": {"train": canvas, "eval": canvas}}
    teacher = {**vilt(vocabulary), "finetuned": str(GOLDEN / "vilt_tiny_state_dict.safetensors")}
    model = {
        "teacher": {**teacher, "preprocess": processors},
        "student": {"init_from_teacher": {"layers": [0, 3]}},
        "candidates": {} if name.endswith("_stratified") else {"image_to_text": {"count": 10}},
    }
    folder = job(name, {"model": model, "datasets": {builder: {**processors, "build_info": retrieval_files}}})
    found = assert_finished(folder)
    assert_distilled(folder, found)
    assert found["student"]["fusion_parameters"] < 0.7 * found["teacher"]["fusion_parameters"]
    config = torch.load(folder / "student.pth", weights_only=True)["config"]
    assert config["fusion"]["layers"] == 2
    assert len(batches) == 2
    for batch in batches:  # teacher and student see the same augmented pictures, else there were one of each
        assert batch["image"].shape == (4, 3, 96, 96)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [albef, blip, blip2, clip])
def test_dual_encoders_from_lavis_own_retrievers(job, retrieval_files, vocabulary, trained, teacher):
    name = f"{teacher.__name__}_coco_to_dual_encoder"
    section = trained(teacher(vocabulary))
    if teacher is clip:
        # CLIP's file names published weights by a tag; a local file stands for it
        section["pretrained"] = section.pop("finetuned")
    section.pop("arch")
    size = {"train": {"image_size": SIDE}, "eval": {"image_size": SIDE}}
    model = {"teacher": section, "student": dual(vocabulary), "selection": {"hard_negatives": 3}}
    data = {"coco_retrieval": {"vis_processor": size, "build_info": retrieval_files}}
    run = {} if teacher is clip else {"k_test": 2}
    folder = job(name, {"model": model, "datasets": data, "run": run})
    found = assert_finished(folder)
    assert_distilled(folder, found)
    assert found["student"]["fusion_parameters"] == 0
    results = json.loads((folder / "results.json").read_text())
    if teacher is clip:  # each through its own processors, and at no cost per pair
        assert results["memorised"]["pictures"] > 0
    else:
        assert found["teacher"]["fusion_parameters"] > 0
        assert "k=2" in found["teacher"]["how"] and "memorised" not in results


# -- pairs in both roles -----------------------------------------------------------------------------------------

WHOLE, FEW = "exhaustive", "shortlist k=2 (joint)"
# teacher, student (a matcher, or layers of the teacher's), the student's own loss, how both are evaluated
PAIRS = {
    "vilt to vilt thinned": (vilt, [0, 3], 0.0, WHOLE, WHOLE),
    "vilt to dual encoder": (vilt, dual, 0.0, WHOLE, WHOLE),
    "dual encoder to vilt": (dual, vilt, 0.0, WHOLE, WHOLE),
    "albef to dual encoder": (albef, dual, 0.0, FEW, WHOLE),
    "dual encoder to albef": (dual, albef, 1.0, WHOLE, FEW),
    "blip to dual encoder": (blip, dual, 0.0, FEW, WHOLE),
    "meter with joint head to blip": (joint_meter, blip, 0.5, FEW, FEW),
    "blip-2 to dual encoder": (blip2, dual, 0.0, FEW, WHOLE),
    "clip to dual encoder": (clip, dual, 0.0, WHOLE, WHOLE),
    "dual encoder to clip": (dual, clip, 0.5, WHOLE, WHOLE),
    "blip to meter with joint head": (blip, joint_meter, 1.0, FEW, FEW),
    "meter to meter, both with joint heads": (joint_meter, [0, 3, 5], 0.0, FEW, FEW),
}


@pytest.fixture
def pair_job(job_file, retrieval_files, vocabulary, trained) -> Callable[..., Path]:
    """``pair_job(teacher, student, **loss)``: two steps of this pair of matchers; ``run`` over the job's own."""

    def run(teacher: Callable, student: Callable | list[int], run: dict | None = None, **loss: Any) -> Path:
        learner = teacher if isinstance(student, list) else student
        own = {"init_from_teacher": {"layers": student}} if learner is teacher else student(vocabulary)
        if learner is not teacher and learner is joint_meter:
            own["load_finetuned"] = False
        section = teacher(vocabulary) if teacher is joint_meter else trained(teacher(vocabulary))
        if teacher is vilt:
            section["finetuned"] = str(GOLDEN / "vilt_tiny_state_dict.safetensors")
        sections = {
            "model": {
                "arch": "dcd",
                "teacher": {**section, "preprocess": reads(teacher)},
                "student": own,
                "selection": {"hard_negatives": 2},
                "loss": loss,
            },
            "datasets": {"coco_retrieval": {**reads(learner), "build_info": retrieval_files}},
            "run": {"test_splits": ["test"], "init_lr": 1.0e-3, **(run or {})},
        }
        return job_file(sections)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_in_both_roles(pair_job, pair):
    teacher, student, own_loss, *how = PAIRS[pair]
    k_test = {"k_test": 2} if FEW in how else {}
    folder = pair_job(teacher, student, k_test, student_weight=own_loss)
    found = assert_finished(folder)
    assert_distilled(folder, found)
    assert [found["teacher"]["how"], found["student"]["how"]] == how
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = {key for line in losses if line["kind"] == "train" for key in line}
    assert ("student_loss" in parts) == (own_loss > 0)
    assert ("in_batch_loss" in parts) == (student in (dual, clip))


# -- different inputs on both sides ------------------------------------------------------------------------------


@pytest.fixture
def inputs_of(monkeypatch) -> Callable[[type], dict[str, list]]:
    """``inputs_of(adapter class)``: the sides, corners and texts that its instances will have been given to encode."""

    def spy(adapter: type) -> dict[str, list]:
        seen: dict[str, list] = {"sides": [], "corners": [], "texts": []}
        encode_images, encode_texts = adapter.encode_images, adapter.encode_texts

        def images_seen(self, images):
            seen["sides"] += [images.shape[-1]] * len(images)
            seen["corners"] += images[:, 0, 0, 0].tolist()
            return encode_images(self, images)

        def texts_seen(self, texts):
            seen["texts"] += texts
            return encode_texts(self, texts)

        monkeypatch.setattr(adapter, "encode_images", images_seen)
        monkeypatch.setattr(adapter, "encode_texts", texts_seen)
        return seen

    return spy


@pytest.mark.slow
def test_clip_at_64_px_learns_from_albef_at_96_px(
    job_file, retrieval_files, pictures, vocabulary, trained, inputs_of, monkeypatch
):
    """Each side gets its own size, normalisation and wording; a training picture is decoded once for both."""
    teacher = trained(cross_attention("albef_retrieval", vocabulary, image_size=96))
    half = {"name": "blip_image_eval", "image_size": 96, "mean": [0.5] * 3, "std": [0.5] * 3}
    wording = {"name": "blip_caption", "prompt": "picture of "}
    teacher["preprocess"] = {"vis_processor": {"eval": half}, "text_processor": {"eval": wording}}
    by_albef, by_clip = inputs_of(AlbefAdapter), inputs_of(ClipAdapter)
    opened, really_open = [], lavis_sets.open_picture
    monkeypatch.setattr(lavis_sets, "open_picture", lambda file: opened.append(Path(file).name) or really_open(file))
    folder = job_file(
        {
            "model": {
                "arch": "dcd", "teacher": teacher, "student": clip(image_size=64), "selection": {"hard_negatives": 2},
            },
            "datasets": {"coco_retrieval": {**reads(clip, 64), "build_info": retrieval_files}},
            "run": {"test_splits": ["test"], "verify": "off"},
        }
    )  # fmt: skip
    assert_distilled(folder, assert_finished(folder))
    assert (set(by_albef["sides"]), set(by_clip["sides"])) == ({96}, {64})
    # every picture's corner is white: 1 by the teacher's mean and deviation of a half, 1.93 by CLIP's own
    assert by_albef["corners"] == pytest.approx([1.0] * len(by_albef["corners"]), abs=0.01)
    assert by_clip["corners"] == pytest.approx([1.93] * len(by_clip["corners"]), abs=0.01)
    assert all(text.startswith("picture of ") for text in by_albef["texts"])
    assert not any(text.startswith("picture of ") for text in by_clip["texts"])
    training = {row["image"] for row in pictures[:8]}
    assert sum(name in training for name in opened) == 2 * 4, "two steps of four samples"


# -- several teachers --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_teachers(job_file, retrieval_files, vocabulary, trained):
    teachers = [
        {**joint_meter(), "preprocess": reads(joint_meter), "weight": 1},
        {**trained(albef(vocabulary)), "preprocess": reads(albef), "weight": 2},
    ]
    folder = job_file(
        {
            "model": {
                "arch": "dcd", "teachers": teachers, "student": dual(vocabulary), "selection": {"hard_negatives": 2},
            },
            "datasets": {"coco_retrieval": {**reads(dual), "build_info": retrieval_files}},
            "run": {"test_splits": ["test"]},
        }
    )  # fmt: skip
    found = assert_finished(folder)
    assert_distilled(folder, found)
    assert found["teacher"]["how"] == "ensemble of 2, exhaustive"
    members = [built({key: value for key, value in section.items() if key not in ("preprocess", "weight")})
               for section in teachers]  # fmt: skip
    assert found["teacher"]["fusion_parameters"] == sum(member.fusion_parameters() for member in members)
    assert (found["student"]["how"], found["student"]["fusion_parameters"]) == ("exhaustive", 0)


# -- pairs that cannot work --------------------------------------------------------------------------------------


@pytest.fixture
def refused(job_file, retrieval_files, vocabulary, trained, tmp_path) -> Callable[..., list[str]]:
    """The lines with which a job of ViLT into a dual encoder with these changes ends before it has trained."""

    def run(model: dict[str, Any], **run_section: Any) -> list[str]:
        sections = {
            "model": {
                "arch": "dcd",
                "teacher": {**trained(vilt(vocabulary)), "preprocess": reads(vilt)},
                "student": dual(vocabulary),
                **model,
            },
            "datasets": {"coco_retrieval": {**reads(dual), "build_info": retrieval_files}},
            "run": {"test_splits": ["test"], **run_section},
        }
        sections["model"] = {key: value for key, value in sections["model"].items() if value is not None}
        with pytest.raises(UserError) as caught:
            job_file(sections)
        logs = [file.read_text() for file in tmp_path.rglob("metrics.jsonl")]
        assert not any(logs), "nothing was trained or evaluated"
        return caught.value.faults

    return run


def test_a_teacher_without_weights_is_refused(refused, vocabulary):
    for section in (albef(vocabulary), clip(), dual(vocabulary), {**vilt(vocabulary), **NO_WEIGHTS}):
        assert refused({"teacher": section}) == [
            "model.teacher: names no weights (finetuned or pretrained): a teacher with random weights teaches noise; "
            "name a checkpoint (model.teacher.finetuned=FILE, with load_finetuned: true)"
        ]


def test_a_teacher_whose_file_lacks_its_fusion_is_refused(refused, vocabulary, trained, tmp_path):
    section = trained(albef(vocabulary))
    saved = torch.load(section["finetuned"], weights_only=True)
    saved["model"] = {key: value for key, value in saved["model"].items() if not key.startswith("itm_head")}
    torch.save(saved, tmp_path / "half.pth")
    assert refused({"teacher": {**section, "finetuned": str(tmp_path / "half.pth")}}) == [
        f"model.teacher.finetuned: {tmp_path / 'half.pth'} leaves 2 weights that scoring needs at random, first "
        "itm_head.weight; name a retrieval checkpoint of AlbefRetrieval in these sizes"
    ]


def test_a_student_in_which_nothing_learns_is_refused(refused, vocabulary):
    frozen = {"freeze": ["encoders", "text_encoder", "itm_head"]}
    matching = cross_attention("blip_image_text_matching", vocabulary)
    matching.pop("queue_size")
    assert refused({"student": {**matching, **frozen}}) == [
        "model.student: no parameter would learn; unfreeze a tower or keep a fusion of its own"
    ]
    # ALBEF's temperature is in no part that could be frozen, and no score depends on it
    assert refused({"student": {**albef(vocabulary), **frozen}}) == [
        "model.student: none of the parameters that its scores depend on would learn; unfreeze a tower, or keep a "
        "fusion of its own"
    ]


def test_tokenizers_that_leave_nothing_of_the_captions_are_refused(refused, vocabulary):
    short = dual(vocabulary)
    short["text"]["max_length"] = 2
    assert refused({"student": short}) == [
        "model.student.text.max_length: 2 cuts every caption to nothing but its 2 special tokens; give at least 3"
    ]
    assert refused({"student": {**albef(vocabulary), "max_txt_len": 2}}) == [
        "model.student: captions are cut to 2 tokens, which leaves no word; raise max_txt_len or scoring_txt_len to 3 "
        "or more"
    ]
    cut = clip()
    cut["sizes"]["text"]["context_length"] = 2
    assert refused({"student": cut}) == [
        "model.student: its tokenizer leaves nothing of the captions: 'a grey bar' and 'there is one grey bar on "
        "white' become the same text; raise its longest text (max_length, max_txt_len), or name the tokenizer of its "
        "language"
    ]


def test_a_shortlist_that_nobody_can_make_is_refused(refused):
    assert refused({}, k_test=2) == [
        "run.k_test: the teacher would rerank a shortlist by the joint space of the teacher, which has none; name a "
        "matcher that has one in run.shortlist (student), or leave k_test out to score every pair"
    ]
    lines = refused({}, k_test=2, shortlist="pupil")
    assert lines == ["run.shortlist: 'pupil' is none of this job's matchers: joint, teacher, student"]


def test_one_section_of_teachers_is_asked_for(refused, vocabulary, trained):
    line = "model.teachers: give either teacher: or teachers:"
    assert refused({"teachers": [trained(albef(vocabulary))]}) == [line]
    assert line in refused({"teacher": None})


def test_students_that_cannot_start_from_their_teacher_are_refused(refused, vocabulary, trained):
    layers, towers = {"init_from_teacher": {"layers": [0, 1]}}, {"init_from_teacher": {"towers": True}}
    of_albef = trained(albef(vocabulary))
    place = "model.student.init_from_teacher"
    for model, line in (
        (
            {"student": {**dual(vocabulary), **layers}},
            f"{place}.layers: dual_encoder cannot start from the layers of vilt_retrieval; leave it out, or use "
            "towers: true for a dual_encoder",
        ),
        (
            {"teacher": of_albef, "student": layers},
            f"{place}.layers: albef_retrieval cannot be thinned; leave init_from_teacher out, and name the student's "
            "arch",
        ),
        (
            {"teacher": of_albef, "student": {**dual(vocabulary), **towers}},
            f"{place}.towers: AlbefAdapter has no towers that a student could take over; name the student's own vision "
            "and text, with weights",
        ),
        (
            {"student": {"init_from_teacher": {"layers": [0, 9]}}},
            f"{place}.layers: [0, 9] must name 2 layers of the teacher's 0..3",
        ),
        (
            {"student": {"init_from_teacher": {}}},
            f"{place}: give layers: [...] (of the teacher's fusion) or towers: true",
        ),
    ):
        assert refused(model) == [line]


@pytest.mark.slow
def test_a_refused_job_gives_its_name_back(job_file, refused, retrieval_files, vocabulary, trained):
    refused({}, k_test=2)
    folder = job_file(
        {
            "model": {"arch": "dcd", "teacher": {**trained(clip()), "preprocess": reads(clip)},
                      "student": dual(vocabulary), "selection": {"hard_negatives": 2}},
            "datasets": {"coco_retrieval": {**reads(dual), "build_info": retrieval_files}},
            "run": {"test_splits": ["test"]},
        }
    )  # fmt: skip
    assert_distilled(folder, assert_finished(folder))
