"""What holds for ALBEF and BLIP alike."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.med import XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.matching.adapters.vocabulary import local_vocabulary
from lavis_dcd.matching.features import TextFeatures
from lavis_dcd.matching.recompute import match_recomputed

TRAINED = ["albef_retrieval", "blip_retrieval"]
ALL = [*TRAINED, "blip_image_text_matching"]
PAIRS = torch.tensor([[0, 0], [2, 1], [1, 2], [0, 2], [2, 3], [0, 0]])


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_encoders_run_once_per_item_and_never_in_match(tiny, arch, pictures, captions):
    adapter = tiny(arch)
    rows: dict[str, int] = {"vision": 0, "words": 0}

    def count(name):
        return lambda module, inputs, kwargs, output: rows.__setitem__(name, rows[name] + len(output))

    adapter.model.visual_encoder.patch_embed.register_forward_hook(count("vision"), with_kwargs=True)
    adapter.model.text_encoder.embeddings.register_forward_hook(count("words"), with_kwargs=True)
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions)
    encoded = dict(rows)
    adapter.match(images, texts, PAIRS)
    assert encoded["vision"] == len(pictures)
    assert rows == encoded


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("score", ["log_odds", "lavis"])
@torch.no_grad()
def test_padding_of_a_batch_changes_no_score(tiny, arch, score, pictures, captions):
    adapter = tiny(arch, score=score)
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions)
    together = adapter.match(images, texts, PAIRS)
    for (image, text), expected in zip(PAIRS.tolist(), together, strict=True):
        alone = adapter.match(images, adapter.encode_texts([captions[text]]), torch.tensor([[image, 0]]))
        torch.testing.assert_close(alone[0], expected, atol=1e-5, rtol=1e-5)
    padded = TextFeatures.cat([texts, TextFeatures(torch.full((1, 30, 32), 9.0), torch.ones(1, 30, dtype=torch.bool),
                                                   torch.zeros(1, 16))])  # fmt: skip
    torch.testing.assert_close(adapter.match(images, padded, PAIRS), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_chunks_change_no_score(tiny, arch, pictures, captions):
    whole = tiny(arch, shortcuts=False)
    images, texts = whole.encode_images(pictures), whole.encode_texts(captions)
    expected = whole.match(images, texts, PAIRS)
    per_pair = whole.bytes_per_pair(images.tokens.shape[1], texts.tokens.shape[1])
    for pairs_per_chunk in (1, 4):
        calls = []
        whole.options.match_memory_mb = pairs_per_chunk * per_pair / 2**20
        hook = whole.model.itm_head.register_forward_hook(lambda m, inputs, out, seen=calls: seen.append(len(out)))
        torch.testing.assert_close(whole.match(images, texts, PAIRS), expected, atol=1e-5, rtol=1e-5)
        hook.remove()
        assert max(calls) == pairs_per_chunk
        assert sum(calls) == len(PAIRS)


@pytest.mark.parametrize("arch", ALL)
def test_no_pairs_no_scores(tiny, arch, pictures, captions):
    adapter = tiny(arch)
    scores = adapter.match(adapter.encode_images(pictures), adapter.encode_texts(captions), PAIRS[:0])
    assert scores.shape == (0,)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("arch", ALL)
def test_gradients_reach_encoders_and_head_chunked_or_not(tiny, arch, pictures, captions):
    adapter = tiny(arch, score="lavis").double()  # else the order of sums shows
    weights = torch.linspace(-1, 1, len(PAIRS))
    gradients = []
    for chunk in (None, 2):
        adapter.zero_grad()
        images, texts = adapter.encode_images(pictures.double()), adapter.encode_texts(captions)
        (match_recomputed(adapter.match, images, texts, PAIRS, chunk) * weights).sum().backward()
        model = adapter.model
        parts = [model.visual_encoder.patch_embed.proj, model.itm_head, model.vision_proj, model.text_proj,
                 model.text_encoder.embeddings.word_embeddings,
                 model.text_encoder.encoder.layer[-1].crossattention.self.key]  # fmt: skip
        gradients.append([part.weight.grad.clone() for part in parts])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_features_kept_in_half_precision_score_alike(tiny, arch, pictures, captions):
    adapter = tiny(arch, score="lavis")
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions)
    kept = images.to(dtype=torch.float16)
    scores = adapter.match(images, texts, PAIRS)
    half = adapter.match(kept, texts.to(dtype=torch.float16), PAIRS)
    assert half.dtype == torch.float32
    assert (half - scores).abs().max() < 0.02 * (scores.max() - scores.min())


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_joint_space_is_of_unit_vectors(tiny, arch, pictures, captions):
    adapter = tiny(arch)
    for embeds in (adapter.embed_images(adapter.encode_images(pictures)),
                   adapter.embed_texts(adapter.encode_texts(captions))):  # fmt: skip
        assert embeds.shape[1] == 16
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TRAINED)
def test_own_loss_is_lavis_forward_and_trains(tiny, arch, pictures, captions):
    adapter = tiny(arch)
    samples = {"image": pictures[[0, 1, 2, 0]], "text_input": captions, "image_id": torch.tensor([3, 4, 5, 3])}
    torch.manual_seed(2)
    losses = adapter(samples)
    other = tiny(arch)
    torch.manual_seed(2)
    direct = other.model({**samples, "epoch": 0, "iters": 0, "num_iters_per_epoch": 1})
    for key in ("loss", "loss_itc", "loss_itm"):
        torch.testing.assert_close(losses[key], direct[key])
        assert losses[key].ndim == 0
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=2e-3)
    adapter.train()
    seen = []
    for _ in range(40):
        loss = adapter.own_loss(samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-5:]) < sum(seen[:5])


@pytest.mark.parametrize("arch", TRAINED)
def test_own_loss_refuses_batches_that_lavis_crashes_on(tiny, arch, pictures, captions):
    samples = {"image": pictures, "text_input": captions[:3], "image_id": torch.tensor([7, 7, 7])}
    with pytest.raises(UserError, match=r"one picture only; raise run.batch_size_train"):
        tiny(arch).own_loss(samples)
    samples["image_id"] = torch.tensor([7, 8, 9])
    with pytest.raises(UserError, match=r"model.queue_size: 8 is no multiple of the 3 samples"):
        tiny(arch).own_loss(samples)
    features = tiny(arch).encode_images(pictures)
    with pytest.raises(UserError, match=r"run.cache_features: off"):
        tiny(arch).own_loss({**samples, "image": features})


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_a_file_of_ours_is_read_by_lavis_and_by_the_adapter(tiny, arch, pictures, captions, tmp_path):
    adapter = tiny(arch)
    path = tmp_path / "student.pth"
    saved = adapter.checkpoint()
    torch.save(saved, path)
    assert saved["arch"] == arch
    json.dumps(saved["config"])
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions)
    expected = adapter.match(images, texts, PAIRS)

    fresh = tiny(arch, seed=1)
    assert not torch.allclose(fresh.match(images, texts, PAIRS), expected, atol=1e-3)
    message = fresh.model.load_checkpoint(str(path))
    assert not message.missing_keys
    assert not message.unexpected_keys
    again = tiny(arch, seed=2, finetuned=str(path))
    for reader in (fresh, again):
        scores = reader.match(reader.encode_images(pictures), reader.encode_texts(captions), PAIRS)
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("arch", TRAINED)
@pytest.mark.parametrize("key", ["finetuned", "pretrained"])
def test_momentum_copies_that_a_file_lacks_start_from_its_weights(tiny, arch, key, tmp_path):
    state = tiny(arch).model.state_dict()
    path = tmp_path / "model.pth"
    # LAVIS's own reading of a pre-trained BLIP insists on the ViT's copy
    absent = ("text_encoder_m.", "vision_proj_m.", "text_proj_m.")
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith(absent)}}, path)
    model = tiny(arch, seed=3, **{key: str(path)}).model
    torch.testing.assert_close(model.vision_proj_m.weight, state["vision_proj.weight"])
    torch.testing.assert_close(model.text_encoder_m.embeddings.word_embeddings.weight,
                               state["text_encoder.embeddings.word_embeddings.weight"])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", TRAINED)
def test_built_from_lavis_own_files_it_has_lavis_own_settings(arch, vocabulary, monkeypatch):
    """``from_config`` of LAVIS and ``build`` of ours read the same keys and defaults, type file by type file."""
    model_class, adapter = registry.get_model_class(arch), adapter_for(arch)
    tiny_vision = VisionTransformerEncoder(img_size=32, embed_dim=24, depth=1, num_heads=2)
    tiny_vision.vision_width = 24
    seen: list[dict] = []

    def constructed(self, **arguments):
        seen.append({k: v for k, v in arguments.items() if not k.endswith("_encoder")})
        seen[-1]["text"] = arguments["text_encoder"].config.to_dict()
        seen[-1]["vision"] = arguments["image_encoder"].vision_width
        torch.nn.Module.__init__(self)
        self.queue_ptr = torch.zeros(1)

    defaults = {"queue_size": 0}
    defaults |= {"temp": 0.07, "use_distill": True} if arch.startswith("albef") else {"negative_all_rank": False}
    defaults |= {"embed_dim": 256, "momentum": 0.995, "alpha": 0.4}
    defaults |= {"max_txt_len": 30 if arch.startswith("albef") else 35}
    for name in model_class.PRETRAINED_MODEL_CONFIG_DICT:
        section = OmegaConf.load(model_class.default_config_path(name)).model
        with monkeypatch.context() as patch, local_vocabulary(str(vocabulary), "x"):
            patch.setattr(VisionTransformerEncoder, "from_config", lambda cfg, from_pretrained=False: tiny_vision)
            patch.setattr(XBertEncoder, "init_weights", lambda self: None)
            constructed.__signature__ = inspect.signature(model_class.__init__)
            patch.setattr(model_class, "__init__", constructed)
            patch.setattr(model_class, "load_checkpoint_from_config", lambda self, cfg: None)
            model_class.from_config(section)
            adapter.build(model_class, section, adapter.read_options(section, "model"))
        lavis, ours = seen[-2:]
        assert {**defaults, **ours} == {**defaults, **lavis}


def test_options_that_cannot_work_are_refused(tiny, tiny_section, pictures):
    text = tiny_section("albef_retrieval")["sizes"]["text"]
    vision = tiny_section("albef_retrieval")["sizes"]["vision"]
    blip_text = tiny_section("blip_retrieval")["sizes"]["text"]

    def refused(match: str, arch: str = "albef_retrieval", **overrides):
        with pytest.raises(UserError, match=match):
            tiny(arch, **overrides)

    refused("model.score: 'odds' is not one of log_odds, lavis", score="odds")
    refused(r"model.sizes.vision.dept: unknown key; did you mean depth", sizes={"vision": {"dept": 1}, "text": text})
    refused(r"sizes.text.hiden_size: unknown key; did you mean hidden_size",
            sizes={"vision": vision, "text": {"hiden_size": 32}})  # fmt: skip
    refused("embed_dim 24 is no multiple of num_heads 5", sizes={"vision": {**vision, "num_heads": 5}, "text": text})
    refused("not a multiple of the number of attention heads",
            sizes={"vision": vision, "text": {**text, "num_attention_heads": 5}})  # fmt: skip
    refused("with fusion_layer 4 none of the 4 layers fuses",
            sizes={"vision": vision, "text": {**text, "fusion_layer": 4}})  # fmt: skip
    refused("model.tokenizer: the vocabulary has 22 ids, special ones included, the text encoder 21; "
            "set model.sizes.text.vocab_size to 22", "blip_retrieval",
            sizes={"vision": vision, "text": {**blip_text, "vocab_size": 21}})  # fmt: skip
    refused("med_config_path: its encoder_width is 99, the ViT gives 24",
            sizes={"vision": vision, "text": {**text, "encoder_width": 99}})  # fmt: skip
    refused("max_txt_len: 50 tokens, the text encoder has 40 positions", max_txt_len=50)
    refused("captions are cut to 2 tokens, which leaves no word", scoring_txt_len=2)
    refused("med_config_path: no file", med_config_path="configs/models/absent.json")
    with pytest.raises(UserError, match="takes pictures of 32x32, got 64x64"):
        tiny("albef_retrieval").encode_images(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_long_captions_are_cut_where_the_options_say(tiny, arch):
    caption = "a dog runs on the grass " * 10
    assert tiny(arch).encode_texts([caption]).tokens.shape[1] == 20
    assert tiny(arch, scoring_txt_len=35).encode_texts([caption]).tokens.shape[1] == 35
