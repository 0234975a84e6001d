"""The settings that need to know which caption belongs to which picture, where nothing tells (``match: teacher``)."""

from __future__ import annotations

from lavis_dcd.distillation.weighting import WEIGHTINGS, needs_match
from lavis_dcd.models.dcd.config import IN_BATCH, DcdConfig

_NO_TRUTH = "candidates.match: teacher has no ground truth"


def match_faults(config: DcdConfig, path: str = "model") -> list[str]:
    """Return what does not go with ``candidates.match: teacher``, one line per fault; nothing where matches are given.

    Args:
        path: where the section stands.
    """
    if not config.candidates.match_by_teacher:
        return []
    return [f"{path}.{line}" for line in _loss_faults(config) + _pool_faults(config)]


def _loss_faults(config: DcdConfig) -> list[str]:
    loss, faults = config.loss, []
    if loss.alpha != 1:
        faults.append(f"loss.alpha: {loss.alpha} leaves a share to the contrastive term, and {_NO_TRUTH}; set it to 1")
    faults += [
        f"loss.{name}: {getattr(loss, name)}, and {_NO_TRUTH} to learn from; leave it out, or set it to 0"
        for name in ("in_batch_weight", "student_weight")
        if getattr(loss, name)
    ]
    if loss.weighting in WEIGHTINGS and needs_match(WEIGHTINGS[loss.weighting]):
        known = ", ".join(sorted(name for name, weighting in WEIGHTINGS.items() if not needs_match(weighting)))
        faults.append(f"loss.weighting: {loss.weighting} compares with the match, and {_NO_TRUTH}; take one of {known}")
    if loss.reference == "release":
        faults.append("loss.reference: release knows no candidates.match: teacher; leave one of them out")
    return faults


def _pool_faults(config: DcdConfig) -> list[str]:
    faults = [
        f"candidates.{direction}.source: {source}, but candidates.match: teacher takes the top of the whole batch; "
        "set it to in_batch"
        for direction, source in config.candidates.sources().items()
        if source != IN_BATCH
    ]
    for given, key, words in (
        (config.candidates.teacher_budget, "candidates.teacher_budget", "leaves the teacher a part of the candidates"),
        (config.selection.prescreen, "selection.prescreen", "leaves the teacher a part of the candidates"),
        (config.selection.margin, "selection.margin", "drops candidates above the match"),
    ):
        if given is not None:
            faults.append(f"{key}: {words}, and candidates.match: teacher takes the top of all; leave it out (null)")
    return faults
