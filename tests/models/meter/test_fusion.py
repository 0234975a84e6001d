"""The joint head's poolings, and a fusion that starts from the text tower's layers."""

import pytest
import torch
from torch.nn import functional as nnf

from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.meter import MeterRetrieval
from lavis_dcd.models.meter.config import JointHeadConfig
from lavis_dcd.models.meter.fusion import JointHead
from lavis_dcd.models.pooling import POOLINGS

SECTION = {
    "vision": {"image_size": 8, "patch_size": 4, "width": 6, "layers": 1, "heads": 2},
    "text": {
        "family": "bert",
        "name": "asset:quickstart/vocab.txt",
        "config": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
                   "intermediate_size": 32, "max_position_embeddings": 40},
    },
    "fusion": {"width": 8, "layers": 2, "heads": 2, "init_from_text": True},
}  # fmt: skip


def texts_of(width: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(0)
    return TextFeatures(
        torch.randn(4, 5, width, generator=generator), torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(POOLINGS))
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_joint_head_projects_the_pooled_real_tokens(kind, side):
    torch.manual_seed(0)
    head = JointHead(6, 6, JointHeadConfig(dim=3, hidden=5, pooling_heads=2, **{f"{side}_pooling": kind})).eval()
    features = texts_of(6)
    found = head.embed_texts(features) if side == "text" else head.embed_images(ImageFeatures(*vars(features).values()))
    pooling = getattr(head, f"{side}_pooling")
    for row, mask, vector in zip(features.tokens, features.mask, found, strict=True):
        real = row[mask][None]
        pooled = real.mean(dim=1) if kind == "mean" else pooling(real, None)
        torch.testing.assert_close(vector, nnf.normalize(getattr(head, side)(pooled), dim=-1)[0])


def test_pooling_by_name_adds_nothing_to_a_mean_head():
    plain = JointHead(6, 6, JointHeadConfig(dim=3, hidden=5))
    assert not any("pooling" in name for name in plain.state_dict())


@torch.no_grad()
def test_a_joint_head_drops_tokens_in_training_alone():
    torch.manual_seed(0)
    head = JointHead(6, 6, JointHeadConfig(dim=3, hidden=5, dropout=0.5, text_pooling="attention_mean"))
    head.dropout.forward = lambda t: t  # of the pooled vector; of the tokens, the rate counts
    for layer in head.text:
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    features = texts_of(6)
    still = head.eval().embed_texts(features)
    noisy = head.train().embed_texts(features)
    assert torch.equal(head.eval().embed_texts(features), still)
    assert not torch.allclose(noisy[0], still[0], atol=1e-4)
    torch.testing.assert_close(noisy[2], still[2])  # its only token stays


@torch.no_grad()
def test_a_fusion_from_the_text_tower_reads_its_tokens_and_works_as_its_last_layers():
    torch.manual_seed(0)
    model = MeterRetrieval.from_config(SECTION).eval()
    texts = texts_of(8)
    projected = model._project_texts(texts)
    torch.testing.assert_close(projected, texts.tokens)
    pictures = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
    fused = model.fuse(model._project_images(ImageFeatures(pictures)), projected, texts.mask)[0]
    # the pictures add nothing yet: each text goes through the donors as through an encoder, but for one more norm a
    # layer, after the cross-attention
    hidden = texts.tokens
    bias = torch.where(texts.mask, 0.0, -1e9)[:, None, None]
    for layer, donor in zip(model.cross_modal_text_layers, model.text_tower.model.encoder.layer[-2:], strict=True):
        attended = donor.attention(hidden, attention_mask=bias)[0]
        normed = layer.crossattention.output.LayerNorm(attended)
        hidden = donor.output(donor.intermediate(normed), normed)
    torch.testing.assert_close(fused[texts.mask], hidden[texts.mask], atol=1e-5, rtol=1e-5)
