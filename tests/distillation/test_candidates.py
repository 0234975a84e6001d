import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_dcd.distillation.candidates import (
    IMAGE_TO_TEXT,
    POOLS,
    TEXT_TO_IMAGE,
    BatchContext,
    CandidatePool,
    InBatch,
    RandomFromDataset,
    assemble,
    build_pool,
    register_pool,
)


def make_context() -> BatchContext:
    """Samples: captions 0 and 1 of image id 7, 2 of id 5, 3 of id 9; texts 4 and 5 are extras."""
    return BatchContext(
        image_ids=torch.tensor([7, 5, 9]),
        text_image_ids=torch.tensor([7, 7, 5, 9, 30, 7]),
        match_pairs=torch.tensor([[0, 0], [0, 1], [1, 2], [2, 3]]),
        extra_texts=torch.tensor([[4, 5], [2, 2], [4, 0], [3, 1]]),
    )


def negatives(pool: CandidatePool, rows: torch.Tensor) -> list[list[int]]:
    return [
        [int(row) for row, ok in zip(line[1:], valid[1:], strict=True) if ok]
        for line, valid in zip(rows, pool.valid, strict=True)
    ]


def test_in_batch_image_to_text_by_hand():
    pool = InBatch(IMAGE_TO_TEXT).build(make_context())
    assert pool.direction == IMAGE_TO_TEXT
    assert pool.text_rows[:, 0].tolist() == [0, 1, 2, 3]
    assert pool.image_rows.tolist() == [[0] * 4, [0] * 4, [1] * 4, [2] * 4]
    assert negatives(pool, pool.text_rows) == [[2, 3], [2, 3], [0, 1, 3], [0, 1, 2]]


def test_in_batch_text_to_image_by_hand():
    pool = InBatch(TEXT_TO_IMAGE).build(make_context())
    assert pool.image_rows[:, 0].tolist() == [0, 0, 1, 2]
    assert pool.text_rows.tolist() == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]
    assert negatives(pool, pool.image_rows) == [[1, 2], [1, 2], [0, 2], [0, 1]]


def test_random_pool_masks_own_image_and_repeats():
    pool = RandomFromDataset().build(make_context())
    assert pool.text_rows.tolist() == [[0, 4, 5], [1, 2, 2], [2, 4, 0], [3, 3, 1]]
    assert pool.valid.tolist() == [
        [True, True, False],  # text 5 shows the query's image
        [True, True, False],  # text 2 drawn twice
        [True, True, True],
        [True, False, True],  # the match itself drawn
    ]


def test_one_text_row_of_two_images_is_never_its_own_negative():
    context = BatchContext(torch.tensor([1, 2]), torch.tensor([2]), torch.tensor([[0, 0]]), torch.tensor([[0, 0]]))
    assert RandomFromDataset().build(context).valid.tolist() == [[True, False, False]]


def test_a_batch_of_one_image_has_no_negatives():
    context = BatchContext(torch.tensor([3]), torch.tensor([3, 3]), torch.tensor([[0, 0], [0, 1]]))
    assert not InBatch(IMAGE_TO_TEXT).build(context).valid[:, 1:].any()
    assert InBatch(TEXT_TO_IMAGE).build(context).valid.shape == (2, 1)


@st.composite
def contexts(draw):
    """Distinct images and texts, several captions per image, some texts only drawn as extras."""
    images = draw(st.integers(1, 5))
    ids = draw(st.permutations(range(10)))[:images]
    owner = draw(st.lists(st.sampled_from(ids), min_size=1, max_size=9)) + list(ids)
    order = draw(st.permutations(range(len(owner))))
    owner = [owner[i] for i in order]
    samples = draw(st.lists(st.sampled_from(range(len(owner))), min_size=1, max_size=7))
    extras = draw(
        st.lists(
            st.lists(st.sampled_from(range(len(owner))), min_size=3, max_size=3),
            min_size=len(samples),
            max_size=len(samples),
        )
    )
    pairs = [[ids.index(owner[text]), text] for text in samples]
    return BatchContext(*(torch.tensor(values) for values in (list(ids), owner, pairs, extras)))


@settings(deadline=None, max_examples=60)
@given(contexts(), st.sampled_from([IMAGE_TO_TEXT, TEXT_TO_IMAGE]))
def test_in_batch_agrees_with_loops(context, direction):
    pool = InBatch(direction).build(context)
    side = 1 if direction == IMAGE_TO_TEXT else 0
    answers = pool.text_rows if side else pool.image_rows
    id_of = (context.text_image_ids if side else context.image_ids).tolist()
    pairs = context.match_pairs.tolist()
    expected = []
    for image, _ in pairs:
        own_id = int(context.image_ids[image])
        expected.append(sorted({pair[side] for pair in pairs if id_of[pair[side]] != own_id}))
    assert negatives(pool, answers) == expected
    assert answers[:, 0].tolist() == [pair[side] for pair in pairs]


@settings(deadline=None, max_examples=60)
@given(contexts())
def test_random_pool_agrees_with_loops(context):
    pool = RandomFromDataset().build(context)
    expected = []
    for (image, _), drawn in zip(context.match_pairs.tolist(), context.extra_texts.tolist(), strict=True):
        own_id = int(context.image_ids[image])
        kept = [text for text in drawn if int(context.text_image_ids[text]) != own_id]
        expected.append(list(dict.fromkeys(kept)))
    assert negatives(pool, pool.text_rows) == expected


@settings(deadline=None, max_examples=30)
@given(contexts(), st.randoms(use_true_random=False))
def test_permuting_queries_permutes_rows(context, random):
    order = list(range(len(context.match_pairs)))
    random.shuffle(order)
    shuffled = BatchContext(
        context.image_ids, context.text_image_ids, context.match_pairs[order], context.extra_texts[order]
    )
    for strategy in (InBatch(IMAGE_TO_TEXT), InBatch(TEXT_TO_IMAGE), RandomFromDataset()):
        first, second = strategy.build(context), strategy.build(shuffled)
        for name in ("image_rows", "text_rows", "valid"):
            assert torch.equal(getattr(first, name)[order], getattr(second, name))


def test_a_third_party_pool_plugs_in(monkeypatch):
    monkeypatch.setattr("lavis_dcd.distillation.candidates.POOLS", dict(POOLS))

    @register_pool("next_one")
    class NextOne:
        def __init__(self, direction):
            self.direction = direction

        def build(self, context):
            following = context.match_pairs.roll(-1, dims=0)[:, 1:]
            return assemble(context, following, self.direction)

    pool = build_pool("next_one", IMAGE_TO_TEXT).build(make_context())
    assert negatives(pool, pool.text_rows) == [[], [2], [3], [0]]
    with pytest.raises(ValueError, match="already registered"):
        register_pool("next_one")(InBatch)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"unknown candidate pool 'mined'; registered: .*in_batch, random"):
        build_pool("mined")
    with pytest.raises(ValueError, match="unknown direction 'up'"):
        build_pool("in_batch", "up")
    with pytest.raises(ValueError, match="image_to_text only"):
        build_pool("random", TEXT_TO_IMAGE)
    with pytest.raises(ValueError, match="needs extra_texts"):
        context = make_context()
        context.extra_texts = None
        RandomFromDataset().build(context)
    ids = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"match_pairs must be \[Q, 2\], got shape \(2,\)"):
        BatchContext(ids, ids, ids)
    with pytest.raises(ValueError, match="image_ids must be one-dimensional"):
        BatchContext(ids[None], ids, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"Q = 2, got shape \(3, 4\)"):
        BatchContext(ids, ids, torch.zeros(2, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="one shape"):
        CandidatePool(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3), IMAGE_TO_TEXT)


def test_bank_pools_mask_own_image_and_repeats():
    context = make_context()
    texts = build_pool("bank", IMAGE_TO_TEXT).build(context)
    assert texts.text_rows.tolist() == [[0, 4, 5], [1, 2, 2], [2, 4, 0], [3, 3, 1]]
    assert negatives(texts, texts.text_rows) == [[4], [2], [4, 0], [1]]
    # samples 0 and 1 are captions of image row 0, so that row is no negative of theirs
    context.extra_images = torch.tensor([[1, 2], [0, 2], [2, 2], [1, 0]])
    images = build_pool("bank", TEXT_TO_IMAGE).build(context)
    assert images.direction == TEXT_TO_IMAGE
    assert images.image_rows.tolist() == [[0, 1, 2], [0, 0, 2], [1, 2, 2], [2, 1, 0]]
    assert images.text_rows.tolist() == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]
    assert negatives(images, images.image_rows) == [[1, 2], [2], [2], [1, 0]]


def test_bank_pools_need_their_candidates():
    context = make_context()
    with pytest.raises(ValueError, match="extra_images"):
        build_pool("bank", TEXT_TO_IMAGE).build(context)
    context.extra_texts = None
    with pytest.raises(ValueError, match="extra_texts"):
        build_pool("bank", IMAGE_TO_TEXT).build(context)


def test_extra_images_belong_to_the_samples():
    context = make_context()
    with pytest.raises(ValueError, match=r"extra_images must be \[Q, C\] with match_pairs' Q = 4"):
        BatchContext(context.image_ids, context.text_image_ids, context.match_pairs, extra_images=torch.zeros(3, 2))
