"""Sizes and switches of a METER retriever, as they stand in a YAML file under ``model:``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class VisionConfig:
    """The vision tower.

    ``backbone: clip_vit`` is METER's CLIP-ViT, built from the sizes below; ``timm:<name>`` is any timm backbone's
    ``forward_features`` (its map becomes tokens).
    """

    backbone: str = "clip_vit"
    image_size: int = 384
    patch_size: int = 16
    width: int = 768
    layers: int = 11  # blocks that run: METER drops CLIP's last one, so 11 of ViT-B's 12
    heads: int | None = None  # None: one per 64 channels, as in CLIP
    # the tower's own weights, when no checkpoint of the whole model has them: a file in timm's names, for clip_vit one
    # of a CLIP in transformers' names
    weights: str | None = None
    grid: int | None = None  # timm maps only: average-pool the map to grid x grid tokens
    freeze: bool = False


@dataclass
class TextConfig:
    """The text tower: an encoder of ``transformers``."""

    # bert, roberta or another model type of transformers (distilbert, mpnet, ...); auto: as ``name``, or as
    # ``config.model_type``, says
    family: str = "roberta"
    name: str = "roberta-base"  # hub name or local folder: the tokenizer, and the weights when load_weights is set
    load_weights: bool = False  # start from the weights in ``name`` (a checkpoint of the whole model brings its own)
    max_length: int = 40  # tokens, the two specials included; longer captions are cut
    config: dict[str, Any] = field(default_factory=dict)  # sizes in transformers' names; empty: read from ``name``
    freeze: bool = False


@dataclass
class FusionConfig:
    """The co-attention stack: per layer one text block and one image block that attend to each other."""

    width: int = 768
    layers: int = 6
    heads: int = 12
    mlp_ratio: int = 4
    dropout: float = 0.1
    shortcuts: bool = True  # the exact ones of matching.shortcuts; false: every layer in full for every pair
    grad_checkpoint: bool = False  # recompute each layer in the backward pass: less memory, about a third more time
    compile: bool = False  # torch.compile the layers: minutes at the first batches, then perhaps faster
    init_from_text: bool = False  # start from the text tower's upper layers; new cross-attention begins at zero

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads {self.heads}")
        if self.layers < 0:
            raise ValueError(f"layers: {self.layers} must not be negative")


@dataclass
class JointHeadConfig:
    """Projections of the pooled uni-modal tokens to a joint space; its scaled cosine adds to the fusion score."""

    dim: int = 256
    hidden: int = 512
    dropout: float = 0.3
    temperature: float = 0.05  # where the learned temperature starts


@dataclass
class RetrievalLossConfig:
    """The retriever's own loss: listwise cross-entropy over in-batch hard negatives, both directions."""

    negatives: int = 4  # per query and direction
    queries: int | None = None  # fusion queries drawn per batch; None: every sample
    pool: int = 16  # without a joint head: in-batch candidates scored to find the hard ones
    sharpness: float = 1.0  # with a joint head: negatives are drawn by softmax(sharpness * joint logits) ...
    sharpness_start: float = 0.2  # ... growing linearly from this over the run, for hard negatives alone stall it
    joint_weight: float = 1.0  # weight of the joint head's InfoNCE
    # share of the run in which the joint head trains alone: towers that start at random learn from it many times
    # faster without the noise of a fusion that has nothing to attend to yet
    fusion_start: float = 0.0
    grad_chunk_pairs: int | None = None  # recompute the fusion in chunks of so many pairs to bound memory


@dataclass
class MeterConfig:
    """Everything ``meter_retrieval`` is built from. Unknown keys are refused."""

    arch: str = "meter_retrieval"
    model_type: str | None = None
    load_finetuned: bool = True
    finetuned: str | None = None  # file or address of retrieval weights
    pretrained: str | None = None  # file or address of pre-trained weights, read when finetuned is not
    checkpoint_part: str = "auto"  # auto | teacher | student: which fusion stack of a file that carries both
    checkpoint_sha256: str | None = None  # of the file at the address above
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    joint_head: JointHeadConfig | None = None  # true: with its defaults
    fusion_score: bool = True  # False: the score is the joint head's alone (a dual encoder)
    loss: RetrievalLossConfig = field(default_factory=RetrievalLossConfig)
    match_memory_mb: float = 1024.0  # activations of one chunk of ``match`` without gradients, MiB
    # parameter-name prefixes that learn at run.head_lr_multiplier times the base rate
    fast_parameters: list[str] = field(
        default_factory=lambda: ["cross_modal_", "token_type_embeddings", "rank_output", "joint_head", "image_cls",
                                 "image_positions"]
    )

    def __post_init__(self) -> None:
        if not self.fusion_score and self.joint_head is None:
            raise ValueError("fusion_score: false, and there is no joint_head: nothing would score a pair")
