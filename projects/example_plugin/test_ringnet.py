"""What an adapter's own test should check. Run where the package is installed: python -m pytest test_ringnet.py"""

import pytest
import torch
from lavis.models import load_model, model_zoo

import lavis_dcd  # noqa: F401  registers what the entry points name as soon as LAVIS is imported
from lavis_dcd.common.errors import UserError
from lavis_dcd.models.building import build_matcher

TEXTS = ["a large red ring above a small blue star", "A green cross.", ""]


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, 48, 48)


@pytest.fixture
def matcher():
    torch.manual_seed(1)
    return build_matcher({"arch": "ringnet_retrieval", "model_type": "tiny"}, "model").eval()


def test_the_entry_point_registers_the_model():
    assert dict(model_zoo)["ringnet_retrieval"] == ["tiny"]


@torch.no_grad()
def test_a_pair_scores_as_the_model_scores_it(matcher, images):
    # every picture with every text, and one pair twice
    pairs = torch.tensor([[i, t] for i in range(3) for t in range(3)] + [[2, 0]])
    expected = matcher.model.score(images[pairs[:, 0]], [TEXTS[t] for t in pairs[:, 1]])
    features, texts = matcher.encode_images(images), matcher.encode_texts(TEXTS)
    torch.testing.assert_close(matcher.match(features, texts, pairs), expected)

    # in chunks of one pair; and nothing but the joint space's vectors where a text is read alone
    matcher.options.match_memory_mb = 1e-6
    torch.testing.assert_close(matcher.match(features, texts, pairs), expected)
    alone = torch.cat([matcher.embed_texts(matcher.encode_texts([text])) for text in TEXTS])
    torch.testing.assert_close(alone, matcher.embed_texts(texts))


def test_its_file_is_read_back_by_both_doors(matcher, images, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(matcher.checkpoint(), path)
    again = build_matcher({"arch": "ringnet_retrieval", "model_type": "tiny", "finetuned": str(path)}, "model")
    by_lavis = load_model("ringnet_retrieval", "tiny", is_eval=True, checkpoint=str(path))
    for model in (again.model, by_lavis):
        torch.testing.assert_close(model.score(images, TEXTS), matcher.model.score(images, TEXTS))


def test_a_file_without_the_fusion_is_refused(matcher, tmp_path):
    weights = {k: v for k, v in matcher.model.state_dict().items() if not k.startswith("fusion")}
    torch.save({"model": weights}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"4 weights that scoring needs at random, first fusion\.0\.weight"):
        matcher.load_checkpoint(str(tmp_path / "model.pth"))
