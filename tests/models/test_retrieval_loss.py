"""The retriever's own loss on a tiny METER: what counts as a negative, and what small batches do."""

import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models import pair_groups, retrieval_loss
from lavis_dcd.models.batch import Batch, BatchFeatures, encode_batch, info_nce
from lavis_dcd.models.meter import MeterRetrieval

SIZES = {
    "vision": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2},
    "text": {
        "family": "bert",
        "name": "asset:quickstart/vocab.txt",
        "config": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "intermediate_size": 16, "max_position_embeddings": 40},
    },
    "fusion": {"width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
}  # fmt: skip


def tiny(joint: bool, **loss) -> MeterRetrieval:
    torch.manual_seed(0)
    head = {"dim": 4, "hidden": 8, "dropout": 0.0} if joint else None
    return MeterRetrieval.from_config({**SIZES, "joint_head": head, "loss": loss})


def batch(ids: list[int]) -> dict:
    images = torch.randn(max(ids) + 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    words = ["red", "blue", "green", "small", "large", "ring"]
    return {
        "image": images[ids],
        "text_input": [f"a {words[i % 6]} {words[(i + 1) % 6]}" for i in range(len(ids))],
        "image_id": torch.tensor(ids),
    }


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 4], [0, 0, 1], [0, 0], [0]])
def test_every_batch_gives_a_finite_loss_and_gradient(joint, ids):
    model = tiny(joint, negatives=4)
    losses = model(batch(ids))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    # a picture alone has nothing to be told from
    if len(set(ids)) == 1:
        assert float(losses["fusion_loss"].detach()) == pytest.approx(0.0, abs=1e-6)


def test_fusion_loss_over_all_negatives_is_the_listwise_cross_entropy():
    model = tiny(True, negatives=3).eval()
    samples = batch([0, 1, 2, 3])
    features = encode_batch(model, Batch.of(samples))
    with torch.no_grad():
        table = model.fusion_scores(
            features.images, features.texts, torch.cartesian_prod(torch.arange(4), torch.arange(4))
        ).view(4, 4)
        target = torch.arange(4)
        expected = torch.nn.functional.cross_entropy(torch.cat([table, table.T]), torch.cat([target, target]))
        torch.testing.assert_close(model(samples)["fusion_loss"], expected)


def test_recomputed_chunks_give_the_same_gradient():
    gradients = []
    for chunk in (None, 3):
        model = tiny(True, negatives=3, grad_chunk_pairs=chunk)
        torch.manual_seed(5)
        model.eval()(batch([0, 1, 2, 3]))["loss"].backward()
        gradients.append(model.rank_output.weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_fusion_waits_for_its_start():
    model = tiny(True, fusion_start=0.5)
    assert model.find_unused_parameters
    assert "fusion_loss" not in model({**batch([0, 1, 2]), "progress": 0.2})
    assert "fusion_loss" in model({**batch([0, 1, 2]), "progress": 0.5})


def test_other_captions_of_a_picture_are_no_negatives():
    features = BatchFeatures(
        images=ImageFeatures(torch.zeros(2, 1, 1)),
        texts=TextFeatures(torch.zeros(3, 1, 1)),
        image_ids=torch.tensor([7, 8]),
        text_image_ids=torch.tensor([7, 7, 8]),
        match_pairs=torch.tensor([[0, 0], [0, 1], [1, 2]]),
    )
    logits = torch.tensor([[1.0, 50.0, 0.0], [0.0, 0.0, 2.0]])
    rows = [([1.0, 0.0], 0), ([50.0, 0.0], 0), ([2.0, 0.0, 0.0], 0)]  # caption 1 is left out of sample 0, and so on
    columns = [([1.0, 0.0], 0), ([50.0, 0.0], 0), ([2.0, 0.0], 0)]

    def mean(parts):
        return sum(-torch.tensor(s).log_softmax(0)[t] for s, t in parts) / len(parts)

    torch.testing.assert_close(info_nce(logits, features), (mean(rows) + mean(columns)) / 2)


def test_the_rebuilt_model_keeps_its_mode(tmp_path):
    other = MeterRetrieval.from_config({**SIZES, "fusion": {**SIZES["fusion"], "layers": 2}})
    torch.save(other.checkpoint(), tmp_path / "m.pth")
    model = tiny(False).eval()
    model.load_checkpoint(str(tmp_path / "m.pth"))
    assert model.config.fusion.layers == 2 and not model.training


# -- groups ----------------------------------------------------------------------------------------------------------


def test_a_group_of_the_whole_batch_gives_the_listwise_cross_entropy_of_all_pairs():
    model = tiny(True, group=4, joint_weight=0.0).eval()
    samples = batch([0, 1, 2, 3])
    features = encode_batch(model, Batch.of(samples))
    scores = model.fusion_scores(
        features.images, features.texts, torch.cartesian_prod(torch.arange(4), torch.arange(4))
    ).view(4, 4)
    expected = torch.nn.functional.cross_entropy(torch.cat([scores, scores.T]), torch.arange(4).repeat(2))
    wanted = torch.autograd.grad(expected, model.rank_output.weight)[0]
    loss = model(samples)["loss"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, model.rank_output.weight)[0], wanted)


def test_groups_equal_a_slow_sum_over_their_queries(monkeypatch):
    model = tiny(True, group=3, queries=6, joint_weight=0.0).eval()
    samples = batch([0, 1, 2, 3, 4, 4, 5])
    features = encode_batch(model, Batch.of(samples))
    drawn = []
    monkeypatch.setattr(
        retrieval_loss, "draw_groups", lambda *a: drawn.append(pair_groups.draw_groups(*a)) or drawn[-1]
    )
    torch.manual_seed(3)
    loss = model(samples)["fusion_loss"]
    image, text = features.match_pairs.unbind(1)
    terms = []
    for group in drawn[0].tolist():
        for query in group:
            for to_text in (True, False):
                candidates = [query] + [
                    s for s in group if s != query and features.image_ids[image[s]] != features.image_ids[image[query]]
                ]
                pairs = [(image[query], text[s]) if to_text else (image[s], text[query]) for s in candidates]
                scores = model.fusion_scores(features.images, features.texts, torch.tensor(pairs))
                terms.append(scores.logsumexp(0) - scores[0])
    assert len(terms) == 12
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_each_pair_of_a_group_is_scored_once(monkeypatch):
    model = tiny(True, group=3, queries=3, joint_weight=0.0)
    scored = []
    plain = model.fusion_scores
    monkeypatch.setattr(model, "fusion_scores", lambda i, t, pairs: scored.append(pairs) or plain(i, t, pairs))
    model(batch([0, 1, 2, 3, 4, 5]))
    (pairs,) = scored
    assert len(pairs) == len(pairs.unique(dim=0)) == 9


def test_with_groups_too_a_single_picture_has_nothing_to_be_told_from():
    for ids in ([0], [0, 0]):
        losses = tiny(True, group=4)(batch(ids))
        losses["loss"].backward()
        assert float(losses["fusion_loss"].detach()) == pytest.approx(0.0, abs=1e-6)


def test_a_joint_head_without_weight_gets_no_gradient_and_stays():
    model = tiny(True, joint_weight=0.0, group=2)
    assert model.find_unused_parameters
    before = {name: tensor.clone() for name, tensor in model.joint_head.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    losses = model(batch([0, 1, 2, 3]))
    losses["loss"].backward()
    optimizer.step()
    assert all(p.grad is None for p in model.joint_head.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.joint_head.state_dict().items())
    torch.testing.assert_close(losses["loss"], losses["fusion_loss"])


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match=r"model\.loss.*group: 1, at least 2"):
        tiny(True, group=1)
