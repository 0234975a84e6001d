"""A dual encoder as a LAVIS retrieval model: two towers, each projected to one vector, compared by their cosine."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from torch import Tensor, nn
from torch.nn import functional as nnf
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import asset_path
from lavis_dcd.matching.contract import pair_chunks
from lavis_dcd.matching.features import F, ImageFeatures, TextFeatures
from lavis_dcd.models import weights
from lavis_dcd.models.batch import Batch, BatchFeatures, encode_batch, info_nce
from lavis_dcd.models.dual_encoder.config import DualEncoderConfig
from lavis_dcd.models.dual_encoder.pooling import EmbeddingHead
from lavis_dcd.models.dual_encoder.weights import DUAL_ENCODER_FILES
from lavis_dcd.models.retriever import TwoTowers, model_types
from lavis_dcd.models.towers import TextTower, VisionTower, build_vision_tower

log = logging.getLogger(__name__)

_VECTORS_PER_PAIR = 3  # of both sides, and their product


@registry.register_model("dual_encoder")
class DualEncoder(TwoTowers):
    """Scores a pair by the scaled cosine of its two vectors; nothing of it works once per pair but a product.

    Features are the towers' own tokens, image ``[B, N, vision width]`` and text ``[B, L, text width]`` with mask:
    while the towers are frozen they can be kept, and shared with any model on the same towers. Poolings and
    projections (``EmbeddingHead``) run in ``embed_images``, ``embed_texts`` and ``match``.
    """

    family: ClassVar[str] = "dual"
    has_joint_space = True
    scores_by_embeds: ClassVar[bool] = True
    config_class = DualEncoderConfig
    files = DUAL_ENCODER_FILES
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = model_types("dual_encoder", "base", "small", "tiny")

    def _build(self, config: DualEncoderConfig) -> None:
        self.config = config
        vision = config.vision
        if vision.weights:
            vision = dataclasses.replace(vision, weights=str(weights.locate(vision.weights)))
        self.vision_tower = build_vision_tower(vision)
        self.text_tower = TextTower(dataclasses.replace(config.text, name=asset_path(config.text.name)))
        head = config.head
        self.image_head = EmbeddingHead(self.vision_tower.width, head.image_pooling, head)
        self.text_head = EmbeddingHead(self.text_tower.width, head.text_pooling, head)
        self.logit_scale = nn.Parameter(torch.tensor(1.0 / head.temperature).log())
        self._check_class_token(self.vision_tower)
        for tower, frozen in ((self.vision_tower, config.vision.freeze), (self.text_tower, config.text.freeze)):
            if frozen:
                tower.requires_grad_(False)

    def _check_class_token(self, vision_tower: VisionTower) -> None:
        mapped = vision_tower.adds_class_token and vision_tower.num_tokens > 1
        if self.config.head.image_pooling == "cls" and mapped:
            raise UserError(
                f"model.head.image_pooling: cls, but the {vision_tower.num_tokens} tokens of "
                f"{self.config.vision.backbone} are a map without a class token; choose mean or attention"
            )

    # -- starting from a teacher ---------------------------------------------------------------------------------

    def init_from_teacher(
        self, teacher: nn.Module, layers: list[int] | None = None, share_encoders: bool = True
    ) -> None:
        """Start from a teacher's uni-modal towers, see :meth:`adopt_towers`; ``layers`` of a fusion have no use here.

        Raises:
            UserError: ``layers`` are named, or the towers do not fit.
        """
        if layers:
            raise UserError(
                "model.student.init_from_teacher.layers: a dual_encoder has no fusion to start from layers; say "
                "init_from_teacher: {towers: true}"
            )
        self.adopt_towers(teacher, share_encoders)

    def adopt_towers(self, teacher: nn.Module, share: bool = True) -> None:
        """Take over the towers of a METER or another dual encoder; heads and temperature stay this model's.

        Args:
            teacher: has ``vision_tower``, ``text_tower`` and a ``config`` with their sections.
            share: True takes the modules themselves, frozen; False copies them, to learn as ``vision.freeze`` and
                ``text.freeze`` say.

        Raises:
            UserError: a teacher without such towers, or with other widths than this model's heads.
        """
        if not isinstance(teacher, TwoTowers):
            raise UserError(
                f"model.student.init_from_teacher.towers: {type(teacher).__name__} has no towers that a dual_encoder "
                "could take over; name vision and text of the student's own instead, with weights"
            )
        towers: dict[str, nn.Module] = {"vision": teacher.vision_tower, "text": teacher.text_tower}
        widths = {"vision": (self.vision_tower.width, teacher.vision_tower.width),
                  "text": (self.text_tower.width, teacher.text_tower.width)}  # fmt: skip
        for side, (width, teacher_width) in widths.items():
            if width != teacher_width:
                raise UserError(
                    f"model.student.{side}: {width} channels, the teacher's tower has {teacher_width}; leave {side} "
                    "out of the student's section, it is the teacher's then"
                )
        self._check_class_token(teacher.vision_tower)
        frozen = {side: share or getattr(self.config, side).freeze for side in towers}
        sections = {side: dataclasses.replace(getattr(teacher.config, side), freeze=frozen[side]) for side in towers}
        self.config = dataclasses.replace(self.config, **copy.deepcopy(sections))
        for side, tower in towers.items():
            adopted = tower if share else copy.deepcopy(tower)
            setattr(self, f"{side}_tower", adopted.requires_grad_(not frozen[side]))
        self.train(self.training)

    # -- the matching contract -----------------------------------------------------------------------------------

    @override
    def fusion_parameters(self) -> int:
        return 0

    @override
    def embed_images(self, images: ImageFeatures) -> Tensor:
        return self.image_head(images)

    @override
    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return self.text_head(texts)

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, at most 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=100.0)

    @override
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        image_rows, image_index = pairs[:, 0].unique(return_inverse=True)
        text_rows, text_index = pairs[:, 1].unique(return_inverse=True)
        image_embeds = self.embed_images(_rows(images, image_rows))
        text_embeds = self.embed_texts(_rows(texts, text_rows))
        local = torch.stack([image_index, text_index], dim=1)
        bytes_per_pair = _VECTORS_PER_PAIR * image_embeds.element_size() * image_embeds.shape[1]
        cosines = [
            # index_select, not indexing: its gradient is an index_add, many times faster on a CPU
            (image_embeds.index_select(0, chunk[:, 0]) * text_embeds.index_select(0, chunk[:, 1])).sum(dim=-1)
            for chunk in pair_chunks(local, bytes_per_pair, self.config.match_memory_mb)
        ]
        return self.scale * torch.cat(cosines)

    @override
    def joint_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        # half precision would tell cosines apart by the third digit only
        with torch.autocast(image_embeds.device.type, enabled=False):
            return image_embeds.float() @ text_embeds.float().T

    @override
    def match_embeds(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return self.scale * self.joint_scores(image_embeds, text_embeds)

    @override
    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return self.match_embeds(self.embed_images(images), self.embed_texts(texts))

    # -- training ------------------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Symmetric InfoNCE over all pairs of a training batch (LAVIS's ``RetrievalDataset`` samples).

        Captions of the same picture are no negatives of each other's.

        Returns:
            ``loss`` and ``contrastive_loss``, the same 0-dim tensor.
        """
        batch = encode_batch(self, Batch.of(samples))
        loss = contrastive_loss(self.match_all(batch.images, batch.texts), batch, self.config.loss.label_smoothing)
        return {"loss": loss, "contrastive_loss": loss}


def contrastive_loss(logits: Tensor, batch: BatchFeatures, smoothing: float = 0.0) -> Tensor:
    """Symmetric InfoNCE on ``logits [I, T]``, a share of each target spread over all that is no other match.

    ``nn.functional.cross_entropy`` would spread it over the masked captions of the same picture too.
    """
    loss = info_nce(logits, batch)
    if not smoothing:
        return loss
    image, text = batch.match_pairs.unbind(dim=1)
    same = batch.image_ids[:, None] == batch.text_image_ids[None, :]
    forward = _spread(logits[image], same[image], text)
    backward = _spread(logits.T[text], same.T[text], image)
    return (1 - smoothing) * loss + smoothing * (forward + backward) / 2


def _spread(rows: Tensor, same: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of ``rows [Q, N]`` to an even share for the target and all that is not ``same``, 0-dim."""
    counted = (~same).scatter(1, target[:, None], True)
    log_share = nnf.log_softmax(rows.float().masked_fill(~counted, -torch.inf), dim=1)
    return -(log_share.masked_fill(~counted, 0.0).sum(dim=1) / counted.sum(dim=1)).mean()


def _rows(features: F, rows: Tensor) -> F:
    """The features of sorted distinct ``rows``; the features themselves, not a copy, when these are all."""
    return features if len(rows) == len(features) else features[rows]
