"""The distiller around stub matchers: what it computes, what it keeps out of the way, what it encodes."""

import itertools

import pytest
import torch
from stubs import ColourMatcher as Stub
from stubs import colour_samples as samples

from lavis_dcd.common.errors import UserError
from lavis_dcd.distillation.objective import LossConfig
from lavis_dcd.models.dcd import DynamicContrastiveDistillation
from lavis_dcd.models.dcd.config import CandidatesConfig, DcdConfig, PoolConfig, SelectionConfig


def distiller(share: bool = True, teacher: Stub | None = None, **config) -> DynamicContrastiveDistillation:
    teacher, student = teacher or Stub(1), Stub(2)
    if share:
        student.tower = teacher.tower
    config.setdefault("selection", SelectionConfig(hard_negatives=2))
    return DynamicContrastiveDistillation(teacher, student, DcdConfig(share_encoders=share, **config))


def by_hand(model, batch, hard_negatives: int) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Kept candidates, teacher's and student's scores of every query, by plain loops over the whole batch."""
    ids, size = batch["image_id"].tolist(), len(batch["text_input"])
    image, text = model.teacher.encode_images(batch["image"]), model.teacher.encode_texts(batch["text_input"])
    rows = []
    for direction, query in itertools.product(("i2t", "t2i"), range(size)):
        others = [c for c in range(size) if ids[c] != ids[query]]
        if direction == "t2i":  # each picture once
            others = [c for c in others if c == ids.index(ids[c])]

        def pairs(candidates, query=query, direction=direction):
            return torch.tensor([(query, c) if direction == "i2t" else (c, query) for c in candidates])

        hardness = model.teacher.match(image, text, pairs(others))
        kept = [query] + [others[i] for i in hardness.argsort(descending=True)[:hard_negatives]]
        both = [matcher.match(image, text, pairs(kept)) for matcher in (model.teacher, model.student)]
        rows.append((kept, *both))
    return rows


def test_loss_equals_the_method_written_out():
    model = distiller(loss=LossConfig(weighting="entropy_share"))
    batch = samples()
    with torch.no_grad():
        result = model(batch)
        total = 0.0
        rows = by_hand(model, batch, 2)
        for part in (rows[:6], rows[6:]):
            teacher, student = torch.stack([r[1] for r in part]), torch.stack([r[2] for r in part])
            log_p = teacher.log_softmax(1)
            entropy = -(log_p.exp() * log_p).sum(1)
            share = entropy / entropy.sum()
            distill = (((1 - share) ** 2).softmax(0) * (teacher - student).square().mean(1)).sum()
            truth = torch.zeros_like(student)
            truth[:, 0] = 1
            bce = torch.nn.functional.binary_cross_entropy_with_logits(student, truth, reduction="none").mean(1)
            total += 0.2 * distill + 0.8 * (share * bce).sum()
    torch.testing.assert_close(result["loss"], total / 2)
    torch.testing.assert_close(result["loss"], 0.2 * result["distill_loss"] + 0.8 * result["contrastive_loss"])


def test_each_distinct_item_is_encoded_once_for_both():
    model = distiller()
    model(samples())
    assert model.student.images_seen == 5 and model.teacher.images_seen == 0
    assert len(model.student.texts_seen) == len(set(model.student.texts_seen)) == 6
    apart = distiller(share=False)
    apart(samples())
    assert (apart.student.images_seen, apart.teacher.images_seen) == (5, 5)


def test_each_pair_reaches_the_teacher_once():
    model = distiller()
    model(samples())
    assert model.teacher.pairs_seen <= 5 * 6


def test_teacher_stays_out_of_the_way():
    teacher = Stub(1, dropout=0.5)
    model = distiller(teacher=teacher, share=False)
    model.train()
    assert not any(m.training for m in teacher.modules()) and model.student.training
    assert not any(name.startswith(("teacher", "_teacher")) for name in model.state_dict())
    assert {id(p) for p in teacher.parameters()}.isdisjoint(id(p) for p in model.parameters())
    before = [p.clone() for p in teacher.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(samples())["loss"].backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert next(model.double().teacher.parameters()).dtype == torch.float64


def test_shared_encoders_are_frozen_and_saved_with_the_student():
    model = distiller()
    assert not model.student.tower.weight.requires_grad
    assert "student.tower.weight" in model.state_dict()
    assert model.student.shares_encoders_with(model.teacher)


def test_random_captions_from_the_data_set():
    model = distiller(
        candidates=CandidatesConfig(image_to_text=PoolConfig("random", 3), text_to_image=None),
        selection=SelectionConfig(hard_negatives=2),
    )
    assert model.random_captions_per_image == 3
    batch = samples(4)
    batch["candidate_text"] = [f"drawn {'y' * i}" for i in range(12)]
    batch["candidate_image_id"] = torch.arange(100, 112).view(4, 3)
    result = model(batch)
    assert torch.isfinite(result["loss"])
    assert set(model.student.texts_seen) == set(batch["text_input"]) | set(batch["candidate_text"])
    # a drawn caption of the query's own picture is no candidate
    batch["candidate_image_id"][0] = 0
    assert torch.isfinite(model(batch)["loss"])


def test_ground_truth_alone_never_asks_the_teacher():
    model = distiller(
        loss=LossConfig(alpha=0.0, weighting="uniform", contrastive="listwise_ce"),
        selection=SelectionConfig(hard_negatives=2, strategy="random"),
    )
    result = model(samples())
    assert model.teacher.pairs_seen == 0
    result["loss"].backward()
    assert model.student.fusion.weight.grad.abs().sum() > 0


def test_chunked_student_gives_the_same_gradient():
    gradients = []
    for chunk in (None, 3):
        model = distiller(student_chunk_pairs=chunk)
        model(samples())["loss"].backward()
        gradients.append(model.student.fusion.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_diagnostics_count_what_the_teacher_misranks():
    model = distiller()
    rows = by_hand(model, samples(), 2)
    misranked = sum(float(r[1][1:].max() >= r[1][0]) for r in rows) / len(rows)
    assert float(model(samples())["teacher_misranked"]) == pytest.approx(misranked)


def test_a_student_with_nothing_to_learn_is_refused():
    student = Stub(2).requires_grad_(False)
    with pytest.raises(UserError, match="no parameter would learn"):
        DynamicContrastiveDistillation(Stub(1), student, DcdConfig())


def test_pools_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"text_to_image\.source: .*image_to_text only"):
        distiller(candidates=CandidatesConfig(text_to_image=PoolConfig("random", 4)))
    with pytest.raises(UserError, match="nothing would be distilled"):
        distiller(candidates=CandidatesConfig(image_to_text=None, text_to_image=None))


def test_fingerprint_changes_with_one_weight():
    model = distiller(share=False)
    before = model.teacher_fingerprint()
    with torch.no_grad():
        model.teacher.fusion.weight[0, 0, 0] += 1
    assert model.teacher_fingerprint() != before
