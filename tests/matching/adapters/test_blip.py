"""BLIP's scores against LAVIS's own ways of scoring."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError

PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(4))


@torch.no_grad()
def test_log_odds_are_those_of_its_itm_forward(tiny, pictures, captions):
    adapter = tiny("blip_image_text_matching")
    scores = adapter.match(adapter.encode_images(pictures), adapter.encode_texts(captions), PAIRS)
    samples = {"image": pictures[PAIRS[:, 0]], "text_input": [captions[t] for t in PAIRS[:, 1]]}
    own = adapter.model(samples, match_head="itm").softmax(dim=1)[:, 1]
    assert own.std() > 0.05
    torch.testing.assert_close(scores.sigmoid(), own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_joint_scores_are_its_itc_forward(tiny, pictures, captions):
    adapter = tiny("blip_image_text_matching")
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions)
    joint = adapter.joint_scores(adapter.embed_images(images), adapter.embed_texts(texts))
    own = adapter.model({"image": pictures, "text_input": captions}, match_head="itc")
    torch.testing.assert_close(joint, own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_lavis_score_is_match_logit_plus_cosine(tiny, pictures, captions):
    adapter = tiny("blip_image_text_matching", score="lavis")
    scores = adapter.match(adapter.encode_images(pictures), adapter.encode_texts(captions), PAIRS)
    samples = {"image": pictures[PAIRS[:, 0]], "text_input": [captions[t] for t in PAIRS[:, 1]]}
    logits = adapter.model(samples, match_head="itm")[:, 1]
    cosines = adapter.model(samples, match_head="itc").diagonal()
    torch.testing.assert_close(scores, logits + cosines, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_lavis_score_of_blip_retrieval_is_what_its_evaluation_ranks_by(tiny, pictures, captions):
    adapter = tiny("blip_retrieval", score="lavis", max_txt_len=35)
    images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions[:3])
    scores = adapter.match_all(images, texts)

    class Loader(list):
        dataset = SimpleNamespace(text=captions[:3], image=[0, 1, 2])

    loader = Loader([{"image": pictures[:2]}, {"image": pictures[2:]}])
    i2t, t2i = adapter.model.compute_sim_matrix(loader, OmegaConf.create({"k_test": 3}))
    torch.testing.assert_close(torch.from_numpy(i2t), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(t2i), scores.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_begin_with_the_enc_token(tiny, captions):
    adapter = tiny("blip_retrieval")
    embeddings = adapter.model.text_encoder.embeddings
    first = embeddings(input_ids=torch.tensor([[adapter.model.tokenizer.enc_token_id]]))[0, 0]
    tokens = adapter.encode_texts(captions).tokens
    assert tokens.is_floating_point()
    torch.testing.assert_close(tokens[:, 0], first.expand(len(captions), -1))


def test_every_text_layer_works_per_pair(tiny):
    adapter = tiny("blip_retrieval")
    parts = (adapter.model.text_encoder.encoder, adapter.model.itm_head)
    assert adapter.fusion_parameters() == sum(p.numel() for part in parts for p in part.parameters())


def test_with_frozen_encoders_cross_attention_and_head_learn(tiny, pictures, captions):
    adapter = tiny("blip_retrieval", freeze=["encoders"])
    assert adapter.encoders_frozen()
    adapter.match(adapter.encode_images(pictures), adapter.encode_texts(captions), PAIRS).sum().backward()
    learnt = {name for name, p in adapter.named_parameters() if p.grad is not None}
    assert "model.itm_head.weight" in learnt
    assert all("crossattention" in name for name in learnt if "itm_head" not in name)


def test_the_matching_model_has_no_loss_of_its_own(tiny, pictures, captions):
    adapter = tiny("blip_image_text_matching")
    with pytest.raises(UserError, match=r"no training loss of its own; set model.loss.student_weight: 0"):
        adapter.own_loss({"image": pictures, "text_input": captions[:3], "image_id": torch.arange(3)})


def test_retrieval_weights_serve_the_matching_model(tiny, pictures, captions, tmp_path):
    retrieval = tiny("blip_retrieval")
    path = tmp_path / "student.pth"
    torch.save(retrieval.checkpoint(), path)
    matching = tiny("blip_image_text_matching", seed=1, finetuned=str(path))
    with torch.no_grad():
        scores = [a.match_all(a.encode_images(pictures), a.encode_texts(captions)) for a in (retrieval, matching)]
    torch.testing.assert_close(scores[0], scores[1])


def test_a_loaded_queue_starts_anew(tiny, tmp_path):
    model = tiny("blip_retrieval")
    model.model.queue_ptr[0] = 4
    torch.save(model.checkpoint(), tmp_path / "student.pth")
    assert int(tiny("blip_retrieval", finetuned=str(tmp_path / "student.pth")).model.queue_ptr) == 0


def test_all_rank_negatives_need_a_distributed_run(tiny, pictures, captions):
    adapter = tiny("blip_retrieval", negative_all_rank=True, queue_size=6)
    with pytest.raises(UserError, match=r"model.negative_all_rank: true needs a distributed run"):
        adapter.own_loss({"image": pictures, "text_input": captions[:3], "image_id": torch.arange(3)})
