from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.objective import LossConfig, build_objective
from lavis_dcd.distillation.selection import Selection, release_selection, select
from lavis_dcd.distillation.strategies import SELECTION_STRATEGIES, Draws, take_highest

GOLDEN = Path(__file__).parents[1] / "golden"


def make_pool(valid: torch.Tensor) -> CandidatePool:
    """Image-to-text pool whose text row names (query, column): 100 * q + c."""
    queries, width = valid.shape
    images = torch.arange(queries)[:, None].expand(queries, width)
    return CandidatePool(images, 100 * images + torch.arange(width), valid, "image_to_text")


def full(queries: int, width: int) -> torch.Tensor:
    return torch.ones(queries, width, dtype=torch.bool)


def slow_columns(scores, valid, count, margin):
    """Plain loops: the kept pool columns of one row, best first, equal scores by lower column."""
    usable = [c for c in range(1, len(scores)) if valid[0] and valid[c]]
    if margin is not None:
        usable = [c for c in usable if scores[c] <= scores[0] + margin]
    kept = []
    while usable and len(kept) < count:
        best = usable[0]
        for column in usable:
            if scores[column] > scores[best]:
                best = column
        kept.append(best)
        usable.remove(best)
    return kept


@st.composite
def mining_cases(draw):
    queries, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    levels = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0])  # few levels: many ties
    scores = [[draw(levels) for _ in range(width)] for _ in range(queries)]
    valid = [[draw(st.booleans()) for _ in range(width)] for _ in range(queries)]
    return (
        torch.tensor(scores),
        torch.tensor(valid),
        draw(st.integers(1, 10)),
        draw(st.sampled_from([None, 0.0, 0.5, -1.0])),
    )


@settings(deadline=None, max_examples=150)
@given(mining_cases())
def test_hardest_agrees_with_loops(case):
    scores, valid, count, margin = case
    chosen = select(make_pool(valid), scores, count, margin=margin)
    for q, (row, ok) in enumerate(zip(scores.tolist(), valid.tolist(), strict=True)):
        kept = slow_columns(row, ok, count, margin)
        columns = [0, *kept, *[0] * (count - len(kept))]
        assert chosen.text_rows[q].tolist() == [100 * q + c for c in columns]
        assert chosen.image_rows[q].tolist() == [q] * (1 + count)
        assert chosen.teacher_scores[q].tolist() == [row[c] for c in columns]
        assert chosen.valid[q].tolist() == [ok[0]] + [True] * len(kept) + [False] * (count - len(kept))


def ranked_case(rank: int) -> tuple[CandidatePool, torch.Tensor]:
    """One query, 9 candidates: the match scored so that the teacher ranks it `rank`-th (1-based) of 10."""
    scores = torch.tensor([[0.0, 3.0, -1.0, 7.0, 5.0, 2.0, -4.0, 6.0, 1.0, 4.0]])
    others = scores[0, 1:].sort(descending=True).values
    scores[0, 0] = others[rank - 1] + 0.5 if rank < 10 else others[-1] - 0.5
    assert int((scores[0] > scores[0, 0]).sum()) == rank - 1
    return make_pool(full(1, 10)), scores


@pytest.mark.parametrize("rank", [1, 3, 4, 7, 10])  # K = 3: the 7th and the last are outside its best 1+K
def test_a_misranked_match_stays_aligned(rank):
    pool, scores = ranked_case(rank)
    chosen = select(pool, scores, 3)
    assert chosen.text_rows.tolist() == [[0, 3, 7, 4]]
    assert torch.equal(chosen.teacher_scores, scores.gather(1, chosen.text_rows))


@pytest.mark.parametrize(("rank", "wrong"), [(1, 0), (3, 3), (4, 4), (7, 4), (10, 4)])
def test_the_release_misaligns_the_first_columns(rank, wrong):
    pool, scores = ranked_case(rank)
    chosen = release_selection(pool, scores, 3)
    assert chosen.text_rows.tolist() == [[0, 3, 7, 4]]
    aligned = chosen.teacher_scores == scores.gather(1, chosen.text_rows)
    assert aligned.tolist() == [[False] * wrong + [True] * (4 - wrong)]
    assert chosen.teacher_scores.tolist() == [scores[0].sort(descending=True).values[:4].tolist()]


def test_release_selection_and_objective_give_the_official_training_loss():
    golden = load_file(GOLDEN / "meter_tiny_io.safetensors")
    teacher, student = golden["out.teacher_scores"], golden["out.student_scores"]
    pool = CandidatePool(
        torch.arange(4)[:, None].expand(4, 16), torch.arange(16).expand(4, 16), full(4, 16), "image_to_text"
    )
    objective = build_objective(LossConfig(reference="release"))

    def loss(chosen: Selection) -> torch.Tensor:
        return objective(chosen.teacher_scores, student.gather(1, chosen.text_rows), chosen.valid)["loss"]

    official = golden["out.official_dcd_loss"]
    torch.testing.assert_close(loss(release_selection(pool, teacher, 7)), official, rtol=1e-6, atol=0)
    assert abs(loss(select(pool, teacher, 7)) - official) > 1e-4  # the fault shows


def test_release_selection_ignores_masks_and_needs_enough_candidates():
    valid = full(1, 4)
    valid[0, 1] = False
    scores = torch.tensor([[0.0, 9.0, 1.0, 2.0]])
    assert release_selection(make_pool(valid), scores, 2).text_rows.tolist() == [[0, 1, 3]]
    with pytest.raises(ValueError, match="hard_negatives = 4 exceeds the pool's 3 candidates"):
        release_selection(make_pool(valid), scores, 4)


def test_a_usable_candidate_of_minus_infinity_precedes_masked_ones():
    valid = torch.tensor([[True, False, True]])
    scores = torch.tensor([[0.0, 5.0, float("-inf")]])
    chosen = select(make_pool(valid), scores, 2)
    assert chosen.text_rows.tolist() == [[0, 2, 0]] and chosen.valid.tolist() == [[True, True, False]]


def test_random_draws_usable_candidates_without_replacement_and_repeatably():
    valid = full(40, 9)
    valid[:, 3] = False
    pool = make_pool(valid)
    first = select(pool, None, 5, "random", draws=Draws(torch.Generator().manual_seed(3)))
    again = select(pool, None, 5, "random", draws=Draws(torch.Generator().manual_seed(3)))
    assert first.teacher_scores is None and first.valid.all()
    assert torch.equal(first.text_rows, again.text_rows)
    columns = first.text_rows - 100 * torch.arange(40)[:, None]
    assert (columns[:, 0] == 0).all() and not (columns == 3).any()
    assert all(len(set(row)) == 6 for row in columns.tolist())
    assert set(columns.flatten().tolist()) == {0, 1, 2, 4, 5, 6, 7, 8}


def test_random_gathers_teacher_scores_by_the_same_indices_and_obeys_the_margin():
    pool, scores = ranked_case(4)
    chosen = select(pool, scores, 9, "random", margin=0.0)
    assert torch.equal(chosen.teacher_scores, scores.gather(1, chosen.text_rows))
    kept = chosen.text_rows[0][chosen.valid[0]].tolist()
    assert sorted(kept) == [0, 1, 2, 5, 6, 8, 9]


@settings(deadline=None, max_examples=40)
@given(mining_cases(), st.randoms(use_true_random=False))
def test_permuting_queries_permutes_rows(case, random):
    scores, valid, count, margin = case
    order = list(range(len(scores)))
    random.shuffle(order)
    pool = make_pool(valid)
    moved = CandidatePool(pool.image_rows[order], pool.text_rows[order], valid[order], pool.direction)
    first = select(pool, scores, count, margin=margin)
    second = select(moved, scores[order], count, margin=margin)
    for name in ("image_rows", "text_rows", "teacher_scores", "valid"):
        assert torch.equal(getattr(first, name)[order], getattr(second, name))


@settings(deadline=None, max_examples=60)
@given(mining_cases())
def test_without_a_number_every_valid_candidate_is_kept(case):
    scores, valid, _, margin = case
    pool = make_pool(valid)
    chosen = select(pool, scores, None, margin=margin)
    limit = float("inf") if margin is None else margin
    for q, (row, ok) in enumerate(zip(scores.tolist(), valid.tolist(), strict=True)):
        kept = [c > 0 and ok[0] and ok[c] and row[c] <= row[0] + limit for c in range(len(row))]
        columns = [c if kept[c] else 0 for c in range(len(row))]
        assert chosen.text_rows[q].tolist() == [100 * q + c for c in columns]
        assert chosen.teacher_scores[q].tolist() == [row[c] for c in columns]
        assert chosen.valid[q].tolist() == [ok[0], *kept[1:]]


def test_keeping_every_candidate_needs_no_teacher():
    chosen = select(make_pool(full(2, 4)), None, None)
    assert chosen.teacher_scores is None and chosen.valid.all()
    assert chosen.text_rows.tolist() == [[0, 1, 2, 3], [100, 101, 102, 103]]
    with pytest.raises(ValueError, match="None is no number"):
        release_selection(make_pool(full(2, 4)), torch.zeros(2, 4), None)


def test_a_strategy_object_of_ones_own():
    class Easiest:
        needs_teacher = True

        def columns(self, negatives, teacher_scores, count, draws):
            return take_highest(-teacher_scores[:, 1:], negatives, count)

    pool, scores = ranked_case(1)
    assert select(pool, scores, 2, Easiest()).text_rows.tolist() == [[0, 6, 2]]


def test_errors_name_what_is_wrong():
    pool, scores = ranked_case(1)
    assert set(SELECTION_STRATEGIES) == {"hardest", "mixed", "random", "stratified"}
    with pytest.raises(ValueError, match="unknown selection strategy 'easy'; known: hardest, mixed, random"):
        select(pool, scores, 3, "easy")
    with pytest.raises(ValueError, match="'hardest' needs teacher_scores"):
        select(pool, None, 3)
    with pytest.raises(ValueError, match="margin"):
        select(pool, None, 3, "random", margin=1.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        select(pool, scores, 0)
    with pytest.raises(ValueError, match=r"\(1, 9\) and \(1, 10\)"):
        select(pool, scores[:, 1:], 3)
