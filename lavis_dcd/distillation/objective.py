"""The whole objective from one config: rows of both terms, their weights, and the sum of the two."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor
from typing_extensions import override

from lavis_dcd.distillation.losses import (
    CONTRASTIVE_LOSSES,
    DISTILL_LOSSES,
    BinaryCrossEntropy,
    full_precision,
    match_cross_entropy,
    prepare,
    reduce_rows,
)
from lavis_dcd.distillation.weighting import WEIGHTINGS, soft_label_weights

AUTO = "auto"
FUSION, DUAL = "fusion", "dual"
FAMILIES = (FUSION, DUAL)

# A fusion model's score is a logit, a dual encoder's a similarity times a learned scale. Where both sides are fusion
# models the paper's terms compare like with like. Where either is a dual encoder, a squared error would pull the
# student's learned scale to the teacher's; KL over the candidates forgives a shift and has a temperature, and the
# listwise cross-entropy is what a dual encoder's scale is made for.
# The terms that "auto" stands for: (distill, contrastive)
PAPER_TERMS = ("mse", "bce")
ACROSS_SCALES = ("kl", "listwise_ce")

LEFT_TO_FAMILIES = ("distill", "contrastive")

# by reference: the published code has no uniform weights
DEFAULT_WEIGHTINGS = {"paper": "uniform", "release": "entropy_share"}


@dataclass
class LossConfig:
    """The ``loss:`` section of a ``dcd`` model.

    Args:
        reference: "paper", or "release" for the published code's arithmetic, faults included.
        alpha: share of the distillation term in [0, 1]; 0 trains on the ground truth alone.
        distill: a name in DISTILL_LOSSES, or "auto": by the teacher's and the student's family, see
            ``loss_defaults``.
        contrastive: a name in CONTRASTIVE_LOSSES, or "auto".
        weighting: a name in WEIGHTINGS; the paper's is "entropy_share". None: uniform, as no other
            helped in this project's measurements; with reference "release", which has none such, entropy_share.
        gamma: how sharply the weightings that have it favour what the teacher is sure of; >= 0.
        temperature: of the KL term; the other terms have none, so there it must be 1 (the release's cancels
            out).
        teacher_temperature: divides the teacher's scores, wherever they are read: above 1 a softer teacher, for one
            that has memorised its training queries.
        entropy_floor: least contrastive weight, before normalising, in the weightings that have it; >= 0.
        student_weight: weight of the student's own training loss, beside this objective; >= 0.
        in_batch_weight: weight of InfoNCE over all pairs of the batch, beside this objective; >= 0. None: 1 for a
            dual encoder as student, 0 for a fusion model.

    The last two name losses that the model adds; the objective has candidates only.
    """

    reference: str = "paper"
    alpha: float = 0.2
    distill: str = AUTO
    contrastive: str = AUTO
    weighting: str | None = None
    gamma: float = 2.0
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    entropy_floor: float = 0.0
    student_weight: float = 0.0
    in_batch_weight: float | None = None


def loss_defaults(cfg: LossConfig, teacher_family: str, student_family: str) -> LossConfig:
    """Return ``cfg`` with every "auto" replaced, and ``in_batch_weight`` and ``weighting`` filled.

    The first is 1 for a dual student, 0 for a fusion one; the second goes by the reference.

    Terms that the user named stay. The published code (``reference: release``) has the paper's terms only, so there
    "auto" means those whatever the families.

    Raises:
        ValueError: on an unknown family.
    """
    for family in (teacher_family, student_family):
        if family not in FAMILIES:
            raise ValueError(f"unknown family '{family}' of a matcher; expected one of {', '.join(FAMILIES)}")
    alike = DUAL not in (teacher_family, student_family) or cfg.reference == "release"
    distill, contrastive = PAPER_TERMS if alike else ACROSS_SCALES
    in_batch = cfg.in_batch_weight
    if in_batch is None:
        in_batch = 1.0 if student_family == DUAL else 0.0
    return replace(
        cfg,
        distill=distill if cfg.distill == AUTO else cfg.distill,
        contrastive=contrastive if cfg.contrastive == AUTO else cfg.contrastive,
        in_batch_weight=in_batch,
        weighting=cfg.weighting or DEFAULT_WEIGHTINGS.get(cfg.reference),
    )


class Objective(Protocol):
    """Both terms and their sum; ``needs_teacher`` is False where the teacher's scores may be None."""

    needs_teacher: bool

    def __call__(
        self,
        teacher_scores: Tensor | None,
        student_scores: Tensor,
        valid: Tensor,
        log_counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the 0-dim tensors ``loss``, ``distill_loss`` and ``contrastive_loss``, with gradients.

        Args:
            teacher_scores: float ``[Q, 1+K]``, the match in column 0, or None.
            student_scores: float ``[Q, 1+K]``.
            valid: bool ``[Q, 1+K]``.
            log_counts: float ``[Q, 1+K]``, see :class:`lavis_dcd.distillation.selection.Selection`; None: each stands
                for itself. Only terms over a softmax read it.

        Raises:
            ValueError: where the shapes differ, or the teacher's scores are needed and None.
        """


def build_objective(cfg: LossConfig) -> Objective:
    """Return the objective that ``cfg`` names; what it leaves to "auto" is taken for fusion models on both sides.

    Raises:
        ValueError: one line per fault: unknown names with the known ones listed, numbers out of range, a
            temperature where it would do nothing, a term that the release does not have.
    """
    cfg = loss_defaults(cfg, FUSION, FUSION)
    faults = config_faults(cfg)
    if faults:
        raise ValueError("\n".join(faults))
    return REFERENCES[cfg.reference](cfg)


def config_faults(cfg: LossConfig) -> list[str]:
    """Return what is wrong with ``cfg``, one line per fault; empty when nothing is.

    A term left to "auto" is in order here; what it resolves to may still not go with the rest.
    """
    tables = (
        ("reference", REFERENCES),
        ("distill", DISTILL_LOSSES),
        ("contrastive", CONTRASTIVE_LOSSES),
        ("weighting", WEIGHTINGS),
    )
    faults = [
        f"loss.{name}: unknown name '{getattr(cfg, name)}'; registered: {', '.join(sorted(table))}"
        for name, table in tables
        if getattr(cfg, name) not in table and not _is_left_open(cfg, name)
    ]
    if not 0 <= cfg.alpha <= 1:
        faults.append(f"loss.alpha: must lie in [0, 1], got {cfg.alpha}")
    faults += [
        f"loss.{name}: must be above 0, got {getattr(cfg, name)}"
        for name in ("temperature", "teacher_temperature")
        if not getattr(cfg, name) > 0
    ]
    faults += [
        f"loss.{name}: must be at least 0, got {getattr(cfg, name)}"
        for name in ("gamma", "entropy_floor", "student_weight", "in_batch_weight")
        if getattr(cfg, name) is not None and not getattr(cfg, name) >= 0
    ]
    if not faults and cfg.weighting is None and cfg.reference == "paper":
        faults = [
            f"loss.{name}: does nothing in uniform weights; name a loss.weighting that has it, the paper's is "
            "entropy_share"
            for name in ("gamma", "entropy_floor")
            if getattr(cfg, name) != getattr(LossConfig, name)
        ]
    return faults or REFERENCES[cfg.reference].faults(cfg)


def _is_left_open(cfg: LossConfig, name: str) -> bool:
    value = getattr(cfg, name)
    return value == AUTO if name in LEFT_TO_FAMILIES else name == "weighting" and value is None


class PaperObjective(Objective):
    """alpha * sum_q w_q * distill_q + (1 - alpha) * sum_q v_q * contrastive_q, weights applied row by row."""

    def __init__(self, cfg: LossConfig) -> None:
        self.alpha, self.teacher_temperature = cfg.alpha, cfg.teacher_temperature
        self.distill = _configured(DISTILL_LOSSES[cfg.distill], cfg)
        self.contrastive = _configured(CONTRASTIVE_LOSSES[cfg.contrastive], cfg)
        self.weighting_name = cfg.weighting or DEFAULT_WEIGHTINGS["paper"]
        self.weighting = _configured(WEIGHTINGS[self.weighting_name], cfg)
        self.needs_teacher = self.alpha > 0 or self.weighting.needs_teacher

    @staticmethod
    def faults(cfg: LossConfig) -> list[str]:
        """Return which settings do not go with this arithmetic, one line per fault."""
        if cfg.distill == AUTO:
            return []
        if cfg.temperature != 1 and "temperature" not in _settings_of(DISTILL_LOSSES[cfg.distill]):
            return [f"loss.temperature: does nothing in distill '{cfg.distill}'; leave it at 1 or use distill: kl"]
        return []

    @override
    def __call__(
        self,
        teacher_scores: Tensor | None,
        student_scores: Tensor,
        valid: Tensor,
        log_counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if teacher_scores is None and self.needs_teacher:
            raise ValueError(
                f"alpha {self.alpha} with weighting '{self.weighting_name}' needs teacher_scores, got None; "
                "without a teacher use alpha: 0 and weighting: uniform"
            )
        if teacher_scores is not None and self.teacher_temperature != 1:
            teacher_scores = full_precision(teacher_scores) / self.teacher_temperature
        weights = self.weighting(teacher_scores, student_scores, valid)
        counted = {} if log_counts is None else {"log_counts": log_counts}
        of_contrastive, of_distill = (counted if reweighs(term) else {} for term in (self.contrastive, self.distill))
        contrastive = reduce_rows(self.contrastive(student_scores, valid, **of_contrastive), weights.contrastive)
        if teacher_scores is None:
            distill = torch.zeros_like(contrastive)
        else:
            rows = self.distill(teacher_scores.detach(), student_scores, valid, **of_distill)
            distill = reduce_rows(rows, weights.distill)
        return _total(distill, contrastive, self.alpha, 1 - self.alpha)


class ReleaseObjective(Objective):
    """The published arithmetic over full rows, faults included; for comparison only.

    The squared error is one mean over the batch before the weights multiply it, so they cancel (and gamma and
    temperature with them); log(softmax) of a very sure teacher underflows to nan. With weighting "wsl": the
    mean weight times that mean, plus the whole of a plain cross-entropy. The published code has no masks;
    masked entries are simply left out here.
    """

    needs_teacher = True

    def __init__(self, cfg: LossConfig) -> None:
        self.alpha = cfg.alpha
        variants = {"entropy_share": self._entropy_share, "wsl": self._weighted_soft_labels}
        self.variant = variants[cfg.weighting or DEFAULT_WEIGHTINGS["release"]]

    @staticmethod
    def faults(cfg: LossConfig) -> list[str]:
        """Return which settings do not go with this arithmetic, one line per fault."""
        faults = []
        if cfg.teacher_temperature != 1:
            faults.append("loss.teacher_temperature: reference 'release' has none; leave it at 1")
        if cfg.weighting not in (None, "entropy_share", "wsl"):
            faults.append(f"loss.weighting: reference 'release' has entropy_share and wsl only, got '{cfg.weighting}'")
        if cfg.distill not in ("mse", AUTO):
            faults.append(f"loss.distill: reference 'release' has mse only, got '{cfg.distill}'")
        if cfg.contrastive not in ("bce", AUTO) and cfg.weighting != "wsl":
            faults.append(f"loss.contrastive: reference 'release' has bce only, got '{cfg.contrastive}'")
        return faults

    @override
    def __call__(
        self,
        teacher_scores: Tensor | None,
        student_scores: Tensor,
        valid: Tensor,
        log_counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if teacher_scores is None:
            raise ValueError("reference 'release' needs teacher_scores, got None")
        teacher, student, valid = prepare(valid, teacher_scores.detach(), student_scores)
        squared_error = ((teacher - student).square() * valid).sum() / valid.sum().clamp_min(1)
        return self.variant(teacher, student, valid, squared_error)

    def _entropy_share(
        self, teacher: Tensor, student: Tensor, valid: Tensor, squared_error: Tensor
    ) -> dict[str, Tensor]:
        p = torch.where(valid, nnf.softmax(teacher.masked_fill(~valid, -1e30), dim=1), 1.0)
        entropy = -(p * p.log()).sum(dim=1)
        contrastive = reduce_rows(BinaryCrossEntropy()(student, valid), entropy / entropy.sum())
        return _total(squared_error, contrastive, self.alpha, 1 - self.alpha)

    def _weighted_soft_labels(
        self, teacher: Tensor, student: Tensor, valid: Tensor, squared_error: Tensor
    ) -> dict[str, Tensor]:
        rows = valid[:, 0].sum().clamp_min(1)
        weight = soft_label_weights(teacher, student, valid).sum() / rows
        cross_entropy = match_cross_entropy(student, valid).sum() / rows
        return _total(weight * squared_error, cross_entropy, self.alpha, 1.0)


REFERENCES: dict[str, type[PaperObjective] | type[ReleaseObjective]] = {
    "paper": PaperObjective,
    "release": ReleaseObjective,
}


def reweighs(term: Any) -> bool:
    """Return whether a registered term (a class, or one built) counts a candidate as often as it stands for others."""
    return bool(getattr(term, "reweighs", False))


def _total(distill: Tensor, contrastive: Tensor, distill_share: float, contrastive_share: float) -> dict[str, Tensor]:
    loss = distill_share * distill + contrastive_share * contrastive
    return {"loss": loss, "distill_loss": distill, "contrastive_loss": contrastive}


def _settings_of(term: Any) -> set[str]:
    """The LossConfig fields that a registered class takes: its dataclass fields of the same name."""
    return {item.name for item in fields(LossConfig)} & set(getattr(term, "__dataclass_fields__", {}))


def _configured(term: Any, cfg: LossConfig) -> Any:
    return term(**{name: getattr(cfg, name) for name in _settings_of(term)})
