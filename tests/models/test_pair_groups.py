"""Groups of samples: who is in them, how hard they are, and which of their pairs count."""

import pytest
import torch

from lavis_dcd.common.processes import ProcessGroup
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.batch import BatchFeatures
from lavis_dcd.models.pair_groups import draw_groups, group_pairs


def batch_of(ids: list[int], **more) -> BatchFeatures:
    """One caption per sample, one row per distinct picture."""
    distinct = sorted(set(ids))
    rows = torch.tensor([distinct.index(i) for i in ids])
    return BatchFeatures(
        ImageFeatures(torch.zeros(len(distinct), 1, 1)),
        TextFeatures(torch.zeros(len(ids), 1, 1)),
        torch.tensor(distinct),
        torch.tensor(ids),
        torch.stack([rows, torch.arange(len(ids))], dim=1),
        **more,
    )


def test_groups_hold_different_samples_and_none_of_the_first_one_s_picture():
    ids = [0, 0, 1, 2, 3, 3, 4, 5]
    torch.manual_seed(0)
    for _ in range(20):
        groups = draw_groups(batch_of(ids), 4, None, None, 1.0)
        assert groups.shape == (2, 4)
        for group in groups.tolist():
            assert len(set(group)) == 4
            assert ids[group[0]] not in [ids[row] for row in group[1:]]


@pytest.mark.parametrize("queries, count", [(1, 1), (4, 1), (5, 2), (8, 2), (None, 2), (100, 8)])
def test_groups_cover_the_queries(queries, count):
    assert len(draw_groups(batch_of(list(range(8))), 4, queries, None, 1.0)) == count


def test_a_small_batch_gives_small_groups():
    assert draw_groups(batch_of([0, 1, 1]), 8, 3, None, 1.0).shape == (1, 2)
    assert draw_groups(batch_of([7, 7]), 8, 3, None, 1.0).shape == (1, 1)


def test_others_are_drawn_by_both_directions_logits_without_replacement():
    ids = list(range(4))
    logits = torch.tensor([[9.0, 0.3, -0.4, 1.1], [0.9, 9.0, 0.0, 0.0], [0.2, 0.0, 9.0, 0.0], [-0.5, 0.0, 0.0, 9.0]])
    torch.manual_seed(0)
    first = []
    while len(first) < 3000:
        (group,) = draw_groups(batch_of(ids), 2, 1, logits, 2.0).tolist()
        if group[0] == 0:
            first.append(group[1])
    counts = torch.bincount(torch.tensor(first), minlength=4)[1:] / len(first)
    expected = torch.tensor([0.3 + 0.9, -0.4 + 0.2, 1.1 - 0.5]).softmax(0)  # 2.0 times the mean
    torch.testing.assert_close(counts, expected, atol=0.04, rtol=0)


def test_each_process_draws_around_its_own_samples_and_as_many_groups():
    for rank, own in ((0, range(5)), (1, range(5, 8))):
        batch = batch_of(list(range(8)), queries=[5, 3], ranks=ProcessGroup(rank, 2))
        groups = draw_groups(batch, 2, 8, None, 1.0)
        assert groups.shape == (2, 2) and set(groups[:, 0].tolist()) <= set(own)


def test_pairs_of_a_group_are_its_square_without_a_second_match():
    batch = batch_of([5, 6, 5, 7])
    rows, valid = group_pairs(batch, torch.tensor([[0, 1, 2], [3, 1, 0]]))
    assert rows[1].tolist() == [[[i, t] for t in (3, 1, 0)] for i in (2, 1, 0)]
    assert valid[1].all()
    assert valid[0].tolist() == [[True, True, False], [True, True, True], [False, True, True]]
