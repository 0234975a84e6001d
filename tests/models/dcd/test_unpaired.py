"""Distillation without captions of the pictures: the whole loss by plain loops, and what it must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stubs import ColourMatcher, DualColourMatcher

from lavis_dcd.common.errors import UserError
from lavis_dcd.distillation.objective import LossConfig
from lavis_dcd.models.dcd import DynamicContrastiveDistillation
from lavis_dcd.models.dcd.checks import section_faults
from lavis_dcd.models.dcd.config import BankConfig, CandidatesConfig, DcdConfig, PrescreenConfig, SelectionConfig

# one picture and one text come twice, the text beside two pictures
PICTURES = [0, 1, 2, 3, 4, 0]
TEXTS = ["a dog", "two cats sit", "a dog", "rain on a street", "x", "boats"]


def samples(order: list[int] | None = None) -> dict[str, Any]:
    images = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    texts = [TEXTS[i] for i in order or range(len(TEXTS))]
    return {"image": images[PICTURES], "text_input": texts, "image_id": torch.tensor(PICTURES), "draw_seed": 3}


def distiller(
    hard_negatives: int | None = 2, dual: bool = False, match: str = "teacher", **selection: Any
) -> DynamicContrastiveDistillation:
    kind = DualColourMatcher if dual else ColourMatcher
    return DynamicContrastiveDistillation(
        ColourMatcher(1),
        kind(2),
        DcdConfig(
            share_encoders=False,
            candidates=CandidatesConfig(match=match),
            selection=SelectionConfig(hard_negatives=hard_negatives, **selection),
            loss=LossConfig(alpha=1.0, weighting="uniform", distill="kl"),
        ),
    )


def losses_by_loops(model: DynamicContrastiveDistillation, batch: dict[str, Any], keep: int | None) -> torch.Tensor:
    """KL over the teacher's top and the next ``keep`` of all distinct texts (pictures), mean of queries, then of both
    directions."""
    teacher, student = model.teacher, model.student
    tables = []
    for matcher in (teacher, student):
        images, texts = matcher.encode_images(batch["image"]), matcher.encode_texts(batch["text_input"])
        size = len(PICTURES)
        every = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        tables.append(matcher.match(images, texts, every).view(size, size))
    firsts = [
        [i for i, item in enumerate(items) if items.index(item) == i]
        for items in (batch["text_input"], batch["image_id"].tolist())
    ]
    means = []
    for direction, columns in enumerate(firsts):
        rows = []
        for query in range(len(PICTURES)):
            one, other = ((t[query] if direction == 0 else t[:, query])[columns] for t in tables)
            kept = one.argsort(descending=True)[: len(columns) if keep is None else 1 + keep]
            target, output = one[kept].detach().log_softmax(0), other[kept].log_softmax(0)
            rows.append((target.exp() * (target - output)).sum())
        means.append(torch.stack(rows).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("keep", [2, None])
def test_loss_and_gradients_equal_the_method_written_out(keep, dual):
    model = distiller(keep, dual)
    found = model(samples())["loss"]
    expected = losses_by_loops(model, samples(), keep)
    torch.testing.assert_close(found, expected)
    weights = [p for p in model.student.parameters() if p.requires_grad]
    grads = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (found, expected))
    compared = 0
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
            compared += int(one.abs().sum() > 1e-6)
    assert compared >= 2


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("keep", [2, None])
def test_what_comes_with_which_picture_changes_nothing(keep, dual):
    """Any pairing of the same pictures and texts, the true one among them, gives the same loss and gradients."""
    results = []
    for order in (None, [3, 1, 5, 0, 2, 4], [5, 4, 3, 2, 1, 0]):
        model = distiller(keep, dual)
        out = model(samples(order))
        out["loss"].backward()
        results.append((out["loss"].detach(), {n: p.grad for n, p in model.student.named_parameters()}))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], atol=1e-6, rtol=1e-4)
    model = distiller(keep, dual, match="given")
    given = [model(samples(order))["distill_loss"] for order in (None, [3, 1, 5, 0, 2, 4])]
    assert not torch.allclose(*given), "with given matches the pairing counts"


def test_stratified_pictures_draw_alike_whatever_their_texts():
    """A query draws by its place in the batch; the pictures keep theirs as texts change places."""
    found = []
    for order in (None, [3, 1, 5, 0, 2, 4]):
        model = distiller(2, strategy="stratified")
        model.pools = model.pools[:1]
        found.append(model(samples(order))["loss"])
    torch.testing.assert_close(found[0], found[1])


def test_diagnostics_speak_of_the_top():
    model = distiller(2)
    out = model(samples())
    names = {name for name in out if name.startswith(("teacher", "student"))}
    assert names == {"teacher_top_score", "teacher_others_score", "student_top_score", "student_others_score",
                     "student_top_misranked", "student_spread"}  # fmt: skip
    assert "contrastive_loss" not in out
    assert out["teacher_top_score"] > out["teacher_others_score"]


def test_the_batch_s_pairs_are_not_learnt_from():
    assert "in_batch_loss" not in distiller(dual=True)(samples())
    assert "in_batch_loss" in distiller(dual=True, match="given")(samples())


REFUSED = {
    "model.loss.alpha": {"loss": LossConfig(alpha=0.2, weighting="uniform")},
    "model.loss.in_batch_weight": {"loss": LossConfig(alpha=1.0, in_batch_weight=0.5)},
    "model.loss.student_weight": {"loss": LossConfig(alpha=1.0, student_weight=0.5)},
    "model.loss.weighting": {"loss": LossConfig(alpha=1.0, weighting="wsl")},
    "model.loss.reference": {"loss": LossConfig(alpha=1.0, reference="release", distill="mse")},
    "model.candidates.image_to_text.source": {
        "candidates": CandidatesConfig(match="teacher", source="bank", text_to_image=None, bank=BankConfig())
    },
    "model.candidates.teacher_budget": {"candidates": CandidatesConfig(match="teacher", teacher_budget=20)},
    "model.selection.prescreen": {"selection": SelectionConfig(hard_negatives=2, prescreen=PrescreenConfig())},
    "model.selection.margin": {"selection": SelectionConfig(hard_negatives=2, margin=1.0)},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_needs_the_truth_is_refused_in_one_line(key):
    settings = {"candidates": CandidatesConfig(match="teacher"), "loss": LossConfig(alpha=1.0), **REFUSED[key]}
    with pytest.raises(UserError) as caught:
        DynamicContrastiveDistillation(ColourMatcher(1), DualColourMatcher(2), DcdConfig(**settings))
    (line,) = caught.value.faults
    assert line.startswith(f"{key}: ") and "candidates.match: teacher" in line


def test_the_confidence_gap_needs_the_match_and_the_entropy_does_not():
    for weighting, sound in (("confidence_gap", False), ("wsl", False), ("entropy_share", True), ("uniform", True)):
        section = {
            "student": {"arch": "dual_encoder"},
            "teacher": {"arch": "dual_encoder"},
            "candidates": {"match": "teacher"},
            "loss": {"alpha": 1.0, "weighting": weighting},
        }
        assert bool(section_faults(section, "model")) != sound
