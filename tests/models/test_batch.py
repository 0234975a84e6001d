"""A batch's distinct items, and InfoNCE over them by plain loops; whole batches are tested with the distiller."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from stubs import ColourMatcher, colour_samples

from lavis_dcd.models.batch import distinct, info_nce, sample_features


@given(st.lists(st.sampled_from("abcde")))
def test_distinct_items_are_numbered_by_their_first_occurrence(items):
    first, rows = distinct(items)
    assert [items[i] for i in first] == list(dict.fromkeys(items)) and first == sorted(first)
    assert [items[first[row]] for row in rows] == items
    assert all(items.index(items[i]) == i for i in first)


def test_pictures_and_captions_are_encoded_once_and_found_again():
    matcher, samples = ColourMatcher(), colour_samples(6)
    batch = sample_features(matcher, samples)
    assert batch.image_ids.tolist() == [0, 1, 2, 3, 4] and batch.text_image_ids.tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.match_pairs.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [0, 5]]
    assert matcher.images_seen == 5 and matcher.texts_seen == samples["text_input"]


def test_infonce_leaves_other_captions_of_a_picture_out():
    batch = sample_features(ColourMatcher(), colour_samples(6))
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
