"""METER against the numbers of the authors' code, and its loader against the official files' names and shapes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lavis_dcd.common.errors import UserError
from lavis_dcd.models.meter import MeterRetrieval
from lavis_dcd.models.meter.weights import METER_FILES, to_own_names
from lavis_dcd.models.weights import SavedWeights

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def assert_tokens_close(actual, expected):
    """To 1e-5 of the tensor's largest value: its final norm amplifies float32 rounding (the recorded numbers
    themselves lie up to 2.8e-5 from a float64 run of the same arithmetic)."""
    torch.testing.assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def tiny_section(layers: int = 6, **top) -> dict:
    sizes = json.loads((GOLDEN / "meter_tiny_config.json").read_text())
    clip, meter = sizes["clip_visual"], sizes["meter"]
    return {
        "arch": "meter_retrieval",
        "vision": {
            "image_size": clip["image_resolution"],
            "patch_size": clip["vision_patch_size"],
            "width": clip["vision_width"],
            "layers": clip["vision_layers"] - 1,
        },
        "text": {"family": "roberta", "config": sizes["roberta"]},
        "fusion": {"width": meter["hidden_size"], "layers": layers, "heads": meter["num_heads"]},
        "finetuned": str(GOLDEN / "meter_tiny_state_dict.safetensors"),
        **top,
    }


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "meter_tiny_io.safetensors")


@pytest.fixture(scope="module")
def teacher():
    return MeterRetrieval.from_config(tiny_section()).eval()


def all_features(model, recorded):
    ids, masks = recorded["in.text_ids"].flatten(0, 1), recorded["in.text_masks"].flatten(0, 1).bool()
    return model.encode_images(recorded["in.image"]), model.encode_token_ids(ids, masks)


def all_pairs(recorded):
    images, captions = recorded["in.text_ids"].shape[:2]
    return torch.stack([torch.arange(images).repeat_interleave(captions), torch.arange(images * captions)], dim=1)


@torch.no_grad()
def test_towers_equal_the_official_ones(teacher, recorded):
    images, texts = all_features(teacher, recorded)
    assert_tokens_close(images.tokens, recorded["out.image_embeds"])
    positives = texts[torch.arange(4) * 16]
    mask = positives.mask
    torch.testing.assert_close(positives.tokens[mask], recorded["out.text_embeds"][mask], **CLOSE)


@torch.no_grad()
def test_fusion_equals_the_official_one(teacher, recorded):
    images, texts = all_features(teacher, recorded)
    positives = texts[torch.arange(4) * 16]
    text, image, cls = teacher.fuse(teacher._project_images(images), teacher._project_texts(positives), positives.mask)
    mask = positives.mask
    assert_tokens_close(text[mask], recorded["out.teacher_text_feats"][mask])
    assert_tokens_close(image, recorded["out.teacher_image_feats"])
    torch.testing.assert_close(cls, recorded["out.teacher_cls_feats"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("memory_mb", [1024.0, 0.01])
def test_teacher_scores_every_pair_as_the_official_code(teacher, recorded, memory_mb):
    teacher.config.match_memory_mb = memory_mb
    images, texts = all_features(teacher, recorded)
    scores = teacher.match(images, texts, all_pairs(recorded)).view(4, 16)
    torch.testing.assert_close(scores, recorded["out.teacher_scores"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("part", ["auto", "student"])
def test_a_file_with_student_tensors_gives_the_student(recorded, part):
    student = MeterRetrieval.from_config(tiny_section(layers=3, checkpoint_part=part)).eval()
    images, texts = all_features(student, recorded)
    scores = student.match(images, texts, all_pairs(recorded)).view(4, 16)
    torch.testing.assert_close(scores, recorded["out.student_scores"], **CLOSE)
    positives = texts[torch.arange(4) * 16]
    cls = student.fuse(student._project_images(images), student._project_texts(positives), positives.mask)[2]
    torch.testing.assert_close(cls, recorded["out.student_cls_feats"], **CLOSE)


@torch.no_grad()
def test_succession_equals_the_released_student_layers(teacher):
    student = MeterRetrieval.from_config(tiny_section(layers=3, finetuned=None))
    student.init_from_teacher(teacher, [0, 3, 5])
    for own, donor in enumerate([0, 3, 5]):
        for side in ("cross_modal_text_layers", "cross_modal_image_layers"):
            ours = getattr(student, side)[own].state_dict()
            for name, tensor in getattr(teacher, side)[donor].state_dict().items():
                assert torch.equal(ours[name], tensor)
    student.rank_output.weight.add_(1.0)
    assert not torch.equal(student.rank_output.weight, teacher.rank_output.weight)


@pytest.mark.parametrize("name, layers", [("", 6), ("_with_student", 6), ("_with_student", 3)])
@pytest.mark.parametrize("released", [False, True])
def test_full_size_manifest_loads_with_nothing_missing(name, layers, released):
    manifest = json.loads((GOLDEN / f"meter_clip16_384_roberta_irtr{name}.shapes.json").read_text())
    if released:  # the published files lack CLIP's token embedding and carry the masked-language head
        manifest.pop("vit_model.token_embedding.weight")
        manifest["mlm_score.bias"] = [[50265], "float32"]
    tensors = {k: torch.empty(s, dtype=getattr(torch, d), device="meta") for k, (s, d) in manifest.items()}
    section = {"vision": {}, "text": {"config": full_roberta()}, "fusion": {"layers": layers}}
    with torch.device("meta"):
        model = MeterRetrieval.from_config(section)
    report = METER_FILES.load_into(model, SavedWeights(tensors), Path("released.ckpt"))
    assert report.missing == [] and report.adapted == []
    assert len(report.loaded) + len(report.ignored) >= len(manifest)
    own = {k for k in model.state_dict() if not k.endswith("position_ids")}
    assert own <= set(report.loaded)


def full_roberta() -> dict:
    return {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
            "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip


def test_lightning_file_loads_and_positions_are_interpolated(tmp_path, recorded):
    tensors = load_file(GOLDEN / "meter_tiny_state_dict.safetensors")
    path = tmp_path / "meter.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3, "hyper_parameters": {"lr": 1e-5}}, path)
    section = tiny_section(finetuned=str(path))
    section["vision"]["image_size"] = 80
    model = MeterRetrieval.from_config(section)
    positions = tensors["vit_model.visual.positional_embedding"]
    grid = positions[1:].T.reshape(1, -1, 3, 3)
    expected = torch.nn.functional.interpolate(grid, size=(5, 5), mode="bicubic").flatten(2)[0].T
    loaded = model.vision_tower.vit.embeddings.position_embedding.weight
    torch.testing.assert_close(loaded[1:], expected)
    torch.testing.assert_close(loaded[0], positions[0])
    assert model.encode_images(torch.zeros(1, 3, 80, 80)).tokens.shape == (1, 26, 128)


def test_a_checkpoint_that_leaves_a_weight_at_random_is_refused(tmp_path):
    tensors = load_file(GOLDEN / "meter_tiny_state_dict.safetensors")
    path = tmp_path / "partial.pth"
    torch.save({k: v for k, v in tensors.items() if "cross_modal_image_layers.4" not in k}, path)
    with pytest.raises(UserError, match=r"partial\.pth: lacks \d+ of the \d+ weights.*image_layers\.4"):
        MeterRetrieval.from_config(tiny_section(finetuned=str(path)))


def test_a_pickle_that_holds_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "hook": Runs()}, path)
    with pytest.raises(UserError, match=r"evil\.pth"):
        MeterRetrieval.from_config(tiny_section(finetuned=str(path)))
    assert not (tmp_path / "ran").exists()


def test_other_sizes_are_told(tmp_path):
    section = tiny_section()
    section["fusion"]["width"] = 64
    with pytest.raises(UserError, match=r"there, .* in the model"):
        MeterRetrieval.from_config(section)


@torch.no_grad()
def test_our_own_file_rebuilds_a_thinned_student(tmp_path, teacher, recorded):
    student = MeterRetrieval.from_config(tiny_section(layers=3)).eval()
    path = tmp_path / "student.pth"
    torch.save(student.checkpoint(), path)
    other = MeterRetrieval.from_config(tiny_section()).eval()
    other.load_checkpoint(str(path))
    other.eval()
    images, texts = all_features(other, recorded)
    torch.testing.assert_close(
        other.match(images, texts, all_pairs(recorded)).view(4, 16), recorded["out.student_scores"], **CLOSE
    )


def test_pretrained_file_starts_the_rank_head_from_the_matching_head():
    tensors = load_file(GOLDEN / "meter_tiny_state_dict.safetensors")
    named, _ = to_own_names({k: v for k, v in tensors.items() if not k.startswith("rank_output")}, "teacher", 6)
    torch.testing.assert_close(named["rank_output.weight"], tensors["itm_score.fc.weight"][1:])


def test_joint_space_is_asked_of_a_model_that_has_none(teacher, recorded):
    with pytest.raises(UserError, match="joint_head"):
        teacher.embed_images(all_features(teacher, recorded)[0])


def test_fusion_parameters_are_what_works_once_per_pair():
    model = MeterRetrieval.from_config(tiny_section(joint_head={"dim": 8, "hidden": 8}, finetuned=None))
    prefixes = ("cross_modal_text_layers", "cross_modal_image_layers", "cross_modal_text_pooler",
                "cross_modal_image_pooler", "rank_output")  # fmt: skip
    expected = sum(tensor.numel() for name, tensor in model.named_parameters() if name.startswith(prefixes))
    assert model.fusion_parameters() == expected > 0
    alone = MeterRetrieval.from_config(tiny_section(joint_head=True, fusion_score=False, finetuned=None))
    assert alone.fusion_parameters() == 0


def test_a_fusion_starts_from_text_blocks_of_berts_kind_only():
    sizes = {"vocab_size": 40, "dim": 32, "n_layers": 6, "n_heads": 2, "hidden_dim": 64}
    section = tiny_section(finetuned=None)
    section["text"] = {"family": "distilbert", "config": sizes}
    section["fusion"]["init_from_text"] = True
    with pytest.raises(UserError, match=r"model\.fusion\.init_from_text: needs a text tower of BERT's kind"):
        MeterRetrieval.from_config(section)


# -- the weight of the fusion ----------------------------------------------------------------------------------------


def joint_section(**more) -> dict:
    return tiny_section(joint_head={"dim": 8, "hidden": 8, "dropout": 0.0}, finetuned=None, **more)


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0, 3.0])
def test_a_pair_s_score_is_the_cosine_and_the_weighted_fusion(weight, recorded):
    torch.manual_seed(0)
    model = MeterRetrieval.from_config(joint_section(fusion_weight=weight)).eval()
    images, texts = (features for features in all_features(model, recorded))
    pairs = all_pairs(recorded)
    expected = torch.stack(
        [
            (1.0 if weight is None else weight) * model.fusion_scores(images, texts, pair[None])[0]
            + model.joint_head.scale * (model.embed_images(images)[pair[0]] * model.embed_texts(texts)[pair[1]]).sum()
            for pair in pairs
        ]
    )
    parameters = {n: p for n, p in model.named_parameters() if n.startswith(("rank_output", "joint_head.image.4"))}
    mix = torch.linspace(-1, 1, len(pairs))
    wanted = torch.autograd.grad((expected * mix).sum(), list(parameters.values()), allow_unused=True)
    scores = model.match(images, texts, pairs)
    torch.testing.assert_close(scores, expected, **CLOSE)
    found = torch.autograd.grad((scores * mix).sum(), list(parameters.values()), allow_unused=True)
    for name, one, other in zip(parameters, found, wanted, strict=True):
        one, other = (torch.zeros_like(parameters[name]) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other, **CLOSE)


def test_without_weight_the_fusion_does_not_run(recorded, monkeypatch):
    model = MeterRetrieval.from_config(joint_section(fusion_weight=0.0)).eval()
    monkeypatch.setattr(model, "fusion_scores", None)
    assert len(model.match(*all_features(model, recorded), all_pairs(recorded))) == 64


@pytest.mark.parametrize("given, expected", [(None, 0.5), (0.25, 0.25), (0.0, 0.0)])
def test_a_file_s_weight_holds_unless_the_job_says_another(tmp_path, given, expected):
    saved = MeterRetrieval.from_config(joint_section(fusion_weight=0.5)).checkpoint()
    torch.save(saved, tmp_path / "teacher.pth")
    section = {**joint_section(fusion_weight=given), "finetuned": str(tmp_path / "teacher.pth")}
    assert MeterRetrieval.from_config(section).fusion_weight == expected
    model = MeterRetrieval.from_config(joint_section(fusion_weight=given))
    model.load_checkpoint(str(tmp_path / "teacher.pth"))
    assert model.fusion_weight == expected


@pytest.mark.parametrize("given, expected", [(None, 0.5), (0.25, 0.25)])
def test_a_section_that_leaves_all_to_the_file_gets_joint_head_and_weight(tmp_path, given, expected):
    torch.save(MeterRetrieval.from_config(joint_section(fusion_weight=0.5)).checkpoint(), tmp_path / "teacher.pth")
    model = MeterRetrieval.from_config({"finetuned": str(tmp_path / "teacher.pth"), "fusion_weight": given})
    assert model.joint_head is not None and model.fusion_weight == expected


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_no_sum_can_use_is_refused(weight):
    with pytest.raises(UserError, match="fusion_weight"):
        MeterRetrieval.from_config(joint_section(fusion_weight=weight))


def test_a_weight_without_a_joint_head_is_refused():
    with pytest.raises(UserError, match="fusion_weight: there is no joint_head"):
        MeterRetrieval.from_config(tiny_section(finetuned=None, fusion_weight=0.5))
