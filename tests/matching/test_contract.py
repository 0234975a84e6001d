"""What the contract brings along: chunks of pairs, and the views of a batch."""

import torch

from lavis_dcd.matching.contract import has_view, pair_chunks, view_of


def test_chunks_stay_within_the_stated_memory():
    pairs = torch.zeros(1000, 2, dtype=torch.long)
    chunks = pair_chunks(pairs, bytes_per_pair=2**20, memory_mb=64)
    assert max(map(len, chunks)) == 64 and sum(map(len, chunks)) == 1000
    assert all(len(c) == 1 for c in pair_chunks(pairs[:3], bytes_per_pair=2**30, memory_mb=1))


def test_each_matcher_reads_its_own_view_and_else_the_main_one():
    samples = {"image": {"student": 1, "teacher": 2}, "text_input": {"student": "a"}, "image_id": 3}
    assert view_of(samples) == {"image": 1, "text_input": "a", "image_id": 3}
    assert view_of(samples, "teacher") == {"image": 2, "text_input": "a", "image_id": 3}
    assert has_view(samples, "teacher") and not has_view(samples, "another")
