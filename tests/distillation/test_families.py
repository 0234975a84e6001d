"""What "auto" stands for, and which settings go with it."""

from __future__ import annotations

import itertools

import pytest
import torch

from lavis_dcd.distillation.objective import FAMILIES, LossConfig, build_objective, config_faults, loss_defaults


@pytest.mark.parametrize(("teacher", "student"), list(itertools.product(FAMILIES, FAMILIES)))
def test_the_papers_terms_between_fusion_models_and_scale_free_ones_elsewhere(teacher, student):
    found = loss_defaults(LossConfig(), teacher, student)
    alike = teacher == student == "fusion"
    assert (found.distill, found.contrastive) == (("mse", "bce") if alike else ("kl", "listwise_ce"))
    assert found.in_batch_weight == (1.0 if student == "dual" else 0.0)
    assert found.alpha == LossConfig().alpha and config_faults(found) == []


def test_what_the_user_names_is_kept():
    given = LossConfig(distill="margin_mse", in_batch_weight=0.25, alpha=0.7)
    found = loss_defaults(given, "fusion", "dual")
    assert (found.distill, found.contrastive, found.in_batch_weight, found.alpha) == (
        "margin_mse", "listwise_ce", 0.25, 0.7,
    )  # fmt: skip
    assert given.contrastive == "auto"


def test_the_release_has_the_papers_terms_whatever_the_families():
    found = loss_defaults(LossConfig(reference="release"), "fusion", "dual")
    assert (found.distill, found.contrastive) == ("mse", "bce") and config_faults(found) == []


def test_a_temperature_is_judged_by_what_auto_became():
    given = LossConfig(temperature=2.0)
    assert config_faults(given) == []
    assert config_faults(loss_defaults(given, "fusion", "dual")) == []
    faults = config_faults(loss_defaults(given, "fusion", "fusion"))
    assert faults == ["loss.temperature: does nothing in distill 'mse'; leave it at 1 or use distill: kl"]


def test_an_unknown_family():
    with pytest.raises(ValueError, match="unknown family 'tripod' of a matcher; expected one of fusion, dual"):
        loss_defaults(LossConfig(), "dual", "tripod")


def test_a_resolved_objective_differs_from_the_papers_and_ignores_the_teachers_zero():
    teacher, student = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(4, 5, dtype=torch.bool)
    objective = build_objective(loss_defaults(LossConfig(), "fusion", "dual"))
    shifted = objective(teacher + torch.arange(4.0)[:, None], student, valid)["loss"]
    torch.testing.assert_close(objective(teacher, student, valid)["loss"], shifted)
    assert abs(build_objective(LossConfig())(teacher, student, valid)["loss"] - shifted) > 1e-2
