"""ALBEF's scores against LAVIS's own ways of scoring."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError

PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(4))


@torch.no_grad()
def test_lavis_score_is_what_lavis_evaluation_ranks_by(tiny, pictures, captions):
    adapter = tiny("albef_retrieval", score="lavis", scoring_txt_len=35)
    scores = adapter.match_all(adapter.encode_images(pictures), adapter.encode_texts(captions[:3]))

    class Loader(list):
        dataset = SimpleNamespace(text=captions[:3], image=[0, 1, 2])

    loader = Loader([{"image": pictures[:2]}, {"image": pictures[2:]}])
    i2t, t2i = adapter.model.compute_sim_matrix(loader, OmegaConf.create({"k_test": 3}))
    torch.testing.assert_close(torch.from_numpy(i2t), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(t2i), scores.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_log_odds_are_those_of_the_itm_head_on_token_ids(tiny, pictures, captions):
    adapter = tiny("albef_retrieval")
    model = adapter.model
    scores = adapter.match(adapter.encode_images(pictures), adapter.encode_texts(captions), PAIRS)
    text = model.tokenizer(captions, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    tokens = model.visual_encoder.forward_features(pictures)[PAIRS[:, 0]]
    output = model.text_encoder(
        text.input_ids[PAIRS[:, 1]],
        attention_mask=text.attention_mask[PAIRS[:, 1]],
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long),
        return_dict=True,
    )
    own = model.itm_head(output.last_hidden_state[:, 0]).softmax(dim=1)[:, 1]
    assert own.std() > 0.05
    torch.testing.assert_close(scores.sigmoid(), own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_joint_scores_are_the_itc_cosines_of_its_forward(tiny, pictures, captions):
    adapter = tiny("albef_retrieval", queue_size=6)
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions[:3])
    joint = adapter.joint_scores(adapter.embed_images(images), adapter.embed_texts(texts))
    samples = {"image": pictures, "text_input": captions[:3], "image_id": torch.arange(3), "epoch": 0, "iters": 0,
               "num_iters_per_epoch": 1}  # fmt: skip
    # the momentum copies still equal the model, so the first columns are the batch's own cosines over temp
    sims = adapter.model(samples).sims.sim_i2t[:, :3] * adapter.model.temp
    torch.testing.assert_close(joint, sims, atol=1e-5, rtol=1e-5)


def test_pairs_cost_the_layers_above_fusion_layer_and_the_head(tiny):
    adapter = tiny("albef_retrieval")
    layers = adapter.model.text_encoder.encoder.layer
    expected = sum(p.numel() for m in (layers[2], layers[3], adapter.model.itm_head) for p in m.parameters())
    assert adapter.fusion_parameters() == expected
    assert not hasattr(layers[1], "crossattention")
    names = adapter.head_parameter_names()
    assert "model.itm_head.weight" in names
    assert not any("layer.1." in name or "_m." in name for name in names)


def test_frozen_encoders_leave_the_fusion_to_learn(tiny, pictures, captions):
    adapter = tiny("albef_retrieval", freeze=["encoders"])
    assert adapter.encoders_frozen()
    adapter.train()
    layers = adapter.model.text_encoder.encoder.layer
    assert not layers[0].training
    assert not adapter.model.visual_encoder.training
    assert layers[2].training
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions)
    assert not images.tokens.requires_grad
    adapter.match(images, texts, PAIRS).sum().backward()
    learnt = {name for name, p in adapter.named_parameters() if p.grad is not None}
    assert learnt == adapter.head_parameter_names()


def test_equal_frozen_encoders_are_shared_whatever_the_fusion_depth(tiny, tiny_section):
    teacher = tiny("albef_retrieval", freeze=["encoders"])
    sizes = tiny_section("albef_retrieval")["sizes"]
    sizes["text"]["num_hidden_layers"] = 3
    student = tiny("albef_retrieval", seed=1, freeze=["encoders"], sizes=sizes)
    assert not student.shares_encoders_with(teacher)
    student.model.load_state_dict(teacher.model.state_dict(), strict=False)
    assert student.shares_encoders_with(teacher)
    other = tiny("albef_retrieval", freeze=["encoders"], sizes=sizes, max_txt_len=10)
    other.model.load_state_dict(teacher.model.state_dict(), strict=False)
    assert not other.shares_encoders_with(teacher)
    student.model.vision_proj.requires_grad_(True)
    assert not student.shares_encoders_with(teacher)


@pytest.mark.parametrize("key", ["visual_encoder.blocks.1.attn.qkv.weight", "itm_head.weight"])
def test_a_file_without_an_inference_weight_is_refused(tiny, key, tmp_path):
    state = tiny("albef_retrieval").model.state_dict()
    del state[key]
    path = tmp_path / "model.pth"
    torch.save({"model": state}, path)
    for field in ("finetuned", "pretrained"):
        with pytest.raises(UserError, match=rf"model.{field}: .*leaves 1 weights .* at random, first {key}"):
            tiny("albef_retrieval", **{field: str(path)})


@pytest.mark.parametrize("pointer, expected", [(-1, 0), (8, 0), (1 << 40, 0), (4, 4)])
def test_a_queue_s_place_outside_of_it_starts_anew(tiny, tmp_path, pointer, expected):
    content = tiny("albef_retrieval").checkpoint()
    content["model"]["queue_ptr"] = torch.tensor([pointer])
    torch.save(content, tmp_path / "x.pth")
    assert int(tiny("albef_retrieval", finetuned=str(tmp_path / "x.pth")).model.queue_ptr) == expected
