"""The contract of a model that a training job can train: what the loop and the task read from it, with defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble


class Learner:
    """A mix-in for ``nn.Module``; the defaults are those of a matcher that learns alone, without a teacher.

    Put it before ``nn.Module`` and ``Matcher`` among the bases. It has no constructor and no state.
    """

    @property
    def random_captions_per_image(self) -> int:
        """Captions that the training set must draw per picture (0: none)."""
        return 0

    @property
    def needs_score_bank(self) -> bool:
        """Whether the training set must bring candidates and scores out of a score bank."""
        return False

    @property
    def find_unused_parameters(self) -> bool:
        """Whether some step leaves trainable parameters without a gradient, as distributed training must know."""
        return False

    def matchers(self) -> Mapping[str, Matcher | Ensemble]:
        """Return what is evaluated, by the name it has in the tables of results."""
        return {"model": self}  # type: ignore[dict-item]  # a learner without a teacher is a matcher

    def view_matchers(self) -> dict[str, Matcher]:
        """Return the matchers that preprocess otherwise than the data set does, by the view that each reads."""
        return {}

    def views(self) -> dict[str, dict[str, Any]]:
        """Return the ``model:`` sections of :meth:`view_matchers`, whose ``preprocess`` says what they read."""
        return {}

    def exported(self) -> nn.Module:
        """Return the module whose :meth:`checkpoint` becomes the job's final file."""
        return self  # type: ignore[return-value]  # a mix-in for nn.Module

    def checkpoint(self) -> dict[str, Any]:
        """Return the content of a file of this model: tensors and plain containers, ``model`` among them."""
        return {"model": self.state_dict()}  # type: ignore[attr-defined]  # a mix-in for nn.Module

    def use_score_bank(self, bank: Any) -> None:
        """Take notice of the score bank (``banks.score_bank.ScoreBank``) that the samples' scores come from."""

    def teacher_fingerprint(self) -> str:
        """Return a hash of the teachers, by which a resumed job finds that they are others; "" without a teacher."""
        return ""

    def head_parameter_names(self) -> set[str]:
        """Return the parameters that learn at ``run.head_lr_multiplier`` times the base rate."""
        return set()

    def sharding_units(self) -> list[nn.Module]:
        """Return the layers that ``run.strategy: fsdp`` gathers one at a time, see :meth:`Matcher.sharding_units`."""
        return []
