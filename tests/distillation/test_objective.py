from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lavis_dcd.distillation.losses import CONTRASTIVE_LOSSES, DISTILL_LOSSES, MeanSquaredError, reduce_rows
from lavis_dcd.distillation.objective import FAMILIES, LossConfig, build_objective, config_faults, loss_defaults
from lavis_dcd.distillation.weighting import WEIGHTINGS, EntropyShare

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "dcd_loss.safetensors")
CASES = [(name, temperature) for name in "abc" for temperature in (1, 2)]


class Case:
    def __init__(self, name: str, temperature: int) -> None:
        prefix = f"{name}.T{temperature}."
        self.golden = {key.removeprefix(prefix): v for key, v in GOLDEN.items() if key.startswith(prefix)}
        self.teacher = self.golden["teacher"]
        self.student = self.golden["student"].clone().requires_grad_()
        self.valid = torch.ones_like(self.teacher, dtype=torch.bool)
        self.temperature = temperature

    def close(self, value: torch.Tensor, key: str) -> None:
        torch.testing.assert_close(value.detach(), self.golden[key], rtol=1e-5, atol=1e-9)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}.T{case[1]}")
def case(request):
    return Case(*request.param)


def test_release_reproduces_the_published_loss_and_gradient(case):
    objective = build_objective(LossConfig(reference="release", temperature=case.temperature))
    out = objective(case.teacher, case.student, case.valid)
    case.close(out["loss"], "loss")
    case.close(out["distill_loss"], "distill")
    case.close(out["contrastive_loss"], "contrastive")
    out["loss"].backward()
    case.close(case.student.grad, "grad")


def test_release_reproduces_the_published_weighted_soft_labels(case):
    objective = build_objective(LossConfig(reference="release", weighting="wsl", temperature=case.temperature))
    out = objective(case.teacher, case.student, case.valid)
    case.close(out["loss"], "wsl_loss")
    case.close(out["distill_loss"], "wsl_distill")
    case.close(out["contrastive_loss"], "wsl_ce")
    out["loss"].backward()
    case.close(case.student.grad, "wsl_grad")


def test_entropy_shares_and_weights(case):
    weights = EntropyShare()(case.teacher, case.student, case.valid)
    case.close(weights.contrastive, "entropy_share")
    case.close(weights.distill, "distill_weight")


def test_paper_applies_the_weights_row_by_row(case):
    rows = MeanSquaredError()(case.teacher, case.student, case.valid)
    case.close(rows / case.temperature**2, "per_sample_mse")
    weights = EntropyShare()(case.teacher, case.student, case.valid)
    case.close(reduce_rows(rows, weights.distill), "distill_weighted_per_sample")
    out = build_objective(LossConfig(weighting="entropy_share"))(case.teacher, case.student, case.valid)
    case.close(out["distill_loss"], "distill_weighted_per_sample")
    case.close(out["contrastive_loss"], "contrastive")
    expected = 0.2 * case.golden["distill_weighted_per_sample"] + 0.8 * case.golden["contrastive"]
    torch.testing.assert_close(out["loss"].detach(), expected, rtol=1e-5, atol=0)


def paper_configs():
    for distill in DISTILL_LOSSES:
        for weighting in WEIGHTINGS:
            for contrastive in CONTRASTIVE_LOSSES:
                yield LossConfig(distill=distill, weighting=weighting, contrastive=contrastive)


def label(config):
    return f"{config.distill}-{config.weighting}-{config.contrastive}"


@pytest.mark.parametrize("config", list(paper_configs()), ids=label)
def test_a_very_sure_teacher_gives_finite_values_and_gradients(config):
    teacher = torch.tensor([[1e4, -1e4, 0.0, 1.0], [-1e4, 1e4, 1e4, 0.0], [1e4, 0.0, -1e4, 5.0]])
    valid = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])
    student = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 0.0, -1.0, 9.0], [1e4, 0.0, 0.0, 0.0]])
    student.requires_grad_()
    out = build_objective(config)(teacher, student, valid)
    out["loss"].backward()
    assert all(value.isfinite() and value.dim() == 0 for value in out.values())
    assert student.grad.isfinite().all() and (student.grad[~valid] == 0).all()


def test_the_release_turns_to_nan_on_a_very_sure_teacher():
    teacher = torch.tensor([[1e4, -1e4]])
    out = build_objective(LossConfig(reference="release"))(teacher, torch.zeros(1, 2), torch.ones(1, 2).bool())
    assert out["loss"].isnan()


def test_the_release_is_blind_to_gamma_and_temperature(case):
    first = build_objective(LossConfig(reference="release"))
    second = build_objective(LossConfig(reference="release", gamma=9.0, temperature=5.0))
    assert first(case.teacher, case.student, case.valid) == second(case.teacher, case.student, case.valid)


@pytest.mark.parametrize("reference", ["paper", "release"])
@pytest.mark.parametrize("weighting", ["entropy_share", "wsl"])
def test_masked_entries_and_unmatched_rows_equal_their_absence(reference, weighting):
    generator = torch.Generator().manual_seed(5)
    teacher, student = torch.randn(2, 4, 6, generator=generator)
    valid = torch.ones(5, 8, dtype=torch.bool)
    valid[:, 6:] = False
    valid[4, 0] = False
    objective = build_objective(LossConfig(reference=reference, weighting=weighting))
    small = objective(teacher, student, valid[:4, :6])
    padded = [torch.nn.functional.pad(x, (0, 2, 0, 1), value=float("nan")) for x in (teacher, student)]
    large = objective(*padded, valid)
    for key, value in small.items():
        torch.testing.assert_close(large[key], value)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(list(paper_configs())), st.permutations(range(6)), st.integers(0, 1000))
def test_the_order_of_queries_does_not_matter(config, order, seed):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 6, 5, generator=generator)
    valid = torch.rand(6, 5, generator=generator) > 0.2
    objective = build_objective(config)
    first, second = (
        objective(teacher, student, valid),
        objective(teacher[order], student[order], valid[order]),
    )
    for key in first:
        torch.testing.assert_close(first[key], second[key])


@pytest.mark.parametrize("reference", ["paper", "release"])
def test_terms_left_to_the_families_are_the_papers_unless_resolved(reference, case):
    named = LossConfig(reference=reference, distill="mse", contrastive="bce")
    expected = build_objective(named)(case.teacher, case.student, case.valid)
    assert build_objective(LossConfig(reference=reference))(case.teacher, case.student, case.valid) == expected


def test_weights_are_uniform_unless_another_weighting_or_the_release_is_named(case):
    def run(**settings):
        return build_objective(LossConfig(**settings))(case.teacher, case.student, case.valid)["loss"]

    assert run() == run(weighting="uniform") != run(weighting="entropy_share")
    assert run(reference="release") == run(reference="release", weighting="entropy_share")
    for reference, weighting in (("paper", "uniform"), ("release", "entropy_share")):
        assert loss_defaults(LossConfig(reference=reference), "fusion", "dual").weighting == weighting
        named = LossConfig(reference=reference, weighting="wsl")
        assert loss_defaults(named, "fusion", "dual").weighting == "wsl"
    assert not build_objective(LossConfig(alpha=0)).needs_teacher


def test_what_uniform_weights_do_not_have_is_refused_where_no_weighting_is_named():
    (fault,) = config_faults(LossConfig(gamma=3.0))
    assert fault.startswith("loss.gamma: does nothing in uniform weights; name a loss.weighting")
    assert config_faults(LossConfig(entropy_floor=0.1))[0].startswith("loss.entropy_floor: does nothing")
    for sound in (
        {"weighting": "entropy_share", "gamma": 3.0},
        {"weighting": "uniform", "gamma": 3.0},  # a variant of a job that has it
        {"reference": "release", "gamma": 3.0},  # blind to it, as it was published
    ):
        assert config_faults(LossConfig(**sound)) == []


def test_alpha_zero_trains_without_a_teacher():
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    valid = torch.ones(4, 3, dtype=torch.bool)
    objective = build_objective(LossConfig(alpha=0, weighting="uniform"))
    assert not objective.needs_teacher
    out = objective(None, student, valid)
    target = torch.zeros(4, 3)
    target[:, 0] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(student, target)
    torch.testing.assert_close(out["loss"], expected)
    assert out["distill_loss"] == 0
    out["loss"].backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "config",
    [LossConfig(alpha=0, weighting="entropy_share"), LossConfig(), LossConfig(reference="release", alpha=0)],
    ids=["entropies need it", "distillation needs it", "the release needs it"],
)
def test_a_missing_teacher_is_named(config):
    objective = build_objective(config)
    assert objective.needs_teacher
    with pytest.raises(ValueError, match="needs teacher_scores, got None"):
        objective(None, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))


def test_no_gradient_reaches_the_teacher(case):
    teacher = case.teacher.clone().requires_grad_()
    for reference in ("paper", "release"):
        build_objective(LossConfig(reference=reference))(teacher, case.student, case.valid)["loss"].backward()
    assert teacher.grad is None


def test_knobs_reach_the_parts(case):
    def run(**settings):
        return build_objective(LossConfig(**settings))(case.teacher, case.student, case.valid)["loss"]

    assert run(distill="kl", temperature=4.0) != run(distill="kl")
    assert run(weighting="entropy_share", gamma=0.0) != run(weighting="entropy_share")
    assert run(weighting="entropy_normalised", entropy_floor=0.9) != run(weighting="entropy_normalised")


@pytest.mark.parametrize("distill", sorted(DISTILL_LOSSES))
@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
def test_the_teachers_temperature_divides_its_scores_and_no_others(case, distill, weighting):
    settings = {"alpha": 0.5, "distill": distill, "weighting": weighting}
    softened = build_objective(LossConfig(**settings, teacher_temperature=2.5))(case.teacher, case.student, case.valid)
    by_hand = build_objective(LossConfig(**settings))(case.teacher / 2.5, case.student, case.valid)
    for name, value in by_hand.items():
        assert torch.equal(softened[name], value), name


def test_every_fault_of_a_config_is_listed():
    assert config_faults(LossConfig(teacher_temperature=0)) == ["loss.teacher_temperature: must be above 0, got 0"]
    released = LossConfig(reference="release", teacher_temperature=2)
    assert config_faults(released) == ["loss.teacher_temperature: reference 'release' has none; leave it at 1"]
    faults = config_faults(LossConfig(reference="p", alpha=2, distill="l1", weighting="x", gamma=-1, temperature=0))
    assert len(faults) == 6
    assert faults[1] == "loss.distill: unknown name 'l1'; registered: kl, margin_mse, mse, pearson, ranknet"
    assert config_faults(LossConfig(student_weight=-1, in_batch_weight=float("nan"))) == [
        "loss.student_weight: must be at least 0, got -1",
        "loss.in_batch_weight: must be at least 0, got nan",
    ]
    assert config_faults(LossConfig(weighting="auto"))[0].startswith("loss.weighting: unknown name 'auto'")
    with pytest.raises(ValueError, match=r"loss\.temperature: does nothing in distill 'mse'"):
        build_objective(LossConfig(temperature=2.0))
    with pytest.raises(ValueError, match=r"loss.weighting: .*\nloss.distill: .*\nloss.contrastive: "):
        build_objective(LossConfig(reference="release", weighting="uniform", distill="kl", contrastive="listwise_ce"))
    assert config_faults(LossConfig()) == []


# What "auto" stands for, and which settings go with it.


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
