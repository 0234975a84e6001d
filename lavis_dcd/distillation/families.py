"""Which loss suits which pair of families: what "auto" in a `LossConfig` stands for.

A fusion model's score is a logit, a dual encoder's a similarity times a learned scale. Where both sides are fusion
models the paper's terms compare like with like. Where either is a dual encoder, a squared error would pull the
student's learned scale to the teacher's; KL over the candidates forgives a shift and has a temperature, and the
listwise cross-entropy is what a dual encoder's scale is made for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lavis_dcd.distillation.objective import LossConfig

AUTO = "auto"
FUSION, DUAL = "fusion", "dual"
FAMILIES = (FUSION, DUAL)

# what "auto" means: (distill, contrastive)
PAPER_TERMS = ("mse", "bce")
ACROSS_SCALES = ("kl", "listwise_ce")


def resolve(cfg: LossConfig, teacher_family: str, student_family: str) -> LossConfig:
    """`cfg` with every "auto" replaced, and `in_batch_weight` filled: 1 for a dual student, 0 for a fusion one.

    What the user named is kept. The published code (`reference: release`) has the paper's terms only, so there
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
    )
