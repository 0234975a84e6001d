"""Protocols by which a registered class describes its own section of a job file, beside LAVIS's ``from_config``.

All are optional, and recognised by their methods: LAVIS's own models, data sets and runners have none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from omegaconf import DictConfig


@runtime_checkable
class HasSchema(Protocol):
    """A model, processor or runner whose section is a dataclass; a runner's is a ``RunConfig``."""

    @classmethod
    def config_schema(cls) -> type:
        """Return the dataclass that the section must fit."""


@runtime_checkable
class ChecksItself(Protocol):
    """A model or data set builder with rules across its keys."""

    @classmethod
    def config_faults(cls, section: Mapping[str, Any], path: str) -> list[str]:
        """Return one line per fault of a section that fits its schema; nothing is built.

        Args:
            section: the section over its defaults.
            path: where it stands, as in "model" or "datasets.coco_captions".
        """


@runtime_checkable
class HoldsModels(Protocol):
    """A model made of other registered models: a distiller."""

    @classmethod
    def inner_models(cls, section: DictConfig) -> dict[str, DictConfig]:
        """Return the sections inside, each over its own defaults, by where they stand ("teacher", "student")."""

    @classmethod
    def inner_faults(cls, section: DictConfig, path: str) -> list[str]:
        """Return one line per fault of the sections inside, and of how they go together."""

    @classmethod
    def matcher_names(cls, section: DictConfig) -> list[str]:
        """Return the names of the matchers that are evaluated, as ``run.shortlist`` may give them."""


@runtime_checkable
class LearnsFromNegatives(Protocol):
    """A model whose loss compares a pair with others; it may have them from elsewhere than the batch."""

    @classmethod
    def negatives_in_batch_only(cls, section: Mapping[str, Any]) -> bool:
        """Return whether a batch with a single pair leaves nothing to compare with: its loss is 0.

        Args:
            section: the section over its defaults, without faults.
        """


@runtime_checkable
class TellsOfPairs(Protocol):
    """A data set builder whose training samples may be pictures and texts that do not belong together."""

    @classmethod
    def gives_pairs(cls) -> bool:
        """Return whether a sample's text describes its picture."""


@runtime_checkable
class LearnsWithoutPairs(Protocol):
    """A model that may learn from pictures and texts that do not belong together."""

    @classmethod
    def pair_faults(cls, section: Mapping[str, Any], path: str) -> list[str]:
        """Return one line per setting by which it does need pairs.

        Args:
            section: the section over its defaults, without faults.
            path: where it stands.
        """


def tells(registered: type | None, what: type) -> bool:
    """Return whether a registered class (or None) has the methods of one of the Protocols above."""
    return registered is not None and issubclass(registered, what)
