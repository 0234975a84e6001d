"""METER's shortcuts against its reference path (every layer in full, by ``transformers``), values and gradients."""

import copy
import dataclasses
import shutil

import pytest
import torch
from torch import nn

from lavis_dcd.matching.attention import Shortcuts
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.meter import MeterRetrieval

SINGLE = [
    dataclasses.replace(Shortcuts.none(), **{field.name: True}) for field in dataclasses.fields(Shortcuts)
]  # fmt: skip
LAYOUTS = {
    "one picture": torch.stack([torch.zeros(20, dtype=torch.long), torch.arange(20) % 5], dim=1),
    "one text": torch.stack([torch.arange(20) % 4, torch.full((20,), 3)], dim=1),
    "all pairs": torch.cartesian_prod(torch.arange(4), torch.arange(5)),
    "shuffled, repeated": torch.tensor([[3, 1], [0, 4], [3, 1], [1, 0], [2, 2], [0, 0]]),
    "one pair": torch.tensor([[2, 3]]),
}


def model_of(layers=3, dropout=0.0, **fusion):
    torch.manual_seed(0)
    model = MeterRetrieval.from_config({
        "arch": "meter_retrieval",
        "vision": {"image_size": 16, "patch_size": 4, "width": 24, "layers": 1, "heads": 2},
        "text": {"family": "bert", "name": "none", "config": {
            "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20,
            "vocab_size": 30}},
        "fusion": {"width": 32, "heads": 2, "layers": layers, "dropout": dropout, **fusion},
    })  # fmt: skip
    for name, p in model.named_parameters():
        if name.startswith("cross_modal") or name.startswith("rank"):
            nn.init.normal_(p, std=0.3)  # far from the small initial weights, so that every path shows in the score
    return model.double().eval()


def features(dtype=torch.double):
    torch.manual_seed(1)
    lengths = torch.tensor([2, 9, 5, 7, 3])
    mask = torch.arange(9) < lengths[:, None]
    images = ImageFeatures(torch.randn(4, 17, 24, dtype=dtype, requires_grad=True))
    return images, TextFeatures(torch.randn(5, 9, 20, dtype=dtype, requires_grad=True), mask)


def plain_scores(model, images, texts, pairs):
    """The reference path, each pair by itself."""
    scores = []
    for image, text in pairs.tolist():
        image_hidden = model._project_images(images[[image]])
        cls = model.fuse(image_hidden, model._project_texts(texts[[text]]), texts.mask[[text]])[2]
        scores.append(model.rank_output(cls)[0, 0])
    return torch.stack(scores) if scores else torch.zeros(0)


def outcome(model, score, pairs, backward=torch.autograd.grad):
    images, texts = features()
    scores = score(images, texts, pairs)
    learned = [images.tokens, texts.tokens, *(p for n, p in model.named_parameters() if "tower" not in n)]
    direction = torch.linspace(-1, 1, len(scores)) if len(scores) > 1 else torch.ones(len(scores))
    gradients = torch.autograd.grad((scores * direction).sum(), learned, allow_unused=True)
    return scores, [torch.zeros(()) if g is None else g for g in gradients]


def assert_same(found, expected):
    """The models compared are in float64, so that rounding hides nothing; scores come out in float32."""
    torch.testing.assert_close(found[0], expected[0].float(), rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        assert float((a - b).abs().max()) <= 1e-8 + 1e-6 * float(b.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_all_shortcuts_give_the_reference_paths_scores_and_gradients(layout, layers):
    model = model_of(layers)
    assert model.shortcuts == Shortcuts()
    pairs = LAYOUTS[layout]
    expected = outcome(model, lambda *a: plain_scores(model, *a), pairs)
    assert float(expected[0].detach().std() if len(pairs) > 1 else 1) > 0.003
    assert_same(outcome(model, model.match, pairs), expected)


@torch.no_grad()
def test_no_pairs_have_no_scores():
    assert model_of().match(*features(), torch.zeros(0, 2, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("shortcuts", [Shortcuts.none(), *SINGLE], ids=str)
def test_each_shortcut_alone_is_exact(shortcuts):
    model, pairs = model_of(), LAYOUTS["all pairs"]
    expected = outcome(model, lambda *a: plain_scores(model, *a), pairs)
    model.shortcuts = shortcuts
    assert_same(outcome(model, model.match, pairs), expected)


def test_small_chunks_give_the_same():
    model, pairs = model_of(), LAYOUTS["all pairs"]
    expected = outcome(model, model.match, pairs)
    model.config.match_memory_mb = 1e-3
    assert_same(outcome(model, model.match, pairs), expected)


def _calls(model, counted):
    """Rows that each projection of a layer sees in a match of 2 pictures with 5 captions each."""
    seen = []
    counted.register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape[:2])))
    with torch.no_grad():
        model.match(*features(), torch.cartesian_prod(torch.arange(2), torch.arange(5)))
    return seen


def test_the_first_self_attention_runs_once_per_item():
    model = model_of()
    assert _calls(model, model.cross_modal_image_layers[0].attention.self.query) == [(2, 17)]
    model = model_of()
    assert _calls(model, model.cross_modal_text_layers[0].attention.self.query) == [(5, 9)]
    model = model_of()
    assert _calls(model, model.cross_modal_text_layers[0].crossattention.self.key) == [(2, 17)]
    model = model_of(shortcuts=False)
    assert _calls(model, model.cross_modal_image_layers[0].attention.self.query) == [(10, 17)]


def test_the_last_layer_feeds_the_class_tokens_forward_alone():
    model = model_of()
    assert _calls(model, model.cross_modal_image_layers[-1].intermediate) == [(10, 1)]
    model = model_of()
    assert _calls(model, model.cross_modal_image_layers[-1].attention.self.key) == []
    model = model_of(shortcuts=False)
    assert _calls(model, model.cross_modal_image_layers[-1].intermediate) == [(10, 17)]


def _step(model, pairs, amp=False):
    model.zero_grad()
    torch.manual_seed(3)
    images, texts = features(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        scores = model.match(images, texts, pairs)
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    return scores, [images.tokens.grad, texts.tokens.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_layers_give_the_same_values_and_gradients(dropout, amp):
    pairs = LAYOUTS["all pairs"]
    kept, recomputed = (model_of(dropout=dropout, grad_checkpoint=wanted).float().train() for wanted in (False, True))
    expected, found = _step(kept, pairs, amp), _step(recomputed, pairs, amp)
    torch.testing.assert_close(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_in_training_dropout_reaches_the_scores():
    model, pairs = model_of(dropout=0.2).train(), LAYOUTS["all pairs"]
    with torch.no_grad():
        images, texts = features()
        first, second = (model.match(images, texts, pairs) for _ in range(2))
        assert not torch.allclose(first, second)
        model.eval()
        torch.testing.assert_close(model.match(*features(), pairs), model.match(*features(), pairs))


def test_a_copy_of_the_model_runs_its_own_layers():
    model, pairs = model_of(), LAYOUTS["all pairs"]
    with torch.no_grad():
        before = model.match(*features(), pairs)
        twin = copy.deepcopy(model)
        nn.init.zeros_(twin.cross_modal_image_layers[1].output.dense.weight)
        assert not torch.allclose(twin.match(*features(), pairs), before)
        torch.testing.assert_close(model.match(*features(), pairs), before)


@torch.no_grad()
def test_bfloat16_stays_near():
    model, pairs = model_of().float(), LAYOUTS["all pairs"]
    expected = model.match(*features(), pairs)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.match(*features(), pairs)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().mean())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same_scores_and_gradients():
    """With one layer, compiled once: what is compared is our use of it."""
    pairs = LAYOUTS["shuffled, repeated"]
    plain, compiled = (model_of(1, compile=wanted) for wanted in (False, True))
    assert_same(outcome(compiled, compiled.match, pairs), outcome(plain, plain.match, pairs))
    assert [type(step).__name__ for step in compiled.stack().steps] == ["OptimizedModule"]
