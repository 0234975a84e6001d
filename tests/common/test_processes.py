"""Shares of work; several processes: tests/distributed."""

from hypothesis import given
from hypothesis import strategies as st

from lavis_dcd.common.processes import ProcessGroup


@given(count=st.integers(0, 200), size=st.integers(1, 9))
def test_shares_are_all_items_once_and_in_order(count, size):
    shares = [ProcessGroup(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)
