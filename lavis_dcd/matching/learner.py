"""The hooks of a model that learns, as a training job calls them, each with its default."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from typing_extensions import override

T = TypeVar("T")


class Learner:
    """Mixin of ``nn.Module`` for models that train; a subclass overrides the hooks whose default does not fit."""

    # Captions that the training set draws per picture (0: none)
    random_captions_per_image: int = 0
    # Whether the training set must bring candidates and scores out of a score bank
    needs_score_bank: bool = False
    # Whether some step leaves trainable parameters without a gradient, which distributed training must be told
    find_unused_parameters: bool = False

    def matchers(self) -> dict[str, Any]:
        """Return what can be evaluated, by name ("teacher", "student"); by default the model itself."""
        return {"model": self}

    def view_matchers(self) -> dict[str, Any]:
        """Return the matchers that read pictures and captions of their own, by the name of their view."""
        return {}

    def views(self) -> dict[str, dict[str, Any]]:
        """Return the ``model:`` sections of :meth:`view_matchers`, whose ``preprocess`` says what they read."""
        return {}

    def exported(self) -> nn.Module:
        """Return the model that the final file holds."""
        assert isinstance(self, nn.Module)
        return self

    def checkpoint(self) -> dict[str, Any]:
        """Return what a file of this model holds: tensors and plain containers, with the weights under "model"."""
        assert isinstance(self, nn.Module)
        return {"model": self.state_dict()}

    def use_score_bank(self, bank: Any) -> None:
        """Take the score bank that the samples' scores come from."""

    def use_feature_bank(self, bank: Any) -> None:
        """Take the bank that the features of all samples come out of, before the first of them."""

    def teacher_fingerprint(self) -> str:
        """Return a hash of the teacher's weights; "" without a teacher."""
        return ""

    def head_parameter_names(self) -> set[str]:
        """Return the names, as in ``named_parameters()``, of what learns at ``run.head_lr_multiplier``."""
        return set()

    def sharding_units(self) -> list[nn.Module]:
        """Return the layers that ``run.strategy: fsdp`` gathers one at a time, in the order in which they run.

        Each must run by its ``forward`` alone, equally often in every process at each step.
        """
        return []


class ForeignLearner(Learner):
    """A model that does not inherit from `Learner` (LAVIS's own, a plug-in's): the hooks that it has, else the
    defaults, with the model in the place of the view.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for name in ("random_captions_per_image", "needs_score_bank", "find_unused_parameters"):
            setattr(self, name, getattr(model, name, getattr(Learner, name)))

    @override
    def matchers(self) -> dict[str, Any]:
        return self._answer("matchers", {"model": self.model})

    @override
    def view_matchers(self) -> dict[str, Any]:
        return self._answer("view_matchers", {})

    @override
    def views(self) -> dict[str, dict[str, Any]]:
        return self._answer("views", {})

    @override
    def exported(self) -> nn.Module:
        return self._answer("exported", self.model)

    @override
    def checkpoint(self) -> dict[str, Any]:
        content = self._answer("checkpoint", None)
        return {"model": self.model.state_dict()} if content is None else content

    @override
    def use_score_bank(self, bank: Any) -> None:
        getattr(self.model, "use_score_bank", super().use_score_bank)(bank)

    @override
    def use_feature_bank(self, bank: Any) -> None:
        getattr(self.model, "use_feature_bank", super().use_feature_bank)(bank)

    @override
    def teacher_fingerprint(self) -> str:
        return self._answer("teacher_fingerprint", "")

    @override
    def head_parameter_names(self) -> set[str]:
        return self._answer("head_parameter_names", set())

    @override
    def sharding_units(self) -> list[nn.Module]:
        return self._answer("sharding_units", [])

    def _answer(self, hook: str, default: T) -> T:
        method = getattr(self.model, hook, None)
        return default if method is None else method()


def as_learner(model: nn.Module) -> Learner:
    """Return the model itself if it is a `Learner`, else a view of it that has every hook."""
    return model if isinstance(model, Learner) else ForeignLearner(model)
