"""CLIP through its adapter against LAVIS's own CLIP, with random weights of a small size."""

from __future__ import annotations

import hashlib
import re
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as nnf

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.clip import BPE_ENTRIES, ClipAdapter, ClipOptions
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.building import build_matcher

pytest.importorskip("lavis")
from lavis.models.clip_models import model as lavis_clip

SIZES = {
    "embed_dim": 16,
    "vision": {"width": 64, "layers": 2, "patch_size": 8, "image_size": 32},
    "text": {"width": 32, "heads": 2, "layers": 2, "context_length": 12},
}
TEXTS = [
    "a dog runs",
    "two birds on a wire over the old harbour",
    "snow",
    "a very long caption whose words go on and on until no model of this size could ever hold them all at once",
]


def build(**section) -> ClipAdapter:
    torch.manual_seed(section.pop("seed", 0))
    section = OmegaConf.create({"arch": "clip", "sizes": SIZES, **section})
    return ClipAdapter.from_config(lavis_clip.CLIP, section)


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def clip() -> ClipAdapter:
    adapter = build().eval()
    with torch.no_grad():
        adapter.model.positional_embedding.normal_()
    return adapter


@pytest.fixture(scope="module")
def features(clip: ClipAdapter) -> tuple[ImageFeatures, TextFeatures]:
    with torch.no_grad():
        return clip.encode_images(pictures()), clip.encode_texts(TEXTS)


def lavis_cosines(model: nn.Module) -> torch.Tensor:
    loader = [{"image": pictures()}]
    loader = type("Loader", (list,), {"dataset": SimpleNamespace(text=TEXTS)})(loader)
    with torch.no_grad():
        return torch.from_numpy(model.compute_sim_matrix(loader)[0])


def test_it_serves_lavis_names():
    assert adapter_for("clip") is ClipAdapter
    assert adapter_for("clip_feature_extractor") is ClipAdapter
    assert ClipAdapter.family == "dual"
    assert ClipAdapter.has_joint_space


def test_joint_scores_are_lavis_own_cosines(clip, features):
    images, texts = features
    joint = clip.joint_scores(clip.embed_images(images), clip.embed_texts(texts))
    torch.testing.assert_close(joint, lavis_cosines(clip.model), atol=1e-5, rtol=0)


def test_match_is_the_scaled_cosine_of_lavis(clip, features):
    expected = lavis_cosines(clip.model) / 0.07
    pairs = torch.tensor([[2, 0], [0, 3], [2, 0], [1, 1]])
    with torch.no_grad():
        scores = clip.match(*features, pairs)
    torch.testing.assert_close(scores, expected[pairs[:, 0], pairs[:, 1]], atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.match_all(*features), expected, atol=1e-5, rtol=0)


def test_few_pairs_are_gathered_and_many_come_from_one_product(clip, features):
    every = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    with torch.no_grad():
        many = clip.match(*features, every)
        few = torch.cat([clip.match(*features, pair[None]) for pair in every])
    torch.testing.assert_close(many, few)
    assert clip.match(*features, every[:0]).shape == (0,)


def test_the_encoders_run_once_per_item_and_never_in_match(clip, monkeypatch):
    seen = []
    for name in ("encode_image", "encode_text"):
        original = getattr(clip.model, name)
        monkeypatch.setattr(clip.model, name, lambda x, n=name, f=original: seen.append((n, len(x))) or f(x))
    with torch.no_grad():
        images, texts = clip.encode_images(pictures()), clip.encode_texts(TEXTS)
        clip.match(images, texts, torch.zeros(20, 2, dtype=torch.long))
        clip.match(images, texts, torch.zeros(1, 2, dtype=torch.long))
    assert seen == [("encode_image", 3), ("encode_text", 4)]


def test_features_are_unit_vectors_that_may_be_halved_and_saved(clip, features):
    images, texts = features
    assert images.tokens.shape == (3, 1, 16)
    torch.testing.assert_close(images.embeds.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(texts.tokens[:, 0], texts.embeds)
    # a bank's files cannot hold two views of one storage
    assert images.tokens.data_ptr() != images.embeds.data_ptr() and texts.tokens.data_ptr() != texts.embeds.data_ptr()
    pairs = torch.tensor([[1, 1], [2, 3]])
    scores = clip.match(*(rows.to(dtype=torch.float16) for rows in (images, texts)), pairs)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, clip.match(images, texts, pairs), atol=0.05, rtol=0)


def test_scores_stay_in_full_precision_under_autocast(clip, features):
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        scores = clip.match(*features, pairs)
    torch.testing.assert_close(scores, clip.match(*features, pairs))


def test_a_text_encodes_alike_in_every_batch(clip, features):
    with torch.no_grad():
        alone = clip.encode_texts([TEXTS[2]]).embeds
        twice = clip.encode_texts([TEXTS[2], TEXTS[3], TEXTS[2]]).embeds
    torch.testing.assert_close(alone[0], features[1].embeds[2])
    torch.testing.assert_close(twice[0], twice[2])


def test_a_text_is_cut_at_the_context_length(clip, features):
    with torch.no_grad():
        cut = clip.encode_texts([TEXTS[3], TEXTS[3] + " and more", "a very long caption"]).embeds
    torch.testing.assert_close(cut[0], cut[1])
    assert (cut[0] - cut[2]).abs().max() > 1e-3


def test_pictures_of_another_size_are_refused(clip):
    with pytest.raises(UserError, match=r"\(16, 16\) pixels.*image_size to 32"):
        clip.encode_images(torch.zeros(1, 3, 16, 16))


def test_own_loss_is_lavis_infonce_in_a_single_process():
    clip = build()
    samples = {"image": pictures(4), "text_input": TEXTS}
    loss = clip.own_loss(samples)
    texts = lavis_clip.CLIP.forward(clip.model, {"text_input": TEXTS})
    logits = nnf.normalize(clip.model.visual(samples["image"]), dim=-1) @ nnf.normalize(texts, dim=-1).T / 0.07
    target = torch.arange(4)
    expected = (nnf.cross_entropy(logits, target) + nnf.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert clip.model.text_projection.grad.abs().sum() > 0
    assert clip.model.logit_scale.grad.abs() > 0


def test_gradients_flow_through_match_both_ways():
    clip = build()
    every = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    weights = torch.randn(12, generator=torch.Generator().manual_seed(3))
    grads = []
    for few in (False, True):
        clip.zero_grad()
        images, texts = clip.encode_images(pictures()), clip.encode_texts(TEXTS)
        parts = [clip.match(images, texts, p) for p in (every.split(1) if few else [every])]
        (torch.cat(parts) * weights).sum().backward()
        grads.append({name: p.grad.clone() for name, p in clip.model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)
    assert all(g.abs().sum() > 0 for n, g in grads[0].items() if not n.endswith("in_proj_bias"))


def test_frozen_encoders_leave_bare_parameters_to_learn():
    clip = build(freeze=["visual", "transformer", "token_embedding", "ln_final"])
    learning = {name for name, p in clip.model.named_parameters() if p.requires_grad}
    assert learning == {"positional_embedding", "text_projection", "logit_scale"}
    assert not clip.encoders_frozen()
    clip = build(freeze=["encoders"])
    assert {name for name, p in clip.model.named_parameters() if p.requires_grad} == {"logit_scale"}
    assert clip.encoders_frozen()
    assert clip.fusion_parameters() == 0


def test_frozen_encoders_are_known_by_all_that_shapes_features():
    first, again = build(freeze=["encoders"]), build(freeze=["encoders"])
    assert first.shares_encoders_with(again)
    assert not first.shares_encoders_with(build(freeze=["encoders"], quick_gelu=True))
    moved = build(freeze=["encoders"])
    with torch.no_grad():
        moved.model.text_projection[0, 0] += 1
    assert not first.shares_encoders_with(moved)
    assert build().encoder_signature() is None


def test_a_checkpoint_loads_again_and_knows_its_activation(tmp_path):
    first = build(quick_gelu=True)
    saved = first.checkpoint()
    assert saved["arch"] == "clip"
    assert saved["config"]["quick_gelu"] is True
    file = tmp_path / "student.pth"
    torch.save(saved, file)
    for field in ("finetuned", "pretrained"):
        again = build(seed=1, quick_gelu=True, **{field: str(file)})
        torch.testing.assert_close(again.encode_texts(TEXTS).embeds, first.encode_texts(TEXTS).embeds)
    with pytest.raises(UserError, match="trained with quick_gelu: true"):
        build(finetuned=str(file))


def test_the_activation_changes_the_features():
    exact, quick = build(), build(quick_gelu=True)
    assert not exact.quick_gelu
    assert quick.quick_gelu
    assert (exact.encode_images(pictures()).embeds - quick.encode_images(pictures()).embeds).abs().max() > 1e-5


def test_files_in_other_forms(tmp_path):
    first = build()
    weights = first.model.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "open_clip.pt")
    torch.save(weights, tmp_path / "bare.pt")
    for name in ("open_clip.pt", "bare.pt"):
        again = build(seed=1, pretrained=str(tmp_path / name))
        torch.testing.assert_close(again.model.state_dict()["visual.proj"], weights["visual.proj"])


def test_a_file_that_leaves_weights_at_random_is_refused(tmp_path):
    weights = build().model.state_dict()
    file = tmp_path / "half.pth"
    torch.save({"model": {k: v for k, v in weights.items() if not k.startswith("visual.")}}, file)
    with pytest.raises(UserError, match=r"model\.finetuned: .*half\.pth leaves \d+ weights.*visual\."):
        build(finetuned=str(file))
    torch.save({"model": {**weights, "text_projection": torch.zeros(3, 3)}}, file)
    with pytest.raises(UserError, match=r"model\.pretrained: .*half\.pth: text_projection is \(3, 3\) there"):
        build(pretrained=str(file))


class _Tree(nn.Module):
    """Parameters under the names of a state dict, for an archive such as OpenAI's."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        children: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in weights.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            else:
                self.register_parameter(head, nn.Parameter(value.half()))
        for name, inner in children.items():
            self.add_module(name, _Tree(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_openai_archive_is_read_under_its_tag_but_not_as_a_file(tmp_path, monkeypatch):
    sizes = {**SIZES, "text": {"width": 64, "heads": 1, "layers": 1}}
    first = build(sizes=sizes, quick_gelu=True).model.state_dict()
    file = tmp_path / "ViT.pt"
    torch.jit.script(_Tree(first)).save(str(file))
    address = f"https://openaipublic.invalid/{hashlib.sha256(file.read_bytes()).hexdigest()}/ViT-B-32.pt"
    monkeypatch.setattr(lavis_clip, "get_pretrained_url", lambda name, tag: address if tag == "openai" else "")
    monkeypatch.setattr(lavis_clip, "download_pretrained", lambda url: str(file) if url == address else None)
    adapter = build(sizes={}, model_type="ViT-B-32", pretrained="openai")
    assert adapter.quick_gelu
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(adapter.model.visual.proj, first["visual.proj"], atol=1e-2, rtol=1e-2)
    for field in ("pretrained", "finetuned"):
        with pytest.raises(UserError, match=rf"model\.{field}: .*ViT\.pt holds code: it is a TorchScript archive"):
            build(**{"sizes": sizes, field: str(file)})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.to(torch.int8), "holds numbers of type int8"),
        (lambda w: w.bool(), "holds numbers of type bool"),
        (lambda w: w.to(torch.complex64), "holds numbers of type complex64"),
        (lambda w: w * torch.inf, "holds NaN or infinite values"),
    ],
)
def test_weights_of_another_kind_are_told_by_name(tmp_path, change, words):
    weights = build().model.state_dict()
    file = tmp_path / "x.pth"
    torch.save({"model": {**weights, "text_projection": change(weights["text_projection"])}}, file)
    for field in ("finetuned", "pretrained"):
        with pytest.raises(UserError, match=rf"model\.{field}: .*x\.pth: text_projection {words}"):
            build(**{field: str(file)})


def test_lavis_types_are_built_by_lavis_with_the_right_activation(monkeypatch, tmp_path):
    small = {"embed_dim": 16, "vision_cfg": SIZES["vision"], "text_cfg": {**SIZES["text"], "vocab_size": BPE_ENTRIES}}
    monkeypatch.setitem(lavis_clip._MODEL_CONFIGS, "ViT-B-32", small)
    plain = build(sizes={}, model_type="ViT-B-32", pretrained=None)
    assert not plain.quick_gelu
    file = tmp_path / "student.pth"
    torch.save({"model": plain.model.state_dict()}, file)
    # the type's default still says openai beside the fine-tuned file, and nothing is fetched
    tuned = build(sizes={}, model_type="ViT-B-32", pretrained="openai", finetuned=str(file))
    assert tuned.quick_gelu


def test_lavis_type_in_small_through_its_own_name():
    section = {"arch": "clip", "model_type": "ViT-B-16", "pretrained": None, "sizes": SIZES}
    adapter = build_matcher(section, "model.student")
    assert isinstance(adapter, ClipAdapter)
    assert adapter.model.visual.positional_embedding.shape == (17, 64)


def test_sections_that_cannot_work(monkeypatch):
    small = {"embed_dim": 16, "vision_cfg": SIZES["vision"], "text_cfg": {**SIZES["text"], "vocab_size": 8}}
    monkeypatch.setitem(lavis_clip._MODEL_CONFIGS, "ViT-B-32", small)
    with pytest.raises(UserError, match=r"model\.model_type: clip needs one"):
        build(sizes={})
    with pytest.raises(UserError, match=r"model\.pretrained: nowhere\.pt for clip ViT-B-32: .*local file"):
        build(sizes={}, model_type="ViT-B-32", pretrained="nowhere.pt")
    with pytest.raises(UserError, match=r"model\.pretrained: openai fits LAVIS's own sizes"):
        build(pretrained="openai")
    wrong = {
        "embed_dim": 16,
        "vision": {"width": 48, "layers": 2, "patch_size": 8, "image_size": 30},
        "text": {"width": 33, "heads": 2, "layers": 2, "vocab_size": 100},
    }
    with pytest.raises(UserError) as error:
        build(sizes=wrong)
    fields = [re.match(r"[\w.]+", line).group() for line in error.value.faults]
    names = ("vision.width", "vision.image_size", "text.width", "text.vocab_size")
    assert fields == [f"model.sizes.{name}" for name in names]
    with pytest.raises(UserError, match=r"model\.sizes\.vision\.depth: unknown key"):
        build(sizes={**SIZES, "vision": {"depth": 3}})


def test_options_stay_with_the_adapter():
    assert build(quick_gelu=True).options == ClipOptions(quick_gelu=True, sizes=SIZES)
