"""A training batch: parsed once, every distinct item encoded once; steps are tested with the distiller."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stubs import ColourMatcher, colour_samples

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import TextFeatures
from lavis_dcd.models.batch import Batch, distinct, encode_batch, info_nce


def samples(**more):
    return {
        "image": torch.zeros(2, 3, 4, 4),
        "text_input": ["a red ring", "two stars"],
        "image_id": torch.tensor([5, 9]),
        **more,
    }


def test_a_plain_batch_has_neither_candidates_nor_a_place_in_a_job():
    batch = Batch.of(samples())
    assert (batch.size, batch.pictures, batch.owners) == (2, [5, 9], [5, 9])
    assert not batch.texts_drawn and not batch.pictures_drawn and not batch.bank_scores
    assert (batch.step, batch.progress) == (0, 1.0)
    assert batch.view().texts == ["a red ring", "two stars"] and not batch.has_view("teacher")


def test_candidates_stand_behind_the_samples():
    scores = torch.randn(2, 3)
    batch = Batch.of(
        samples(
            candidate_text=["b", "c", "d", "e"],
            candidate_image_id=torch.tensor([[1, 2], [3, 4]]),
            candidate_image=torch.ones(4, 3, 4, 4),
            candidate_picture_id=torch.tensor([[6, 7], [8, 10]]),
            image_to_text_scores=scores,
        )
    )
    assert batch.owners == [5, 9, 1, 2, 3, 4] and batch.pictures == [5, 9, 6, 7, 8, 10]
    assert batch.view().texts[2:] == ["b", "c", "d", "e"] and len(batch.view().candidate_images) == 4
    assert list(batch.bank_scores) == ["image_to_text"] and torch.equal(batch.bank_scores["image_to_text"], scores)


def test_the_step_is_counted_over_the_job():
    batch = Batch.of(samples(epoch=2, iters=3, num_iters_per_epoch=10, progress=0.25))
    assert (batch.step, batch.progress) == (23, 0.25)


def test_a_view_falls_back_on_the_main_one():
    batch = Batch.of(samples(text_input={"student": ["a", "b"], "teacher": ["A", "B"]}))
    assert batch.view().texts == ["a", "b"]
    assert batch.view("teacher").texts == ["A", "B"] and batch.has_view("teacher")
    assert batch.view("teacher.1").texts == ["a", "b"] and not batch.has_view("teacher.1")
    assert batch.for_lavis()["text_input"] == ["a", "b"]


def test_kept_features_serve_the_main_view_alone():
    batch = Batch.of(samples(text_features=TextFeatures(torch.zeros(2, 1, 4))))
    assert len(batch.view().text_features) == 2
    with pytest.raises(UserError, match=r"run.cache_features: the kept features serve the student's"):
        batch.view("teacher")


def test_rows_number_first_occurrences():
    assert distinct(["b", "a", "b", "c", "a"]) == ([0, 1, 3], [0, 1, 0, 2, 1])


@given(st.lists(st.sampled_from("abcde")))
def test_distinct_items_are_numbered_by_their_first_occurrence(items):
    first, rows = distinct(items)
    assert [items[i] for i in first] == list(dict.fromkeys(items)) and first == sorted(first)
    assert [items[first[row]] for row in rows] == items
    assert all(items.index(items[i]) == i for i in first)


def test_pictures_and_captions_are_encoded_once_and_found_again():
    matcher, samples = ColourMatcher(), colour_samples(6)
    batch = encode_batch(matcher, Batch.of(samples))
    assert batch.image_ids.tolist() == [0, 1, 2, 3, 4] and batch.text_image_ids.tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.match_pairs.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [0, 5]]
    assert matcher.images_seen == 5 and matcher.texts_seen == samples["text_input"]


def test_infonce_leaves_other_captions_of_a_picture_out():
    batch = encode_batch(ColourMatcher(), Batch.of(colour_samples(6)))
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pictures, texts = batch.image_ids.tolist(), batch.text_image_ids.tolist()
    forward, backward = [], []
    for image, text in batch.match_pairs.tolist():
        others = [t for t in range(6) if texts[t] != pictures[image]]
        forward.append(-logits[image, [text, *others]].log_softmax(0)[0])
        others = [i for i in range(5) if pictures[i] != texts[text]]
        backward.append(-logits[[image, *others], text].log_softmax(0)[0])
    expected = (torch.stack(forward).mean() + torch.stack(backward).mean()) / 2
    torch.testing.assert_close(info_nce(logits, batch), expected)
