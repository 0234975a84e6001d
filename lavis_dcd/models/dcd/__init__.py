"""Distil any matcher into any other: ``arch: dcd``."""

from lavis_dcd.models.dcd.model import DynamicContrastiveDistillation

__all__ = ["DynamicContrastiveDistillation"]
