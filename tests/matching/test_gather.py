"""Shares of work, and gathering in a process that is alone; several processes: tests/distributed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_dcd.common.processes import ALONE, ProcessGroup, gather_objects
from lavis_dcd.matching.features import TextFeatures, gather_features, gather_rows


@given(count=st.integers(0, 200), size=st.integers(1, 9))
def test_shares_are_all_items_once_and_in_order(count, size):
    shares = [ProcessGroup(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


def test_alone_everything_stays_what_it_is():
    rows = torch.randn(3, 2, requires_grad=True)
    features = TextFeatures(torch.randn(2, 3, 4))
    assert ProcessGroup.here() == ALONE and ALONE.alone
    assert gather_rows(rows, ALONE) is rows and gather_features(features, ALONE) is features
    assert gather_objects({"a": 1}, ALONE) == [{"a": 1}]
