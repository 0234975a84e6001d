"""BLIP-2's Q-Former through its adapter against LAVIS's own class, put together from small parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from omegaconf import OmegaConf
from torch import distributed, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.blip2 import Blip2Adapter
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.building import build_matcher

SIZES = {
    "image_size": 32,
    "patch_size": 16,
    "vision": {"width": 24, "layers": 2, "heads": 2},
    "qformer": {"width": 32, "layers": 3, "heads": 2},
    "num_query_token": 4,
    "embed_dim": 8,
    "max_txt_len": 12,
}
TEXTS = ["a dog runs on the grass", "a red car", "two cat sleeps in the blue car on the street in the red grass", ""]
EVERY = torch.cartesian_prod(torch.arange(3), torch.arange(4))


def build(vocabulary: Path, model_class: type = Blip2ITM, seed: int = 0, **section) -> Blip2Adapter:
    torch.manual_seed(seed)
    section = {"arch": "blip2_image_text_matching", "tokenizer": str(vocabulary), "sizes": SIZES, **section}
    adapter = Blip2Adapter.from_config(model_class, OmegaConf.create(section))
    if not section.get("finetuned"):
        _enlarge(adapter.model)
    return adapter.eval()


def _enlarge(model: nn.Module) -> None:
    """Weights under which a wrong score differs by more than a test's tolerance."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def blip2(vocabulary: Path) -> Blip2Adapter:
    return build(vocabulary)


def encode(adapter: Blip2Adapter) -> tuple[ImageFeatures, TextFeatures]:
    with torch.no_grad():
        return adapter.encode_images(pictures()), adapter.encode_texts(TEXTS)


@torch.no_grad()
def lavis_scores(model: nn.Module, pairs: torch.Tensor, head: str) -> torch.Tensor:
    """LAVIS's own scores, a pair at a time, as its forward without padding asks."""
    scores = []
    for image, text in pairs.tolist():
        sample = {"image": pictures()[image : image + 1], "text_input": [TEXTS[text]]}
        output = Blip2ITM.forward(model, sample, match_head=head)
        scores.append(output[0, 1] - output[0, 0] if head == "itm" else output[0, 0])
    return torch.stack(scores)


def test_it_serves_lavis_names():
    for name in ("blip2_image_text_matching", "blip2", "blip2_feature_extractor"):
        assert adapter_for(name) is Blip2Adapter
    assert Blip2Adapter.family == "fusion"


@pytest.mark.parametrize("model_class", [Blip2ITM, Blip2Qformer])
def test_match_is_lavis_matching_head_for_every_pair(vocabulary, model_class):
    adapter = build(vocabulary, model_class)
    expected = lavis_scores(adapter.model, EVERY, "itm")
    assert expected.std() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(adapter.match(*encode(adapter), EVERY), expected, atol=1e-5, rtol=1e-5)


def test_joint_scores_are_lavis_best_query(blip2):
    images, texts = encode(blip2)
    image_embeds = blip2.embed_images(images)
    assert image_embeds.shape == (3, 4, 8)
    joint = blip2.joint_scores(image_embeds, blip2.embed_texts(texts))
    expected = lavis_scores(blip2.model, EVERY, "itc").view(3, 4)
    torch.testing.assert_close(joint, expected, atol=1e-5, rtol=0)
    blip2.options.match_memory_mb = 1e-6
    torch.testing.assert_close(blip2.joint_scores(image_embeds, texts.embeds), joint)


def test_order_repeats_and_chunks_change_no_score(blip2, monkeypatch):
    features = encode(blip2)
    pairs = EVERY[torch.tensor([7, 0, 3, 7, 11, 2, 5, 4, 4])]
    with torch.no_grad():
        whole = blip2.match(*features, EVERY).view(3, 4)[pairs[:, 0], pairs[:, 1]]
        torch.testing.assert_close(blip2.match(*features, pairs), whole, atol=1e-5, rtol=1e-5)
        blip2.options.match_memory_mb = 1e-6
        torch.testing.assert_close(blip2.match(*features, pairs), whole, atol=1e-5, rtol=1e-5)
        assert blip2.match(*features, pairs[:0]).shape == (0,)


def test_padding_changes_nothing(blip2):
    images, texts = encode(blip2)
    with torch.no_grad():
        short = blip2.encode_texts([TEXTS[1]])
        torch.testing.assert_close(short.embeds[0], texts.embeds[1], atol=1e-5, rtol=1e-5)
        alone = blip2.match(images, short, torch.tensor([[0, 0], [2, 0]]))
        padded = blip2.match(images, texts, torch.tensor([[0, 1], [2, 1]]))
        longer = TextFeatures.cat([short, texts])
        again = blip2.match(images, longer, torch.tensor([[0, 0], [2, 0], [1, 3]]))[:2]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, again, atol=1e-5, rtol=1e-5)


def test_encoders_and_projections_run_once_per_item(blip2):
    calls = {"vit": [], "key": []}
    projection = blip2.bert.encoder.layer[2].crossattention.self.key
    blip2.model.visual_encoder.register_forward_hook(lambda m, i, o: calls["vit"].append(len(o)))
    projection.register_forward_hook(lambda m, i, o: calls["key"].append(len(o)))
    features = encode(blip2)
    assert calls == {"vit": [3], "key": [3]}
    before = len(projection._forward_hooks)
    with torch.no_grad():
        blip2.match(*features, EVERY[torch.tensor([0, 11, 1, 2, 3])])
    # two distinct pictures in five pairs; hooks of the adapter run after this test's own
    assert calls == {"vit": [3], "key": [3, 2]}
    assert len(projection._forward_hooks) == before


def test_hooks_are_gone_after_an_error(blip2):
    images, texts = encode(blip2)
    broken = TextFeatures(texts.tokens[..., :-1], texts.mask, texts.embeds)
    with pytest.raises(RuntimeError):
        blip2.match(images, broken, EVERY)
    assert not blip2.bert.encoder.layer[0].crossattention.self.value._forward_hooks


def test_gradients_equal_those_of_lavis(vocabulary):
    adapter = build(vocabulary, freeze_vit=False)
    model, pairs = adapter.model, torch.tensor([[1, 0], [1, 1], [0, 0]])
    adapter.match(adapter.encode_images(pictures()), adapter.encode_texts(TEXTS), pairs).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for image, text in pairs.tolist():
        logits = model({"image": pictures()[image : image + 1], "text_input": [TEXTS[text]]}, match_head="itm")
        (logits[0, 1] - logits[0, 0]).backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    needed = {name for name, grad in theirs.items() if grad.abs().max() > 1e-6}
    assert "visual_encoder.patch_embed.proj.weight" in needed
    assert "query_tokens" in needed
    assert "Qformer.bert.encoder.layer.2.crossattention.self.key.weight" in needed
    for name in needed:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=2e-3, msg=name)


def test_features_survive_half_precision(blip2):
    images, texts = encode(blip2)
    with torch.no_grad():
        expected = blip2.match(images, texts, EVERY)
        scores = blip2.match(*(rows.to(dtype=torch.float16) for rows in (images, texts)), EVERY)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.05, rtol=0.05)


class _TinyVit(nn.Module):
    """Not one of LAVIS's: it has ``num_features`` and gives tokens, no more."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(48, 12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(images), -1, 48)
        return self.proj(patches)


def test_any_visual_encoder_of_the_real_class_serves(vocabulary):
    torch.manual_seed(1)
    model = Blip2ITM.__new__(Blip2ITM)
    nn.Module.__init__(model)
    model.tokenizer, model.max_txt_len = build(vocabulary).model.tokenizer, 12
    model.visual_encoder, model.ln_vision = _TinyVit(), nn.LayerNorm(12)
    config = BertConfig(
        vocab_size=len(model.tokenizer),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=20,
    )
    config.encoder_width, config.add_cross_attention, config.cross_attention_freq = 12, True, 2
    config.query_length = 5
    model.Qformer, model.query_tokens = BertLMHeadModel(config), nn.Parameter(torch.randn(1, 5, 16))
    model.vision_proj, model.text_proj, model.itm_head = nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(16, 2)
    model.temp = nn.Parameter(torch.tensor(0.07))
    _enlarge(model)
    adapter = Blip2Adapter(model).eval()
    with torch.no_grad():
        scores = adapter.match(*encode(adapter), EVERY)
    torch.testing.assert_close(scores, lavis_scores(model, EVERY, "itm"), atol=1e-5, rtol=1e-5)


def test_a_half_precision_vit_widens_on_a_cpu(blip2):
    expected = encode(blip2)[0]
    blip2.model.visual_encoder.half()
    widened = encode(blip2)[0]
    assert widened.tokens.dtype == torch.float32
    torch.testing.assert_close(widened.tokens, expected.tokens, atol=0.05, rtol=0.05)


def test_pictures_of_another_size_are_refused(blip2):
    with pytest.raises(UserError, match=r"\(16, 16\) pixels.*image_size to 32"):
        blip2.encode_images(torch.zeros(1, 3, 16, 16))


# -- what learns --------------------------------------------------------------------------------------------------


def test_the_vit_is_frozen_as_lavis_freezes_it(vocabulary):
    adapter = build(vocabulary).train()
    assert not any(p.requires_grad for p in adapter.model.visual_encoder.parameters())
    assert not adapter.model.visual_encoder.training
    assert adapter.model.Qformer.training
    assert not adapter.encoders_frozen()
    assert build(vocabulary, freeze_vit=False).train().model.visual_encoder.training


def test_frozen_encoders_include_the_queries(vocabulary):
    adapter = build(vocabulary, freeze=["encoders"])
    assert adapter.encoders_frozen()
    adapter.model.query_tokens.requires_grad_(True)
    assert not adapter.encoders_frozen()


def test_encoders_are_told_apart_by_their_queries(vocabulary):
    first, again = build(vocabulary, freeze=["encoders"]), build(vocabulary, freeze=["encoders"])
    assert first.shares_encoders_with(again)
    other = build(vocabulary, freeze=["encoders"])
    with torch.no_grad():
        other.model.query_tokens[0, 0, 0] += 1
    assert not first.shares_encoders_with(other)


def test_fusion_parameters_are_the_qformers_layers_and_the_head(blip2):
    layers = sum(p.numel() for p in blip2.model.Qformer.bert.encoder.parameters())
    assert blip2.fusion_parameters() == layers + 2 * 32 + 2


# -- files and sections -------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_again(vocabulary, tmp_path):
    first = build(vocabulary)
    file = tmp_path / "student.pth"
    torch.save(first.checkpoint(), file)
    again = build(vocabulary, seed=1, finetuned=str(file))
    with torch.no_grad():
        torch.testing.assert_close(again.match(*encode(again), EVERY), first.match(*encode(first), EVERY))


@pytest.mark.parametrize("part", ["itm_head", "Qformer.bert", "visual_encoder"])
def test_a_file_without_an_inference_weight_is_refused(vocabulary, tmp_path, part):
    weights = build(vocabulary).model.state_dict()
    file = tmp_path / "half.pth"
    torch.save({"model": {k: v for k, v in weights.items() if not k.startswith(part)}}, file)
    with pytest.raises(UserError, match=rf"half\.pth leaves \d+ weights.*first {part}"):
        build(vocabulary, finetuned=str(file))


def test_a_file_may_lack_what_scoring_does_not_use(vocabulary, tmp_path):
    weights = build(vocabulary).model.state_dict()
    file = tmp_path / "itm.pth"
    torch.save({"model": {k: v for k, v in weights.items() if not k.startswith(("Qformer.cls", "temp"))}}, file)
    again = build(vocabulary, seed=1, finetuned=str(file))
    torch.testing.assert_close(again.model.itm_head.weight, weights["itm_head.weight"])


class _Large(Blip2ITM):
    """Stands for LAVIS's constructor, which would fetch EVA's ViT and BERT."""

    made: Blip2ITM

    @classmethod
    def from_config(cls, cfg):
        cls.made.load_checkpoint_from_config(cfg)
        return cls.made


def test_lavis_builds_and_the_adapter_looks_at_what_was_loaded(vocabulary, tmp_path):
    made = build(vocabulary).model
    made.__class__ = _Large
    _Large.made = made
    weights = made.state_dict()
    complete = {k: v + 1 for k, v in weights.items() if v.is_floating_point() and not k.startswith("visual_encoder.")}
    torch.save({"model": complete}, tmp_path / "frozen_vit.pth")
    torch.save({"model": {k: v for k, v in complete.items() if k != "itm_head.bias"}}, tmp_path / "half.pth")
    section = {"arch": "blip2_image_text_matching", "finetuned": str(tmp_path / "frozen_vit.pth")}
    # LAVIS leaves a frozen ViT out of its files: its weights came with EVA's
    adapter = Blip2Adapter.from_config(_Large, OmegaConf.create(section))
    torch.testing.assert_close(adapter.model.temp, torch.tensor(1.07))
    section["finetuned"] = str(tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"half\.pth leaves 1 weights.*itm_head\.bias"):
        Blip2Adapter.from_config(_Large, OmegaConf.create(section))


def test_without_network_the_message_says_what_is_missing(monkeypatch, vocabulary):
    def unreachable(*args):
        raise OSError("<urlopen error: no route to eva_vit_g.pth>")

    monkeypatch.setattr(Blip2ITM, "init_vision_encoder", unreachable)
    section = {"arch": "blip2_image_text_matching", "tokenizer": str(vocabulary), "num_query_token": 4}
    with pytest.raises(UserError, match=r"Blip2ITM cannot be built: .*eva_vit_g.*model\.sizes and model\.tokenizer"):
        Blip2Adapter.from_config(Blip2ITM, OmegaConf.create(section))


def test_a_blip2_without_matching_head_is_refused():
    with pytest.raises(UserError, match=r"model\.arch: Module has no image-text matching head.*choose blip2"):
        Blip2Adapter.from_config(nn.Module, OmegaConf.create({"arch": "blip2_opt", "sizes": SIZES}))
    with pytest.raises(UserError, match="Linear has no image-text matching head"):
        Blip2Adapter(nn.Linear(1, 1))


def test_lavis_type_in_small_through_its_own_name(vocabulary):
    section = {"arch": "blip2_image_text_matching", "model_type": "coco", "finetuned": None, "pretrained": None,
               "tokenizer": str(vocabulary), "sizes": SIZES}  # fmt: skip
    adapter = build_matcher(section, "model.teacher")
    assert type(adapter.model) is Blip2ITM
    assert adapter.model.visual_encoder.patch_embed.proj.weight.requires_grad  # as the type's freeze_vit says


def test_sizes_that_cannot_work(vocabulary):
    wrong = {**SIZES, "image_size": 30, "vision": {"width": 25, "layers": 1, "heads": 2}}
    with pytest.raises(UserError) as error:
        build(vocabulary, sizes=wrong)
    assert [line.split(":")[0] for line in error.value.faults] == ["model.sizes.image_size", "model.sizes.vision.width"]
    with pytest.raises(UserError, match=r"model\.sizes\.depth: unknown key"):
        build(vocabulary, sizes={**SIZES, "depth": 1})


# -- the model's own loss -----------------------------------------------------------------------------------------


def test_own_loss_is_refused_where_there_is_none(vocabulary):
    samples = {"image": pictures(), "text_input": TEXTS[:3]}
    with pytest.raises(UserError, match=r"Blip2ITM has no training loss.*model\.loss\.student_weight: 0"):
        build(vocabulary).own_loss(samples)
    with pytest.raises(UserError, match=r"Blip2Qformer's own loss asks for a process group"):
        build(vocabulary, Blip2Qformer).own_loss(samples)


def test_own_loss_of_blip2_is_lavis_pre_training_loss(vocabulary):
    adapter = build(vocabulary, Blip2Qformer)
    samples = {"image": pictures(), "text_input": TEXTS[:3]}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        expected = adapter.model(samples)
        torch.manual_seed(0)
        losses = adapter(samples)
        torch.manual_seed(0)
        torch.testing.assert_close(adapter.own_loss(samples), expected.loss)
    finally:
        distributed.destroy_process_group()
    assert set(losses) == {"loss", "loss_itc", "loss_itm", "loss_lm"}
    losses["loss"].backward()
    assert adapter.model.query_tokens.grad.abs().sum() > 0
