"""The contract that everything rests on: a matcher scores image-text pairs.

Distillation, evaluation and mining reach backbones through this class alone, and so do search and export.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class Matcher(ABC):
    """Scores (image, text) pairs; a mix-in for ``nn.Module``.

    The encoders are paid once per item (``encode_images``, ``encode_texts``), the fusion once per pair (``match``).
    """

    has_joint_space: bool = False
    # whether a score follows from the two joint-space vectors alone, see ``match_embeds``
    scores_by_embeds: ClassVar[bool] = False
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

    def match_embeds(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Return ``match_all`` by ``embed_images``' and ``embed_texts``' vectors, ``[I, T]``.

        Raises:
            NotImplementedError: a score takes more than these vectors, see ``scores_by_embeds``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not score by vectors alone")

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


# The view that the student reads, which is everybody's where there are no others.
MAIN_VIEW = "student"
# The keys of ``Samples`` that may be mappings from a view's name to what the matcher of that view reads.
VIEWED = ("image", "text_input", "candidate_text", "candidate_image")


class Samples(TypedDict, total=False):
    """A training batch of B samples, as a model's ``forward`` receives it: every key that anybody reads.

    LAVIS's loader makes ``image``, ``text_input`` and ``image_id``; the data sets of this package add candidates and
    features, and the training loop the last five keys. Where matchers preprocess differently, the keys in ``VIEWED``
    are mappings from a view's name to that view's value; :func:`view_of` picks one.

    Attributes:
        image: float ``[B, 3, H, W]``; or, where the pictures come out of a feature bank, ``ImageFeatures`` of B rows,
            and further rows for candidate pictures. Before collation, a sample of such a set has the picture's row in
            the bank instead, an int.
        text_input: B captions.
        image_id: int64 ``[B]``; captions of one picture share it.
        instance_id: B names of the samples.
        text_features: kept features of ``text_input`` and then ``candidate_text``, by the main view's encoders.
        candidate_text: B * C captions, row-major, drawn from the data set or out of a score bank.
        candidate_image_id: int64 ``[B, C]``, the pictures that those captions belong to.
        candidate_image: float ``[B * C, 3, H, W]``, pictures out of a score bank. Absent where ``image`` has them as
            further rows.
        candidate_picture_id: int64 ``[B, C]``, the ids of those pictures.
        image_to_text_scores: float ``[B, 1 + C]``, a score bank's teacher scores of the match and ``candidate_text``.
        text_to_image_scores: the same of the match and ``candidate_image``.
        epoch: number of the epoch, from 0.
        iters: number of the step in its epoch, from 0.
        num_iters_per_epoch: steps of an epoch.
        progress: share of the whole job that is done, in [0, 1].
        draw_seed: of what is drawn for the queries of this batch, the same in every process.
    """

    image: Tensor | ImageFeatures | Mapping[str, Tensor]
    text_input: Sequence[str] | Mapping[str, Sequence[str]]
    image_id: Tensor | Sequence[int]
    instance_id: Sequence[str]
    text_features: TextFeatures
    candidate_text: Sequence[str] | Mapping[str, Sequence[str]]
    candidate_image_id: Tensor
    candidate_image: Tensor | Mapping[str, Tensor]
    candidate_picture_id: Tensor
    image_to_text_scores: Tensor
    text_to_image_scores: Tensor
    epoch: int
    iters: int
    num_iters_per_epoch: int
    progress: float
    draw_seed: int


def view_of(samples: Mapping[str, Any], name: str = MAIN_VIEW) -> dict[str, Any]:
    """Return ``samples`` as the matcher ``name`` reads them: its view's values, or the main one's where it has none.

    Args:
        samples: a batch, see :class:`Samples`.
        name: of the view.
    """
    viewed = {key: value for key, value in samples.items() if key in VIEWED and isinstance(value, Mapping)}
    return {**samples, **{key: value.get(name, value[MAIN_VIEW]) for key, value in viewed.items()}}


def has_view(samples: Mapping[str, Any], name: str) -> bool:
    """Return whether the matcher ``name`` reads another value than the main view's of any key."""
    return any(isinstance(samples.get(key), Mapping) and name in samples[key] for key in VIEWED)
