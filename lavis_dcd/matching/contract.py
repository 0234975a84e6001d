"""The contract that everything rests on: a matcher scores image-text pairs.

Distillation, evaluation and mining reach backbones through this class alone, and so do search and export.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class Matcher(ABC):
    """Scores (image, text) pairs; a mix-in for ``nn.Module``.

    The encoders are paid once per item (``encode_images``, ``encode_texts``), the fusion once per pair (``match``).
    """

    has_joint_space: bool = False
    # what a score is: "fusion", a logit that costs a pass per pair, or "dual", a scaled similarity of two embeddings,
    # so that all pairs of a batch cost one product
    family: ClassVar[str] = "fusion"

    @abstractmethod
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Return features of ``images``, float ``[B, 3, H, W]``, preprocessed as this matcher expects."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        """Return features of B texts."""

    @abstractmethod
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """Return scores of pairs, float32 ``[P]``: logits, higher is better.

        Args:
            images: features of I pictures.
            texts: features of T texts.
            pairs: int64 ``[P, 2]``, each an (image row, text row).
        """

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Return ``match`` of every picture with every text, ``[I, T]``; a dual encoder computes it as one product."""
        rows = torch.arange(len(images), device=images.device)
        pairs = torch.cartesian_prod(rows, torch.arange(len(texts), device=images.device))
        return self.match(images, texts, pairs.view(-1, 2)).view(len(images), len(texts))

    def embed_images(self, images: ImageFeatures) -> Tensor:
        """Return unit vectors ``[B, D]`` of the joint space, ``[B, N, D]`` where a picture has several (BLIP-2).

        Raises:
            UserError: when the model has no joint space.
        """
        raise UserError(f"{type(self).__name__} has no joint space; choose a model with one (for METER: joint_head)")

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        """Return unit vectors ``[B, D]`` of the joint space; raises as :meth:`embed_images`."""
        raise UserError(f"{type(self).__name__} has no joint space; choose a model with one (for METER: joint_head)")

    def joint_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Return the joint space's scores ``[I, T]`` of all pairs of ``embed_images``' and ``embed_texts``' vectors."""
        return image_embeds @ text_embeds.T

    def own_loss(self, samples: Mapping[str, Any]) -> Tensor:
        """Return the model's own training loss on a batch of LAVIS's ``RetrievalDataset`` samples, 0-dim.

        Raises:
            UserError: when the model has none.
        """
        if type(self).forward is nn.Module.forward:  # type: ignore[attr-defined]
            raise UserError(f"{type(self).__name__} has no training loss of its own; set model.loss.student_weight: 0")
        loss: Tensor = self(samples)["loss"]  # type: ignore[operator]  # an nn.Module's, which this is mixed into
        return loss

    def encoder_modules(self) -> list[nn.Module]:
        """Return the modules that ``encode_images`` and ``encode_texts`` run, in a fixed order."""
        return []

    def sharding_units(self) -> list[nn.Module]:
        """Return the layers that ``run.strategy: fsdp`` gathers one at a time, in the order in which they run.

        Each must be run by its own ``forward`` and in no other way, equally often in every process at each training
        step: as the layers of encoders are, but not those that ``match`` runs chunk by chunk. Nobody may read their
        weights elsewhere. All else stays gathered throughout a step, which is always right and the default.
        """
        return []

    def encoder_signature(self) -> str | None:
        """Return a hash of all that shapes frozen encoders' features (kind, settings, weights); ``None`` if unknown.

        Equal signatures of two matchers mean equal features.
        """
        return None

    def shares_encoders_with(self, other: Matcher) -> bool:
        """Return whether features of one serve the other: the same encoder modules, or frozen ones that are equal."""
        mine, theirs = self.encoder_modules(), other.encoder_modules()
        if not mine or len(mine) != len(theirs):
            return False
        if all(a is b for a, b in zip(mine, theirs, strict=True)):
            return True
        if not (self.encoders_frozen() and other.encoders_frozen()):
            return False
        signature = self.encoder_signature()
        return signature is not None and signature == other.encoder_signature()

    def encoders_frozen(self) -> bool:
        """Return whether no encoder weight learns, so that features may be kept."""
        modules = self.encoder_modules()
        return bool(modules) and not any(p.requires_grad for m in modules for p in m.parameters())

    def fusion_parameters(self) -> int:
        """Return the number of parameters that work once per pair."""
        encoders = {id(p) for m in self.encoder_modules() for p in m.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in encoders)  # type: ignore[attr-defined]


def pair_chunks(pairs: Tensor, bytes_per_pair: int, memory_mb: float) -> tuple[Tensor, ...]:
    """Return ``pairs [P, 2]`` in chunks whose activations stay below ``memory_mb`` MiB (at least one pair each).

    The bound holds without gradients; with them, every chunk's activations are kept for the backward pass unless
    the caller recomputes them.
    """
    size = max(1, int(memory_mb * 2**20 // max(1, bytes_per_pair)))
    return torch.split(pairs, size)


# Where matchers differ in their inputs, these keys of the samples are mappings from a view's name to what that matcher
# reads, as its own processors make it; elsewhere they are plain and serve everybody.
VIEWED = ("image", "text_input", "candidate_text", "candidate_image")
MAIN_VIEW = "student"


def view_of(samples: Mapping[str, Any], name: str = MAIN_VIEW) -> dict[str, Any]:
    """Return ``samples`` as the matcher ``name`` reads them: its own view where there is one, else the main one."""
    seen = dict(samples)
    for key in VIEWED:
        if isinstance(seen.get(key), Mapping):
            seen[key] = seen[key].get(name, seen[key][MAIN_VIEW])
    return seen


def has_view(samples: Mapping[str, Any], name: str) -> bool:
    """Return whether the matcher ``name`` has a view of its own in ``samples``."""
    return any(isinstance(samples.get(key), Mapping) and name in samples[key] for key in VIEWED)
