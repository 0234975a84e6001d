"""Feature dataclasses: rows and padding; gathering in a process that is alone (several: tests/distributed)."""

from dataclasses import replace

import pytest
import torch

from lavis_dcd.common.processes import ALONE, ProcessGroup, gather_objects
from lavis_dcd.matching.features import ImageFeatures, TextFeatures, gather_features, gather_rows


def texts(lengths: list[int], width: int = 3) -> TextFeatures:
    longest = max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(len(lengths), longest, width), mask, torch.randn(len(lengths), 2))


def test_cat_pads_the_shorter_and_keeps_rows():
    short, long = texts([2, 1]), texts([4])
    both = TextFeatures.cat([short, long])
    assert both.tokens.shape == (3, 4, 3)
    assert both.mask.sum(dim=1).tolist() == [2, 1, 4]
    assert torch.equal(both.tokens[:2, :2], short.tokens) and torch.equal(both[2:].tokens, long.tokens)
    assert torch.equal(both.embeds, torch.cat([short.embeds, long.embeds]))


def test_unmasked_parts_of_one_length_stay_unmasked():
    joined = ImageFeatures.cat([ImageFeatures(torch.ones(2, 5, 3)), ImageFeatures(torch.zeros(1, 5, 3))])
    assert joined.mask is None and len(joined) == 3


def test_trimmed_drops_only_columns_nobody_uses():
    padded = TextFeatures.cat([texts([2]), texts([5])])
    assert padded[[0]].trimmed().tokens.shape[1] == 2
    assert padded.trimmed().tokens.shape[1] == 5


def test_rows_may_repeat_and_precision_changes_floats_only():
    features = texts([3, 2])[[1, 1, 0]].to(dtype=torch.float16)
    assert features.mask.dtype == torch.bool and features.tokens.dtype == torch.float16
    assert torch.equal(features.tokens[0], features.tokens[1])


def test_bytes_of_all_tensors():
    assert texts([3, 1]).nbytes == 4 * (2 * 3 * 3) + 2 * 3 + 4 * (2 * 2)


def test_vectors_of_the_joint_space_where_there_are_any():
    features = texts([3, 1])
    assert features.required_embeds() is features.embeds
    with pytest.raises(ValueError, match="embeds"):
        ImageFeatures(features.tokens).required_embeds()


@pytest.mark.parametrize(
    "bad",
    [
        {"tokens": torch.ones(2, 3)},
        {"tokens": torch.ones(2, 3, 4), "mask": torch.ones(2, 4, dtype=torch.bool)},
        {"tokens": torch.ones(2, 3, 4), "embeds": torch.ones(3, 4)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError):
        ImageFeatures(**bad)


def test_alone_everything_stays_what_it_is():
    rows = torch.randn(3, 2, requires_grad=True)
    features = TextFeatures(torch.randn(2, 3, 4))
    assert ProcessGroup.here() == ALONE and ALONE.alone
    assert gather_rows(rows, ALONE) is rows and gather_features(features, ALONE) is features
    assert gather_objects({"a": 1}, ALONE) == [{"a": 1}]


def test_numbers_of_rows_go_with_the_rows():
    numbered = [replace(texts(lengths), rows=torch.tensor(rows)) for lengths, rows in (([2, 1], [7, 3]), ([4], [5]))]
    both = TextFeatures.cat(numbered)
    assert both.rows.tolist() == [7, 3, 5] and both[[2, 0, 0]].float().trimmed().rows.tolist() == [5, 7, 7]
    assert both.to(dtype=torch.float16).rows.dtype == torch.int64
    assert TextFeatures.cat([numbered[0], texts([1])]).rows is None
    with pytest.raises(ValueError, match="2 numbers of rows for 3 rows"):
        replace(both, rows=torch.tensor([1, 2]))
