import math

import pytest
import torch

from lavis_dcd.distillation.weighting import (
    WEIGHTINGS,
    ConfidenceGap,
    EntropyNormalised,
    EntropyShare,
    WeightedSoftLabels,
    soft_label_weights,
)

NAMES = sorted(WEIGHTINGS)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    teacher = 2 * torch.randn(6, 5, generator=generator)
    student = torch.randn(6, 5, generator=generator)
    valid = torch.ones(6, 5, dtype=torch.bool)
    valid[1, 2] = False
    valid[2, 1:4] = False
    valid[3, 1:] = False
    valid[5, 0] = False
    return teacher, student, valid


def probabilities(scores):
    top = max(scores)
    parts = [math.exp(s - top) for s in scores]
    return [part / sum(parts) for part in parts]


def kept(scores, valid, q):
    return [s for s, ok in zip(scores[q].tolist(), valid[q].tolist(), strict=True) if ok]


def entropy(scores):
    return -sum(p * math.log(p) for p in probabilities(scores))


def scaled(values):
    return [value / sum(values) for value in values]


def slow_weights(name, teacher, student, valid, gamma=2.0, floor=0.0):
    """(distill, contrastive) of the five rows that have a match, in plain Python."""
    t = [kept(teacher, valid, q) for q in range(5)]
    s = [kept(student, valid, q) for q in range(5)]
    if name == "entropy_share":
        share = scaled([entropy(row) for row in t])
        return probabilities([(1 - x) ** gamma for x in share]), share
    if name == "wsl":
        raw = [
            1 - math.exp(-math.log(probabilities(b)[0]) / (math.log(probabilities(a)[0]) - 1e-7))
            for a, b in zip(t, s, strict=True)
        ]
        return scaled(raw), [0.2] * 5
    if name == "uniform":
        return [0.2] * 5, [0.2] * 5
    if name == "entropy_normalised":
        doubt = [entropy(row) / math.log(len(row)) if len(row) > 1 else 0.0 for row in t]
    else:
        doubt = [1 / (1 + math.exp(row[0] - max(row[1:]))) if len(row) > 1 else 0.0 for row in t]
    return scaled([(1 - d) ** gamma for d in doubt]), scaled([max(d, floor) for d in doubt])


@pytest.mark.parametrize("name", NAMES)
def test_weights_agree_with_loops(name, batch):
    weights = WEIGHTINGS[name]()(*batch)
    distill, contrastive = slow_weights(name, *batch)
    torch.testing.assert_close(weights.distill, torch.tensor([*distill, 0.0]))
    torch.testing.assert_close(weights.contrastive, torch.tensor([*contrastive, 0.0]))


@pytest.mark.parametrize(
    ("name", "kind"), [("entropy_normalised", EntropyNormalised), ("confidence_gap", ConfidenceGap)]
)
def test_gamma_and_floor(name, kind, batch):
    weights = kind(gamma=3.0, entropy_floor=0.4)(*batch)
    distill, contrastive = slow_weights(name, *batch, gamma=3.0, floor=0.4)
    torch.testing.assert_close(weights.distill[:5], torch.tensor(distill))
    torch.testing.assert_close(weights.contrastive[:5], torch.tensor(contrastive))


def hard_cases():
    ones = torch.ones(3, 3, dtype=torch.bool)
    student = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    sure = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]])
    yield "sure", sure, student, ones
    yield "sure, sure student", sure, 1e4 * student, ones
    yield "flat", torch.zeros(3, 3), student, ones
    yield "bf16", sure.bfloat16(), student.bfloat16(), ones
    lone = ones.clone()
    lone[:, 1:] = False
    yield "no negatives", sure, student, lone
    yield "one live row", sure, student, ones & torch.tensor([[True], [False], [False]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("teacher", "student", "valid"), [case[1:] for case in hard_cases()], ids=[c[0] for c in hard_cases()]
)
def test_every_weighting_sums_to_one_over_the_rows_with_a_match(name, teacher, student, valid):
    weights = WEIGHTINGS[name]()(teacher, student, valid)
    for vector in (weights.distill, weights.contrastive):
        assert vector.dtype == torch.float32 and vector.shape == (3,)
        assert vector.isfinite().all() and (vector >= 0).all()
        torch.testing.assert_close(vector.sum(), torch.tensor(1.0))
        assert (vector[~valid[:, 0]] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_match_has_no_weight(name):
    weights = WEIGHTINGS[name]()(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert weights.distill.tolist() == [0, 0] and weights.contrastive.tolist() == [0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_masked_entries_never_contribute(name, batch):
    teacher, student, valid = batch
    clean = WEIGHTINGS[name]()(*batch)
    dirty = WEIGHTINGS[name]()(
        teacher.masked_fill(~valid, float("nan")), student.masked_fill(~valid, float("inf")), valid
    )
    assert torch.equal(clean.distill, dirty.distill) and torch.equal(clean.contrastive, dirty.contrastive)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_queries_permutes_rows(name, batch):
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    first, second = WEIGHTINGS[name]()(*batch), WEIGHTINGS[name]()(*(part[order] for part in batch))
    torch.testing.assert_close(first.distill[order], second.distill)
    torch.testing.assert_close(first.contrastive[order], second.contrastive)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_weights(name, batch):
    teacher, student, valid = batch
    weights = WEIGHTINGS[name]()(teacher.requires_grad_(), student.requires_grad_(), valid)
    assert not weights.distill.requires_grad and not weights.contrastive.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_teacher_score_is_not_hidden(name):
    teacher = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]])
    weighting = WEIGHTINGS[name]()
    weights = weighting(teacher, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert bool((weights.distill + weights.contrastive).isnan().any()) == weighting.needs_teacher


def test_only_uniform_does_without_a_teacher(batch):
    _, student, valid = batch
    assert [name for name in NAMES if not WEIGHTINGS[name]().needs_teacher] == ["uniform"]
    assert WEIGHTINGS["uniform"]()(None, student, valid).contrastive.tolist() == pytest.approx([0.2] * 5 + [0])


def test_normalised_entropy_bites_where_the_share_is_flat():
    """64 queries, half sure and half unsure: the paper's distillation weight hardly tells them apart."""
    teacher = torch.zeros(64, 8)
    teacher[:32, 0] = 8.0
    valid = torch.ones(64, 8, dtype=torch.bool)
    paper = EntropyShare()(teacher, teacher, valid).distill
    ours = EntropyNormalised()(teacher, teacher, valid).distill
    assert 1 < paper[0] / paper[-1] < 1.1
    assert ours[0] > 100 * ours[-1]


def test_wsl_keeps_the_published_ratios(batch):
    raw = soft_label_weights(*batch)
    assert (raw[:5] >= 0).all() and (raw <= 1).all() and raw[5] == 0
    torch.testing.assert_close(WeightedSoftLabels()(*batch).distill, raw / raw.sum())
