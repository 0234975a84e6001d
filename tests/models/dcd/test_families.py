"""The distiller across families: dual-encoder students, several teachers, a budget, the student's own loss, views."""

import pytest
import torch
from stubs import ColourMatcher as Reader
from stubs import DualColourMatcher as Dual
from stubs import colour_samples as samples
from torch.nn import functional as nnf

from lavis_dcd.common.errors import UserError
from lavis_dcd.distillation.objective import LossConfig
from lavis_dcd.models.dcd import DynamicContrastiveDistillation
from lavis_dcd.models.dcd.config import CandidatesConfig, DcdConfig, PoolConfig, SelectionConfig
from lavis_dcd.models.dcd.teachers import Teachers


def distiller(teacher, student, /, **config) -> DynamicContrastiveDistillation:
    config.setdefault("selection", SelectionConfig(hard_negatives=2))
    return DynamicContrastiveDistillation(teacher, student, DcdConfig(**config))


def infonce_by_loops(scores: torch.Tensor, ids: list[int], rows: list[int]) -> torch.Tensor:
    """Both directions; a query's own match against everything that shows another picture. ``scores [I, T]``."""
    losses = []
    for text, image in enumerate(rows):
        others = [t for t in range(len(ids)) if ids[t] != ids[text]]
        losses.append(-scores[image, [text, *others]].log_softmax(0)[0])
    forward = sum(losses) / len(losses)
    losses = []
    for text, image in enumerate(rows):
        others = [i for i in range(len(scores)) if i != image]
        losses.append(-scores[[image, *others], text].log_softmax(0)[0])
    return (forward + sum(losses) / len(losses)) / 2


def test_terms_follow_the_families():
    for teacher, student, terms in (
        (Reader(1), Reader(2), ("mse", "bce", 0.0)),
        (Reader(1), Dual(2), ("kl", "listwise_ce", 1.0)),
        (Dual(1), Reader(2), ("kl", "listwise_ce", 0.0)),
        (Dual(1), Dual(2), ("kl", "listwise_ce", 1.0)),
    ):
        found = distiller(teacher, student).loss_config
        assert (found.distill, found.contrastive, found.in_batch_weight) == terms
    asked = distiller(Reader(1), Dual(2), loss=LossConfig(distill="margin_mse", in_batch_weight=0.25)).loss_config
    assert (asked.distill, asked.contrastive, asked.in_batch_weight) == ("margin_mse", "listwise_ce", 0.25)


def test_a_dual_student_learns_from_all_pairs_and_from_the_hard_ones():
    model = distiller(Reader(1), Dual(2), loss=LossConfig(in_batch_weight=0.5))
    batch = samples()
    result = model(batch)
    rows = [0, 1, 2, 3, 4, 0]
    with torch.no_grad():
        scores = model.student.match_all(
            model.student.encode_images(batch["image"][:5]), model.student.encode_texts(batch["text_input"])
        )
    expected = infonce_by_loops(scores, batch["image_id"].tolist(), rows)
    torch.testing.assert_close(result["in_batch_loss"].detach(), expected)
    parts = 0.2 * result["distill_loss"] + 0.8 * result["contrastive_loss"] + 0.5 * result["in_batch_loss"]
    torch.testing.assert_close(result["loss"], parts)
    result["loss"].backward()
    assert model.student.tower.weight.grad.abs().sum() > 0


def test_a_dual_students_gathered_scores_are_its_matches():
    batch = samples()
    losses = []
    for student in (Dual(2), Dual(2)):
        losses.append(distiller(Reader(1), student, loss=LossConfig(in_batch_weight=0.0))(batch)["loss"])
        Dual.family = "fusion"  # the second time pair by pair
        try:
            loss = LossConfig(distill="kl", contrastive="listwise_ce", in_batch_weight=0.0)
            losses.append(distiller(Reader(1), Dual(2), loss=loss)(batch)["loss"])
        finally:
            Dual.family = "dual"
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other)


@pytest.mark.parametrize("student", [Dual, Reader])
def test_the_teacher_scores_no_more_than_its_budget(student):
    model = distiller(Reader(1), student(2), candidates=CandidatesConfig(teacher_budget=18))
    model(samples())
    assert 0 < model.teacher.pairs_seen <= 2 * 18
    everything = distiller(Reader(1), student(2))
    everything(samples())
    assert model.teacher.pairs_seen < everything.teacher.pairs_seen


def test_all_candidates_may_be_kept():
    model = distiller(Reader(1), Reader(2), selection=SelectionConfig(hard_negatives=None))
    batch = samples()
    result = model(batch)
    assert torch.isfinite(result["loss"])
    # five pictures and six captions, less what shares a picture
    assert model.student.pairs_seen == 5 * 6


def test_several_teachers_are_standardised_per_query_and_averaged():
    one, two = Reader(1), Reader(3)
    student = Reader(2)
    batch = samples()
    selection = SelectionConfig(hard_negatives=None)
    seen = {}

    def objective(teacher_scores, student_scores, valid, log_counts):
        seen.setdefault("teacher", []).append((teacher_scores, valid))
        return {"loss": student_scores.sum()}

    model = distiller(Teachers([one, two], [1.0, 3.0]), student, selection=selection)
    model.objective, objective.needs_teacher = objective, True
    model(batch)
    separate = []
    for teacher in (one, two):
        alone = distiller(teacher, Reader(2), selection=selection)
        alone.objective = objective
        seen["teacher"], kept = [], seen["teacher"]
        alone(batch)
        separate.append(seen["teacher"])
        seen["teacher"] = kept
    for direction, (table, valid) in enumerate(seen["teacher"][:2]):
        for query in range(len(table)):
            keep = valid[query]
            parts = [scores[direction][0][query][keep] for scores in separate]
            z = [(p - p.mean()) / p.std(unbiased=False) for p in parts]
            mixed = (z[0] + 3 * z[1]) / 4
            got = table[query][keep]
            shapes = [(x - x.mean()) / x.std(unbiased=False) for x in (got, mixed)]
            torch.testing.assert_close(*shapes, atol=1e-4, rtol=1e-4)


def test_several_teachers_stay_out_of_the_way_and_stand_as_one():
    model = distiller(Teachers([Reader(1), Reader(3)]), Reader(2))
    assert not any("teach" in name for name, _ in model.named_modules())
    assert len(model.teacher.members) == 2 and set(model.matchers()) == {"teacher", "student"}
    before = model.teacher_fingerprint()
    with torch.no_grad():
        model.teachers.matchers[1].fusion.bias += 1
    assert model.teacher_fingerprint() != before
    assert model.double() and all(p.dtype == torch.float64 for m in model.teachers.matchers for p in m.parameters())


def test_the_students_own_loss_is_mixed_in():
    class WithLoss(Reader):
        def forward(self, batch):
            assert isinstance(batch["image"], torch.Tensor)
            features = self.encode_images(batch["image"])
            return {"loss": features.tokens.square().mean()}

    student = WithLoss(2)
    batch = samples()
    plain = distiller(Reader(1), WithLoss(2))(batch)
    mixed = distiller(Reader(1), student, loss=LossConfig(student_weight=0.7))(batch)
    own = student(batch)["loss"]
    torch.testing.assert_close(mixed["student_loss"], own)
    torch.testing.assert_close(mixed["loss"], plain["loss"] + 0.7 * own)
    with pytest.raises(UserError, match=r"ColourMatcher has no training loss .*student_weight"):
        distiller(Reader(1), Reader(2), loss=LossConfig(student_weight=0.7))(batch)


def test_each_side_reads_its_own_pictures_and_captions():
    model = distiller(Reader(1), Reader(2))
    batch = samples()
    small, large = batch["image"], nnf.interpolate(batch["image"], size=(4, 4))
    batch["image"] = {"student": small, "teacher": large}
    batch["text_input"] = {"student": batch["text_input"], "teacher": [t.upper() for t in batch["text_input"]]}
    model(batch)
    assert (model.student.sizes_seen, model.teacher.sizes_seen) == ([2], [4])
    assert model.teacher.texts_seen == [t.upper() for t in model.student.texts_seen]
    assert list(model.views()) == ["teacher"] == list(model.view_matchers())


def test_captions_that_one_side_cannot_tell_apart_keep_their_rows():
    """The rows are the student's; a teacher that reads two captions as one text encodes it once for both."""
    model = distiller(Reader(1), Reader(2))
    batch = samples()
    same = ["one text"] * 6
    batch["text_input"] = {"student": batch["text_input"], "teacher": same}
    assert torch.isfinite(model(batch)["loss"])
    assert model.teacher.texts_seen == ["one text"]
    assert len(model.student.texts_seen) == 6


def test_release_arithmetic_refuses_what_it_never_had():
    loss = LossConfig(reference="release", distill="mse", contrastive="bce")
    for config in (
        {"selection": SelectionConfig(hard_negatives=None)},
        {"candidates": CandidatesConfig(PoolConfig(), PoolConfig(), teacher_budget=8)},
    ):
        with pytest.raises(UserError, match="release knows no"):
            distiller(Reader(1), Reader(2), loss=loss, **config)


def test_who_names_processors_reads_through_them():
    section = {"arch": "any", "preprocess": {"text_processor": {"eval": {"name": "dcd_caption"}}}}
    teacher, student = Reader(1), Reader(2)
    student.tower = teacher.tower
    assert distiller(teacher, student).views() == {}
    own = distiller(teacher, student, teacher=section)
    assert own.views() == {"teacher": section} and own.view_matchers() == {"teacher": teacher}
    assert distiller(teacher, student, student=section).views() == {"student": section}


def test_a_teacher_with_a_view_of_its_own_shares_no_features():
    teacher, student = Reader(1), Reader(2)
    student.tower = teacher.tower
    model = distiller(teacher, student)
    batch = samples()
    batch["text_input"] = {"student": batch["text_input"], "teacher": [t.upper() for t in batch["text_input"]]}
    model(batch)
    assert len(teacher.texts_seen) == 6 and teacher.texts_seen[0].isupper()
