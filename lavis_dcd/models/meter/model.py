"""METER as a LAVIS retrieval model (Dou et al., CVPR 2022): uni-modal towers, co-attention fusion, rank head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from torch import Tensor, nn
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import asset_path
from lavis_dcd.matching.attention import Shortcuts, additive_mask
from lavis_dcd.matching.contract import pair_chunks
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.batch import Batch, encode_batch
from lavis_dcd.models.meter.config import MeterConfig
from lavis_dcd.models.meter.fusion import JointHead, Pooler, fusion_layers, read_tokens_as_they_are, start_from_text
from lavis_dcd.models.meter.stack import CoAttentionStack, EncodedItems
from lavis_dcd.models.meter.weights import METER_FILES
from lavis_dcd.models.retrieval_loss import RetrievalLoss
from lavis_dcd.models.retriever import LayeredRetriever, Succession, TwoTowers, model_types
from lavis_dcd.models.towers import TextTower, build_vision_tower

MATCH_CHUNK = 256  # pairs matched together where memory would allow more: larger chunks pad more captions
PAIRS_TO_GROUP = 16  # pairs per picture from which on a chunk is likely to hold one picture only


@registry.register_model("meter_retrieval")
class MeterRetrieval(LayeredRetriever, TwoTowers):
    """Scores a pair by a co-attention stack over CLIP-ViT (or timm) and RoBERTa (or BERT) tokens.

    Features are the towers' own tokens: image ``[B, N, vision width]``, text ``[B, L, text width]`` with mask.
    The projections to the fusion's width are trained with it and run once per item of a ``match`` call.
    The official arithmetic: METER's ``meter_module.py`` (infer) and ``objectives.py`` (compute_irtr).
    """

    config_class = MeterConfig
    files = METER_FILES
    # a joint head that the teacher lacks stays as it is: the student's own
    succession = Succession(
        stacks=r"cross_modal_(?:image|text)_layers",
        sizes="towers, fusion width and joint head",
        optional=("joint_head",),
    )
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = model_types(
        "meter_retrieval", "coco", "flickr", "pretrain_288", "student_coco", "student_flickr", "quickstart"
    )

    def _build(self, config: MeterConfig) -> None:
        self.config = config
        width = config.fusion.width
        text = dataclasses.replace(config.text, name=asset_path(config.text.name))
        vision = config.vision
        if vision.weights:
            vision = dataclasses.replace(vision, weights=asset_path(vision.weights))
        self.vision_tower = build_vision_tower(vision)
        self.text_tower = TextTower(text)
        self.cross_modal_text_transform = nn.Linear(self.text_tower.width, width)
        self.cross_modal_image_transform = nn.Linear(self.vision_tower.width, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.cross_modal_text_layers = fusion_layers(config.fusion)
        self.cross_modal_image_layers = fusion_layers(config.fusion)
        self.shortcuts = Shortcuts() if config.fusion.shortcuts else Shortcuts.none()
        self._stack: tuple[Any, CoAttentionStack] | None = None
        self.cross_modal_text_pooler = Pooler(width)
        self.cross_modal_image_pooler = Pooler(width)
        self.rank_output = nn.Linear(2 * width, 1)
        if self.vision_tower.adds_class_token:
            self.image_cls = nn.Parameter(torch.zeros(1, 1, width))
            self.image_positions = nn.Parameter(torch.zeros(1, self.vision_tower.num_tokens + 1, width))
        self._initialise()
        joint = config.joint_head
        if joint is None and config.fusion_weight is not None:
            raise UserError("model.fusion_weight: there is no joint_head whose score the fusion's would be added to; "
                            "leave it out")  # fmt: skip
        self.joint_head = JointHead(self.vision_tower.width, self.text_tower.width, joint) if joint else None
        self.has_joint_space = joint is not None
        if config.fusion.init_from_text:
            blocks = getattr(getattr(self.text_tower.model, "encoder", None), "layer", None)
            if blocks is None:
                raise UserError("model.fusion.init_from_text: needs a text tower of BERT's kind (bert, roberta), not "
                                f"{config.text.family}; leave it out")  # fmt: skip
            start_from_text(self.cross_modal_text_layers, self.cross_modal_image_layers, blocks)
            read_tokens_as_they_are(self.cross_modal_text_transform, self.token_type_embeddings)
        for tower, frozen in ((self.vision_tower, config.vision.freeze), (self.text_tower, config.text.freeze)):
            if frozen:
                tower.requires_grad_(False)
        self.retrieval_loss = RetrievalLoss(config.loss)
        # the fusion's, before it starts or where its score does not count; a joint head's that stays as it is
        self.find_unused_parameters = (
            config.loss.fusion_start > 0 or not config.fusion_score or config.loss.joint_weight == 0
        )

    def _initialise(self) -> None:
        """METER's initialisation: normal(0, 0.02) weights, zero biases, in everything but the towers."""
        towers = {id(m) for tower in (self.vision_tower, self.text_tower) for m in tower.modules()}
        for module in self.modules():
            if id(module) in towers:
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.vision_tower.adds_class_token:
            nn.init.normal_(self.image_cls, std=0.02)
            nn.init.normal_(self.image_positions, std=0.02)

    @override
    def _share_encoders(self, teacher: MeterRetrieval) -> None:
        self.vision_tower, self.text_tower = teacher.vision_tower, teacher.text_tower

    # -- the matching contract -----------------------------------------------------------------------------------

    @override
    def embed_images(self, images: ImageFeatures) -> Tensor:
        return self._joint().embed_images(images)

    @override
    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return self._joint().embed_texts(texts)

    @property
    def scores_pairs(self) -> bool:
        """Return whether the co-attention scores pairs; without it the joint head does alone."""
        return self.config.fusion_score

    @property
    def fusion_weight(self) -> float:
        """Return the weight of the fusion's logit beside the joint head's scaled cosine."""
        weight = self.config.fusion_weight
        return 1.0 if weight is None else weight

    @fusion_weight.setter
    def fusion_weight(self, weight: float) -> None:
        self.config = dataclasses.replace(self.config, fusion_weight=weight)

    def joint_logits(self, images: ImageFeatures, texts: TextFeatures) -> Tensor | None:
        """Return the joint head's scaled cosines ``[I, T]`` with gradients; None without one."""
        if self.joint_head is None:
            return None
        return self.joint_head.scale * self.embed_images(images) @ self.embed_texts(texts).T

    def _joint(self) -> JointHead:
        if self.joint_head is None:
            raise UserError("this meter_retrieval has no joint space: set model.joint_head (and train it)")
        return self.joint_head

    @override
    def fusion_parameters(self) -> int:
        if not self.config.fusion_score:
            return 0
        per_pair = (self.cross_modal_text_layers, self.cross_modal_image_layers, self.cross_modal_text_pooler,
                    self.cross_modal_image_pooler, self.rank_output)  # fmt: skip
        return sum(p.numel() for module in per_pair for p in module.parameters())

    @override
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        if self.joint_head is None:
            return self.fusion_scores(images, texts, pairs)
        if not self.config.fusion_score:
            return self.joint_pair_scores(images, texts, pairs)
        if not self.fusion_weight:
            return self.joint_pair_scores(images, texts, pairs)
        fusion = self.fusion_weight * self.fusion_scores(images, texts, pairs)
        return fusion + self.joint_pair_scores(images, texts, pairs)

    def joint_pair_scores(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """The joint head's scaled cosine of each pair, ``[P]``."""
        image_embeds = self._joint().embed_images(images)
        text_embeds = self._joint().embed_texts(texts)
        return self._joint().scale * (image_embeds[pairs[:, 0]] * text_embeds[pairs[:, 1]]).sum(dim=-1)

    def fusion_scores(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """The rank head's logit of each pair, ``[P]``, in chunks of at most ``match_memory_mb`` of activations."""
        image_rows, image_index = pairs[:, 0].unique(return_inverse=True)
        text_rows, text_index = pairs[:, 1].unique(return_inverse=True)
        images, texts = images[image_rows], texts[text_rows].trimmed()
        mask = texts.full_mask()
        stack = self.stack()
        items = stack.prepare(self._project_images(images), self._project_texts(texts), mask)
        order = _order(image_index, mask.sum(dim=1)[text_index])
        local = torch.stack([image_index, text_index], dim=1)[order]
        scores = []
        for chunk in self._chunks(local, items):
            cls = self._pooled(*stack.run(items, chunk[:, 0], chunk[:, 1]))
            scores.append(self.rank_output(cls)[:, 0].float())
        return torch.cat(scores)[order.argsort()] if scores else items.images.new_zeros(0, dtype=torch.float32)

    def _chunks(self, pairs: Tensor, items: EncodedItems) -> Iterator[Tensor]:
        size = min(MATCH_CHUNK, max(32, len(pairs) // 4 + 1))
        for chunk in pair_chunks(pairs, self._bytes_per_pair(items), self.config.match_memory_mb):
            yield from (part for part in chunk.split(size) if len(part))

    def stack(self) -> CoAttentionStack:
        """The fusion layers as ``shortcuts`` has them run; made anew when that, or the layers, are others."""
        key = (self.shortcuts, *(id(layer) for layer in self.cross_modal_text_layers))
        if self._stack is None or self._stack[0] != key:
            fusion, sides = self.config.fusion, (self.cross_modal_text_layers, self.cross_modal_image_layers)
            self._stack = (key, CoAttentionStack(*sides, self.shortcuts, fusion.grad_checkpoint, fusion.compile))
        return self._stack[1]

    def fuse(self, image_hidden: Tensor, text_hidden: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The co-attention stack on projected tokens, one row per pair, layer by layer in full: the reference path.

        Returns:
            text features ``[P, L, D]``, image features ``[P, N, D]`` and class features ``[P, 2 D]``.
        """
        mask = additive_mask(text_mask, text_hidden.dtype)
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text_out = text_layer(text_hidden, attention_mask=mask, encoder_hidden_states=image_hidden)[0]
            image_hidden = image_layer(image_hidden, encoder_hidden_states=text_hidden, encoder_attention_mask=mask)[0]
            text_hidden = text_out
        return text_hidden, image_hidden, self._pooled(text_hidden, image_hidden)

    def _pooled(self, text_hidden: Tensor, image_hidden: Tensor) -> Tensor:
        pooled = (self.cross_modal_text_pooler(text_hidden), self.cross_modal_image_pooler(image_hidden))
        return torch.cat(pooled, dim=-1)

    def _project_images(self, images: ImageFeatures) -> Tensor:
        weight = self.cross_modal_image_transform.weight
        hidden = self.cross_modal_image_transform(images.tokens.to(weight.dtype))
        if self.vision_tower.adds_class_token:
            cls = self.image_cls.expand(len(hidden), -1, -1).to(hidden.dtype)
            hidden = torch.cat([cls, hidden], dim=1) + self.image_positions
        return hidden + self.token_type_embeddings.weight[1]

    def _project_texts(self, texts: TextFeatures) -> Tensor:
        weight = self.cross_modal_text_transform.weight
        return self.cross_modal_text_transform(texts.tokens.to(weight.dtype)) + self.token_type_embeddings.weight[0]

    def _bytes_per_pair(self, items: EncodedItems) -> int:
        """Activations of a pair in a layer, by the tensors that live together: about 8 hidden states and the
        feed-forward's two per token; the weights of one attention where they are not spared."""
        fusion, image_tokens = self.config.fusion, items.images.shape[1]
        numbers = (image_tokens + items.texts.shape[1]) * fusion.width * (8 + 2 * fusion.mlp_ratio)
        if not self.shortcuts.sdpa:
            numbers += 3 * fusion.heads * image_tokens**2
        return items.images.element_size() * numbers

    # -- training ------------------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's own retrieval loss on a training batch (LAVIS's ``RetrievalDataset`` samples).

        Returns:
            ``loss``, ``fusion_loss`` and, with a joint head, ``joint_loss``: 0-dim tensors.
        """
        batch = Batch.of(samples)
        return self.retrieval_loss(self, encode_batch(self, batch), batch.progress)


def _order(image_index: Tensor, lengths: Tensor) -> Tensor:
    """The order in which pairs are matched: of like caption lengths, so that a chunk pays for its own longest only;
    where few pictures have many pairs each, picture by picture, which are then read without copies."""
    pictures = int(image_index.max()) + 1 if len(image_index) else 0
    if len(image_index) <= PAIRS_TO_GROUP * pictures:
        return lengths.argsort(stable=True)
    return (image_index * (int(lengths.max()) + 1) + lengths).argsort(stable=True)
