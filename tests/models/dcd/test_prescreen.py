"""selection.prescreen in the distiller: who chooses, what reaches the teacher, what is told; and frozen_amp."""

import pytest
import torch
from stubs import ColourMatcher as Stub

from lavis_dcd.common.errors import UserError
from lavis_dcd.distillation.objective import LossConfig
from lavis_dcd.models.dcd import DynamicContrastiveDistillation
from lavis_dcd.models.dcd.config import CandidatesConfig, DcdConfig, PrescreenConfig, SelectionConfig

SIZE = 8


def distiller(prescreen, joint=True, freeze=True, **config):
    teacher, student = Stub(1, joint=joint), Stub(2)
    if freeze:
        student.tower = teacher.tower
    selection = SelectionConfig(hard_negatives=2, prescreen=prescreen)
    return DynamicContrastiveDistillation(teacher, student, DcdConfig(selection=selection, **config)).train()


def samples(**more):
    images = torch.randn(SIZE, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return {
        "image": images,
        "text_input": [f"caption {'x' * (3 * i % 7)} {i}" for i in range(SIZE)],
        "image_id": torch.arange(SIZE),
        "epoch": 0, "iters": 1, "num_iters_per_epoch": 100, **more,
    }  # fmt: skip


def most_promising_pairs(table, keep):
    """Per direction the matches and the ``keep`` best of each row, by plain sorting."""
    pairs = set()
    for q in range(SIZE):
        for row, order in ((table[q], lambda q, c: (q, c)), (table[:, q], lambda q, c: (c, q))):
            others = sorted((c for c in range(SIZE) if c != q), key=lambda c, row=row: -float(row[c]))[:keep]
            pairs |= {order(q, c) for c in [q, *others]}
    return pairs


def tables(model, batch):
    images, texts = model.student.encode_images(batch["image"]), model.student.encode_texts(batch["text_input"])
    joint = model.teacher.embed_images(images) @ model.teacher.embed_texts(texts).T
    return {"joint": joint, "student": model.student.match_all(images, texts)}


@pytest.mark.parametrize("by", ["joint", "student"])
def test_only_the_most_promising_reach_the_teacher(by):
    model, batch = distiller(PrescreenConfig(by=by, keep=3)), samples()
    with torch.no_grad():
        expected = most_promising_pairs(tables(model, batch)[by], 3)
    model.teacher.matched.clear()
    output = model(batch)
    assert model.teacher.matched == [expected]
    assert "prescreen_found" not in output  # step 1 is not due


def test_random_candidates_are_as_many():
    model = distiller(PrescreenConfig(by="random", keep=3), joint=False)
    model(samples())
    assert SIZE * 4 <= len(model.teacher.matched[0]) <= SIZE * 7


def test_on_steps_that_are_due_the_share_found_is_told_and_the_loss_is_the_same():
    model = distiller(PrescreenConfig(keep=3, check_every=50))
    quiet, due = model(samples(iters=51)), model(samples(epoch=2, iters=0))
    torch.testing.assert_close(due["loss"], quiet["loss"])
    assert "prescreen_found" not in quiet
    batch = samples()
    with torch.no_grad():
        joint = tables(model, batch)["joint"]
        images, texts = model.teacher.encode_images(batch["image"]), model.teacher.encode_texts(batch["text_input"])
        teacher = model.teacher.match_all(images, texts)
    shares = []
    for cheap, true in ((joint, teacher), (joint.T, teacher.T)):
        for q in range(SIZE):
            others = [c for c in range(SIZE) if c != q]
            hardest = set(sorted(others, key=lambda c: -float(true[q, c]))[:2])
            kept = set(sorted(others, key=lambda c: -float(cheap[q, c]))[:3])
            shares.append(len(hardest & kept) / 2)
    assert float(due["prescreen_found"]) == pytest.approx(sum(shares) / len(shares))
    assert 0 < float(due["prescreen_found"]) < 1
    assert 0 < float(due["prescreen_range"]) < 1 and "prescreen_range" not in quiet


def test_keeping_all_changes_nothing():
    all_of_them, plain = distiller(PrescreenConfig(keep=SIZE)), distiller(None)
    torch.testing.assert_close(all_of_them(samples())["loss"], plain(samples())["loss"])


@pytest.mark.parametrize(
    ("prescreen", "more", "line"),
    [
        (PrescreenConfig(keep=1), {}, "keep: 1, but selection.hard_negatives is 2"),
        (PrescreenConfig(keep=4, check_every=-1), {}, "check_every: -1 must not be negative"),
        (PrescreenConfig(keep=4), {"candidates": CandidatesConfig(teacher_budget=30)}, "candidates.teacher_budget"),
        (PrescreenConfig(keep=4), {"loss": LossConfig(reference="release")}, "loss.reference: release"),
    ],
)
def test_settings_that_cannot_work_are_refused(prescreen, more, line):
    with pytest.raises(UserError, match=line):
        distiller(prescreen, **more)


def test_joint_needs_a_joint_space():
    with pytest.raises(UserError, match=r"prescreen.by: joint, but neither"):
        distiller(PrescreenConfig(keep=4), joint=False)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_amp_is_for_what_does_not_learn(freeze):
    plain, model = distiller(None, freeze=freeze), distiller(None, freeze=freeze, frozen_amp="bf16")
    expected, found = plain(samples()), model(samples())
    # a teacher with encoders of its own makes its features in half precision, too
    assert model.teacher.types == {(torch.float32 if freeze else torch.bfloat16, True)}
    assert model.student.types == {(torch.float32, False)}
    assert found["loss"].dtype == torch.float32
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0.05, atol=0.0)
    assert found["loss"] != expected["loss"]
    found["loss"].backward()
    assert model.student.fusion.weight.grad.dtype == torch.float32
    assert (model.student.tower.weight.grad is None) == freeze
