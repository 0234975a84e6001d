"""ALBEF's and BLIP's shortcuts against LAVIS's own forward: the same scores and gradients, for less work."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.packed_pairs import Captions, ChunkSizes, PaddedGrid, plan_chunks
from lavis_dcd.matching.attention import Shortcuts
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.recompute import match_recomputed

ALL = ["albef_retrieval", "blip_retrieval", "blip_image_text_matching"]
NAMES = [field.name for field in fields(Shortcuts)]
LAYOUTS = {
    "one picture, all captions": [[1, 0], [1, 1], [1, 2], [1, 3]],
    "a picture each": [[2, 0], [0, 3], [1, 1]],
    "shuffled, with repeats": [[2, 0], [0, 3], [2, 3], [1, 1], [2, 0], [0, 0], [2, 2], [2, 1], [2, 0]],
    "all pairs": [[i, t] for i in range(3) for t in range(4)],
    "one pair": [[1, 2]],
}


def features(width: int = 24) -> tuple[ImageFeatures, TextFeatures]:
    """Three pictures and four ragged captions, one of a single token; leaves that ask for gradients."""
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([7, 3, 9, 1])[:, None]
    images = ImageFeatures(torch.randn(3, 5, width).double(), None, torch.randn(3, 16).double())
    texts = TextFeatures(torch.randn(4, 9, 32).double(), mask, torch.randn(4, 16).double())
    for t in (images.tokens, images.embeds, texts.tokens, texts.embeds):
        t.requires_grad_()
    return images, texts


def scores_and_gradients(adapter, images, texts, pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    adapter.zero_grad()
    leaves = {"image tokens": images.tokens, "image embeds": images.embeds, "text tokens": texts.tokens,
              "text embeds": texts.embeds}  # fmt: skip
    for leaf in leaves.values():
        leaf.grad = None
    scores = adapter.match(images, texts, pairs)
    (scores * torch.linspace(-1, 2, len(scores)).to(scores)).sum().backward()
    named = {**leaves, **dict(adapter.named_parameters())}
    zero = {name: torch.zeros_like(t) for name, t in named.items()}
    return scores.detach(), {name: zero[name] if t.grad is None else t.grad.clone() for name, t in named.items()}


def assert_same(adapter, images, texts, pairs, chosen: Shortcuts, **tolerance):
    tolerance = tolerance or {"atol": 1e-6, "rtol": 1e-6}  # scores are float32, all else double
    adapter.shortcuts = Shortcuts.none()
    scores, gradients = scores_and_gradients(adapter, images, texts, pairs)
    adapter.shortcuts = chosen
    fast_scores, fast_gradients = scores_and_gradients(adapter, images, texts, pairs)
    torch.testing.assert_close(fast_scores, scores, **tolerance)
    for name, expected in gradients.items():
        torch.testing.assert_close(fast_gradients[name], expected, msg=lambda text, n=name: f"{n}: {text}", **tolerance)
    assert gradients["text tokens"].abs().sum() > 0 and gradients["image tokens"].abs().sum() > 0


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_gradients_are_those_of_the_plain_path(tiny, arch, layout):
    adapter = tiny(arch, score="lavis").double()
    images, texts = features()
    assert_same(adapter, images, texts, torch.tensor(LAYOUTS[layout]), Shortcuts())


@pytest.mark.parametrize("arch", ["albef_retrieval", "blip_retrieval"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("only", [True, False])
def test_each_shortcut_alone_and_all_but_it(tiny, arch, name, only):
    adapter = tiny(arch).double()
    chosen = replace(Shortcuts.none() if only else Shortcuts(), **{name: only})
    images, texts = features()
    assert_same(adapter, images, texts, torch.tensor(LAYOUTS["shuffled, with repeats"]), chosen)


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_one_fusing_layer_is_first_and_last(tiny, tiny_section, name):
    sizes = tiny_section("albef_retrieval")["sizes"]
    adapter = tiny("albef_retrieval", sizes={**sizes, "text": {**sizes["text"], "fusion_layer": 3}}).double()
    chosen = Shortcuts() if name == "all" else replace(Shortcuts.none(), **{name: True})
    assert_same(adapter, *features(), torch.tensor(LAYOUTS["shuffled, with repeats"]), chosen)


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_in_float32_scores_differ_by_rounding(tiny, arch, pictures, captions):
    fast, plain = tiny(arch), tiny(arch, shortcuts=False)
    assert plain.shortcuts == Shortcuts.none()
    images, texts = fast.encode_images(pictures), fast.encode_texts(captions)
    expected = plain.match_all(images, texts)
    assert expected.std() > 0.1
    torch.testing.assert_close(fast.match_all(images, texts), expected, atol=1e-5, rtol=1e-4)


# the fixture's models are as good as new: an example sets all that it reads
@pytest.mark.slow
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_pairs_of_any_features(tiny_adapters, data):
    adapter = data.draw(st.sampled_from(tiny_adapters))
    pictures, tokens, captions = (data.draw(st.integers(1, most)) for most in (4, 20, 5))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 12), min_size=captions, max_size=captions)))
    pair = st.tuples(st.integers(0, pictures - 1), st.integers(0, captions - 1))
    pairs = torch.tensor(data.draw(st.lists(pair, min_size=1, max_size=12)))
    torch.manual_seed(captions)
    image_mask = None
    if data.draw(st.booleans()):
        image_mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (pictures, 1))
    images = ImageFeatures(torch.randn(pictures, tokens, 24).double(), image_mask, torch.randn(pictures, 16).double())
    mask = torch.arange(12) < lengths[:, None]
    texts = TextFeatures(torch.randn(captions, 12, 32).double(), mask, torch.randn(captions, 16).double())
    for t in (images.tokens, images.embeds, texts.tokens, texts.embeds):
        t.requires_grad_()
    adapter.options.match_memory_mb = data.draw(st.sampled_from([0.02, 0.2, 1024.0]))
    chosen = Shortcuts(*(data.draw(st.booleans()) for _ in NAMES))
    assert_same(adapter, images, texts, pairs, chosen)


@pytest.fixture
def tiny_adapters(tiny):
    return [tiny(arch, score="lavis").double() for arch in ("albef_retrieval", "blip_retrieval")]


# -- how much is computed --------------------------------------------------------------------------------------------


def rows_through(module) -> list[int]:
    """Rows of each call of a linear layer, in a list that grows."""
    seen: list[int] = []
    module.register_forward_hook(lambda m, inputs, out: seen.append(out[..., 0].numel()))
    return seen


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_work_is_done_once_per_picture_text_and_class_token(tiny, arch):
    adapter = tiny(arch).double()
    adapter.shortcuts = Shortcuts(low_rank=False)
    images, texts = features()
    layers = adapter.fusion_layers()
    keys = [rows_through(layer.crossattention.self.key) for layer in layers]
    words = [rows_through(layer.attention.self.key) for layer in layers]
    forward = [rows_through(layer.intermediate.dense) for layer in layers]
    adapter.match_all(images, texts)
    assert [sum(rows) for rows in keys] == [3 * 5] * len(layers)
    tokens = int(texts.mask.sum())
    # the first layer reads each text once, those between a pair's real tokens, the last one for class tokens alone
    assert [sum(rows) for rows in words[:-1]] == [tokens, *[3 * tokens] * (len(layers) - 2)]
    assert [sum(rows) for rows in forward] == [*[3 * tokens] * (len(layers) - 1), 12]


@torch.no_grad()
def test_a_picture_with_few_tokens_to_ask_for_is_never_projected(tiny):
    adapter = tiny("albef_retrieval").double()
    keys = [rows_through(layer.crossattention.self.key) for layer in adapter.fusion_layers()]
    images, texts = features()
    adapter.match(images, texts, torch.tensor([[0, 3], [1, 3]]))  # 2 heads x 1 token, below the width of 24
    assert keys == [[], []]


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_chunks_change_no_score_and_hold_what_memory_allows(tiny, arch):
    adapter = tiny(arch).double()
    images, texts = features()
    expected = adapter.match_all(images, texts)
    seen = rows_through(adapter.model.itm_head)
    for memory, chunks in ((1e-6, [1] * 12), (1024.0, [12])):
        seen.clear()
        adapter.options.match_memory_mb = memory
        torch.testing.assert_close(adapter.match_all(images, texts), expected, atol=1e-6, rtol=1e-6)
        assert seen == chunks


# -- where the plain path serves ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_shortcuts_do_not_cover_runs_as_lavis_has_it(tiny, tiny_section, pictures, captions):
    sizes = tiny_section("blip_retrieval")["sizes"]

    def plain_calls(adapter) -> int:
        calls = []
        adapter.model.text_encoder.encoder.register_forward_hook(lambda *_: calls.append(1))
        images, texts = adapter.encode_images(pictures), adapter.encode_texts(captions)
        calls.clear()
        adapter.match_all(images, texts)
        return len(calls)

    assert plain_calls(tiny("blip_retrieval")) == 0
    assert plain_calls(tiny("blip_retrieval", shortcuts=False)) == 1
    mapped = tiny("blip_retrieval")
    mapped.fusion_layers()[1].crossattention.self.save_attention = True
    with torch.enable_grad():
        assert plain_calls(mapped) == 1
    with pytest.raises(UserError, match="shortcuts"):
        tiny("blip_retrieval", shortcuts="some", sizes=sizes)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["albef_retrieval", "blip_retrieval"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_recomputed_layers_give_the_same_scores_and_gradients(tiny, arch, training, amp):
    pairs, found = torch.tensor(LAYOUTS["shuffled, with repeats"]), []
    for checkpointed in (False, True):
        adapter = tiny(arch, grad_checkpoint=checkpointed).train(training)
        images, texts = (f.to(dtype=torch.float32) for f in features())
        images, texts = (type(f)(f.tokens.detach().requires_grad_(), f.mask, f.embeds) for f in (images, texts))
        torch.manual_seed(11)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            scores = adapter.match(images, texts, pairs)
        (scores * torch.linspace(-1, 2, len(scores))).sum().backward()
        named = {"images": images.tokens, "texts": texts.tokens, **dict(adapter.named_parameters())}
        found.append((scores.detach(), {name: t.grad for name, t in named.items() if t.grad is not None}))
    (plain, gradients), (recomputed, again) = found
    torch.testing.assert_close(recomputed, plain, atol=0, rtol=0)
    assert set(again) == set(gradients)
    # with the cache of casts, autocast sums a weight's gradients in bfloat16
    allowed = 0.02 if amp else 1e-5
    for name, expected in gradients.items():
        assert (again[name] - expected).norm() <= allowed * expected.norm() + 1e-5, name


def test_recomputed_layers_in_recomputed_chunks(tiny):
    pairs = torch.tensor(LAYOUTS["shuffled, with repeats"])
    found = []
    for checkpointed, chunk in ((False, None), (True, 4)):
        adapter = tiny("albef_retrieval", grad_checkpoint=checkpointed).double()
        images, texts = features()
        match_recomputed(adapter.match, images, texts, pairs, chunk).sum().backward()
        found.append([images.tokens.grad, texts.tokens.grad, adapter.model.itm_head.weight.grad])
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["albef_retrieval", "blip_retrieval"])
def test_dropout_is_drawn_in_training_alone(tiny, arch):
    adapter = tiny(arch)
    images, texts = (f.float() for f in features())
    pairs = torch.tensor(LAYOUTS["all pairs"])
    with torch.no_grad():
        assert torch.equal(adapter.match(images, texts, pairs), adapter.match(images, texts, pairs))
        adapter.train()
        drawn = torch.stack([adapter.match(images, texts, pairs) for _ in range(150)])
        adapter.shortcuts = Shortcuts.none()
        plainly = torch.stack([adapter.match(images, texts, pairs) for _ in range(150)])
    assert drawn.std(dim=0).min() > 0
    # the same pair's score varies as on the plain path
    torch.testing.assert_close(drawn.std(dim=0), plainly.std(dim=0), rtol=0.4, atol=0.02)
    error = (drawn.var(dim=0) + plainly.var(dim=0)).div(150).sqrt()
    assert ((drawn.mean(dim=0) - plainly.mean(dim=0)).abs() < 5 * error).all()


@pytest.mark.parametrize("arch", ["albef_retrieval", "blip_retrieval"])
@torch.no_grad()
def test_under_bfloat16_autocast_scores_are_as_near_as_the_plain_ones(tiny, arch):
    adapter = tiny(arch)
    images, texts = (f.float() for f in features())
    pairs = torch.tensor(LAYOUTS["all pairs"])
    exact = adapter.match(images, texts, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = adapter.match(images, texts, pairs)
        adapter.shortcuts = Shortcuts.none()
        plain = adapter.match(images, texts, pairs)
    assert fast.dtype == torch.float32
    assert (fast - exact).abs().mean() < 2 * (plain - exact).abs().mean()


# -- the pieces --------------------------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_spreading_and_packing_are_inverse(counts):
    grid = PaddedGrid.of_counts(torch.tensor(counts))
    packed = torch.arange(1.0, sum(counts) + 1)[:, None]
    padded = grid.spread(packed)
    assert padded.shape == (len(counts), max(counts), 1)
    start = 0
    for row, count in zip(padded[..., 0].tolist(), counts, strict=True):
        assert row == [*range(start + 1, start + count + 1), *[0] * (max(counts) - count)]
        start += count
    assert torch.equal(grid.packed(padded), packed)
    mask = torch.ones(padded.shape[:2], dtype=torch.bool) if grid.mask is None else grid.mask
    assert torch.equal(mask, padded[..., 0] > 0)


def test_captions_lose_their_padding_wherever_it_lies():
    tokens = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[True, False, True, False], [True, True, True, False]])
    assert Captions.of(tokens, mask, torch.tensor([1])).tokens[:, 0].tolist() == [4, 5, 6]
    captions = Captions.of(tokens, mask, torch.arange(2))
    assert captions.tokens[:, 0].tolist() == [0, 2, 4, 5, 6]
    rows = captions.rows(torch.tensor([1, 0, 1]))
    assert captions.tokens[rows, 0].tolist() == [4, 5, 6, 0, 2, 4, 5, 6]


@pytest.mark.slow
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), max_size=40),
    most=st.integers(1, 12), tokens=st.integers(1, 200),
)  # fmt: skip
@example(pairs=[(0, 1), (0, 1), (4, 3), (4, 10), (4, 3)], most=4, tokens=12)  # two chunks of one picture
def test_chunks_hold_each_pair_once_within_what_fits(pairs, most, tokens):
    pictures, lengths = [picture for picture, _ in pairs], [length for _, length in pairs]

    def fits(sizes: ChunkSizes) -> bool:
        return sizes.pairs <= most and sizes.pictures * sizes.most_tokens <= tokens

    chunks = list(plan_chunks(pictures, lengths, fits))
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(pairs)))
    for chunk in chunks:
        owners = [pictures[row] for row in chunk]
        runs = [owner for row, owner in enumerate(owners) if row == 0 or owners[row - 1] != owner]
        per_run: list[int] = []
        for row, owner in enumerate(owners):
            if row == 0 or owners[row - 1] != owner:
                per_run.append(0)
            per_run[-1] += lengths[chunk[row]]
        assert len(chunk) == 1 or (len(chunk) <= most and len(runs) * max(per_run) <= tokens)
        assert max(per_run) <= 2 * min(per_run)
