"""The contract that everything rests on: a matcher scores image-text pairs.

Distillation, evaluation, mining and search know backbones by this class alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class Matcher(ABC):
    """Scores (image, text) pairs; a mix-in for ``nn.Module``.

    The encoders are paid once per item (``encode_images``, ``encode_texts``), the fusion once per pair (``match``).
    """

    has_joint_space: bool = False

    @abstractmethod
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Features of ``images``, float ``[B, 3, H, W]``, preprocessed as this matcher expects."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        """Features of B texts."""

    @abstractmethod
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """Scores of pairs, float ``[P]``: logits, higher is better.

        Args:
            images: features of I pictures.
            texts: features of T texts.
            pairs: int64 ``[P, 2]``, each an (image row, text row).
        """

    def embed_images(self, images: ImageFeatures) -> Tensor:
        """Unit vectors ``[B, D]`` of the joint space.

        Raises:
            UserError: when the model has no joint space.
        """
        raise UserError(f"{type(self).__name__} has no joint space; choose a model with one (for METER: joint_head)")

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        """Unit vectors ``[B, D]`` of the joint space; raises as :meth:`embed_images`."""
        raise UserError(f"{type(self).__name__} has no joint space; choose a model with one (for METER: joint_head)")

    def encoder_modules(self) -> list[nn.Module]:
        """The modules that ``encode_images`` and ``encode_texts`` run, in a fixed order."""
        return []

    def shares_encoders_with(self, other: Matcher) -> bool:
        """Whether features made by one serve the other: the very same encoder modules."""
        mine, theirs = self.encoder_modules(), other.encoder_modules()
        return bool(mine) and len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))

    def encoders_frozen(self) -> bool:
        """Whether no encoder weight learns, so that features may be kept."""
        modules = self.encoder_modules()
        return bool(modules) and not any(p.requires_grad for m in modules for p in m.parameters())

    def fusion_parameters(self) -> int:
        """Number of parameters that work once per pair."""
        encoders = {id(p) for m in self.encoder_modules() for p in m.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in encoders)  # type: ignore[attr-defined]


def pair_chunks(pairs: Tensor, bytes_per_pair: int, memory_mb: float) -> tuple[Tensor, ...]:
    """``pairs [P, 2]`` cut so that one chunk's activations stay below ``memory_mb`` MiB (at least one pair each).

    The bound holds without gradients; with them, every chunk's activations are kept for the backward pass unless
    the caller recomputes them.
    """
    size = max(1, int(memory_mb * 2**20 // max(1, bytes_per_pair)))
    return torch.split(pairs, size)
