import math

import pytest
import torch

from lavis_dcd.distillation.losses import (
    CONTRASTIVE_LOSSES,
    DISTILL_LOSSES,
    KullbackLeibler,
    reduce_rows,
)

QUERIES, WIDTH = 5, 6


def softmax(values):
    top = max(values)
    total = sum(math.exp(v - top) for v in values)
    return [math.exp(v - top) / total for v in values]


def softplus(value):
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def mean(values):
    return sum(values) / len(values) if values else 0.0


def correlation(t, s):
    a, b = [v - mean(t) for v in t], [v - mean(s) for v in s]
    norms = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


def slow_distill(name, t, s):
    """One row in plain Python, masked entries already removed; the match first."""
    if name == "mse":
        return mean([(a - b) ** 2 for a, b in zip(t, s, strict=True)])
    if name == "kl":
        p, q = softmax(t), softmax(s)
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if name == "margin_mse":
        return mean([((t[0] - t[c]) - (s[0] - s[c])) ** 2 for c in range(1, len(t))])
    if name == "pearson":
        return 1 - correlation(t, s) if len(t) > 1 else 0.0
    pairs = [(i, j) for i in range(len(t)) for j in range(len(t)) if t[i] > t[j]]
    return mean([softplus(s[j] - s[i]) for i, j in pairs])


def slow_contrastive(name, s):
    if name == "bce":
        return mean([softplus(-v) if c == 0 else softplus(v) for c, v in enumerate(s)])
    return -math.log(softmax(s)[0])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(QUERIES, WIDTH, generator=generator, dtype=torch.float64)
    student = torch.randn(QUERIES, WIDTH, generator=generator, dtype=torch.float64)
    teacher[1, 2] = teacher[1, 4]  # a tie
    valid = torch.ones(QUERIES, WIDTH, dtype=torch.bool)
    valid[1, 3] = False
    valid[2, 1:4] = False
    valid[3, 1:] = False  # a match without a negative
    valid[4, 0] = False  # no match: the row is off
    return teacher, student, valid


def kept(scores, valid):
    return [v for v, ok in zip(scores.tolist(), valid.tolist(), strict=True) if ok]


@pytest.mark.parametrize("name", sorted(DISTILL_LOSSES))
def test_distill_rows_agree_with_loops(name, batch):
    teacher, student, valid = batch
    rows = DISTILL_LOSSES[name]()(teacher, student, valid)
    expected = [slow_distill(name, kept(teacher[q], valid[q]), kept(student[q], valid[q])) for q in range(4)]
    torch.testing.assert_close(rows, torch.tensor([*expected, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(CONTRASTIVE_LOSSES))
def test_contrastive_rows_agree_with_loops(name, batch):
    _, student, valid = batch
    rows = CONTRASTIVE_LOSSES[name]()(student, valid)
    expected = [slow_contrastive(name, kept(student[q], valid[q])) for q in range(4)]
    torch.testing.assert_close(rows, torch.tensor([*expected, 0.0], dtype=torch.float64))


def test_kl_temperature_divides_both_and_scales_by_its_square(batch):
    teacher, student, valid = batch
    rows = KullbackLeibler(temperature=3.0)(teacher, student, valid)
    torch.testing.assert_close(rows, 9 * KullbackLeibler()(teacher / 3, student / 3, valid))
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        KullbackLeibler(temperature=0)


@pytest.mark.parametrize("name", sorted(DISTILL_LOSSES))
def test_what_a_student_that_equals_its_teacher_pays(name, batch):
    teacher, _, valid = batch
    rows = DISTILL_LOSSES[name]()(teacher, teacher, valid)
    if name == "ranknet":
        assert (rows[:3] > 0).all()
        assert (DISTILL_LOSSES[name]()(teacher, 100 * teacher, valid)[:3] < rows[:3]).all()
    else:
        torch.testing.assert_close(rows, torch.zeros_like(rows))


def without_teacher(loss):
    return lambda teacher, student, valid: loss(student, valid)


ALL_LOSSES = [pytest.param(loss(), id=name) for name, loss in sorted(DISTILL_LOSSES.items())]
ALL_LOSSES += [pytest.param(without_teacher(loss()), id=name) for name, loss in sorted(CONTRASTIVE_LOSSES.items())]


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_entries_never_contribute(loss, garbage, batch):
    teacher, student, valid = batch
    dirty = student.masked_fill(~valid, garbage).requires_grad_()
    rows = loss(teacher.masked_fill(~valid, garbage), dirty, valid)
    assert torch.equal(rows, loss(teacher, student, valid))
    rows.sum().backward()
    assert (dirty.grad[~valid] == 0).all() and (dirty.grad[4] == 0).all()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_very_sure_teacher_gives_finite_rows_and_gradients(loss, dtype):
    teacher = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    for scale in (1.0, 1e4):
        student = scale * torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=dtype)
        student.requires_grad_()
        rows = loss(teacher, student, torch.ones(3, 3, dtype=torch.bool))
        rows.sum().backward()
        assert rows.dtype == torch.float32 and rows.isfinite().all()
        assert student.grad.dtype == dtype and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_gradients_are_those_of_finite_differences(loss, batch):
    teacher, student, valid = batch
    assert torch.autograd.gradcheck(lambda s: loss(teacher, s, valid), student.requires_grad_())


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_permuting_queries_permutes_rows(loss, batch):
    teacher, student, valid = batch
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(loss(teacher[order], student[order], valid[order]), loss(*batch)[order])


def test_reduce_rows_checks_sizes():
    assert reduce_rows(torch.tensor([2.0, 3.0]), torch.tensor([0.5, 1.0])).item() == 4.0
    with pytest.raises(ValueError, match=r"rows \(3,\) and weights \(2,\)"):
        reduce_rows(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"rows \(\) and weights \(3,\)"):
        reduce_rows(torch.tensor(1.0), torch.ones(3))  # the release's mistake: weights that cancel out
    with pytest.raises(ValueError, match=r"rows \(3, 1\) and weights \(3, 1\)"):
        reduce_rows(torch.ones(3, 1), torch.ones(3, 1))


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match=r"one shape \[Q, 1\+K\]"):
        loss(torch.ones(3, 4), torch.ones(3, 1), torch.ones(3, 4, dtype=torch.bool))


CHANGES = {
    "shift": lambda scores: scores + torch.tensor([[3.0], [-2.0], [0.5], [1.0], [7.0]]),
    "scale": lambda scores: scores * torch.tensor([[3.0], [0.1], [0.5], [2.0], [7.0]]),
    "monotone": lambda scores: torch.atan(3 * scores) + scores**3,
}
# per term, what may happen to the teacher's and to the student's scores: the table in the module's docstring
BLIND_TO = {
    "mse": ((), ()),
    "kl": (("shift",), ("shift",)),
    "margin_mse": (("shift",), ("shift",)),
    "ranknet": (("shift", "scale", "monotone"), ("shift",)),
    "pearson": (("shift", "scale"), ("shift", "scale")),
    "bce": ((), ()),
    "listwise_ce": ((), ("shift",)),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("name", sorted(BLIND_TO))
def test_what_each_term_is_blind_to(name, change, batch):
    teacher, student, valid = batch
    of_teacher, of_student = BLIND_TO[name]
    if name in CONTRASTIVE_LOSSES:
        loss, sides = CONTRASTIVE_LOSSES[name](), [((CHANGES[change](student),), of_student)]
        before = loss(student, valid)
    else:
        loss = DISTILL_LOSSES[name]()
        changed = [(CHANGES[change](teacher), student), (teacher, CHANGES[change](student))]
        sides = list(zip(changed, (of_teacher, of_student), strict=True))
        before = loss(teacher, student, valid)
    for scores, blind in sides:
        same = torch.allclose(loss(*scores, valid), before, rtol=1e-6, atol=1e-9)
        assert same == (change in blind)


def test_every_term_says_what_it_is_blind_to():
    assert set(BLIND_TO) == {*DISTILL_LOSSES, *CONTRASTIVE_LOSSES}


def test_a_teacher_that_scores_all_alike_teaches_no_direction():
    teacher = torch.full((2, 7), 12345.678)
    teacher[1, 3] = 0.0
    student = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = DISTILL_LOSSES["pearson"]()(teacher, student, torch.ones(2, 7, dtype=torch.bool))
    rows.sum().backward()
    assert rows[0] == 0 and rows[1] > 0
    assert (student.grad[0] == 0).all() and student.grad[1].abs().sum() > 0
