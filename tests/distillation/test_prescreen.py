"""What a prescreen keeps, and the share of the teacher's hardest candidates among it, against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.prescreen import found_share, most_promising


def pool_of(valid):
    queries, width = valid.shape
    rows = torch.arange(queries)[:, None].expand(queries, width)
    return CandidatePool(rows, torch.arange(width).expand(queries, width), valid, "image_to_text")


def best(scores, valid, count):
    """Columns of the ``count`` highest valid candidates, the earlier one first among equals."""
    columns = [c for c in range(1, len(scores)) if valid[c]]
    return sorted(columns, key=lambda c: -float(scores[c]))[:count]


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 4), width=st.integers(2, 8), keep=st.integers(1, 9), hardest=st.integers(1, 5),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_against_plain_loops(queries, width, keep, hardest, seed):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(queries, width, generator=generator) < 0.8
    valid[:, 0] = True
    cheap, teacher = (torch.rand(queries, width, generator=generator) for _ in range(2))
    pool = pool_of(valid)
    kept = most_promising(pool, cheap, keep)
    wanted = found = 0
    for q in range(queries):
        mine = best(cheap[q], valid[q], keep)
        assert kept.valid[q].nonzero()[:, 0].tolist() == [0, *sorted(mine)]
        true = best(teacher[q], valid[q], hardest)
        wanted, found = wanted + len(true), found + len(set(true) & set(mine))
    share = found_share(pool, kept, teacher, hardest)
    if wanted:
        assert float(share) == pytest.approx(found / wanted)
    else:
        assert share.isnan()


def test_the_teachers_own_scores_find_all():
    scores = torch.rand(5, 20)
    pool = pool_of(torch.ones(5, 20, dtype=torch.bool))
    assert float(found_share(pool, most_promising(pool, scores, 7), scores, 7)) == 1.0
    worst = most_promising(pool, -scores, 7)
    assert float(found_share(pool, worst, scores, 7)) == 0.0


def test_nothing_kept_is_refused():
    with pytest.raises(ValueError, match="at least 1 candidate"):
        most_promising(pool_of(torch.ones(1, 3, dtype=torch.bool)), None, 0)
