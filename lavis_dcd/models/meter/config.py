"""Sizes and switches of a METER retriever, as they stand in a YAML file under ``model:``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lavis_dcd.models.pooling import PoolingName
from lavis_dcd.models.retrieval_loss import RetrievalLossConfig
from lavis_dcd.models.towers import TextConfig, VisionConfig


@dataclass
class FusionConfig:
    """The co-attention stack: per layer one text block and one image block that attend to each other."""

    width: int = 768  # channels of a token; the towers' tokens are projected to it
    layers: int = 6  # co-attention layers
    heads: int = 12  # attention heads per block
    mlp_ratio: int = 4  # width of a feed-forward's inside, in widths
    dropout: float = 0.1  # of attention and feed-forward, in training
    shortcuts: bool = True  # the exact ones; false: every layer in full for every pair
    grad_checkpoint: bool = False  # recompute each layer in the backward pass: less memory, about a third more time
    compile: bool = False  # torch.compile the layers: minutes at the first batches, then perhaps faster
    # start from the text tower's upper layers, which read its tokens as they are; new cross-attention begins at zero
    init_from_text: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads {self.heads}")
        if self.layers < 0:
            raise ValueError(f"layers: {self.layers} must not be negative")


@dataclass
class JointHeadConfig:
    """Projections of the pooled uni-modal tokens to a joint space; its scaled cosine adds to the fusion score."""

    dim: int = 256  # of the joint space
    hidden: int = 512  # width between the projection's two layers
    dropout: float = 0.3  # of tokens, of the pooled vector and of the projection, in training
    temperature: float = 0.05  # where the learned temperature starts
    image_pooling: PoolingName = "mean"  # how a picture's tokens become one vector
    text_pooling: PoolingName = "mean"  # how a caption's tokens become one vector
    pooling_heads: int = 4  # of attention and attention_mean


@dataclass
class MeterConfig:
    """Everything ``meter_retrieval`` is built from. Unknown keys are refused."""

    arch: str = "meter_retrieval"
    model_type: str | None = None  # the file of defaults below this section
    load_finetuned: bool = True  # read the file that finetuned names; false: start from pretrained or at random
    finetuned: str | None = None  # file or address of retrieval weights
    pretrained: str | None = None  # file or address of pre-trained weights, read when finetuned is not
    # which fusion stack of a file that carries both; auto: by the number of layers
    checkpoint_part: Literal["auto", "teacher", "student"] = "auto"
    checkpoint_sha256: str | None = None  # of the file named above, at an address or here
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    joint_head: JointHeadConfig | None = None  # true: with its defaults
    fusion_score: bool = True  # false: the score is the joint head's alone (a dual encoder)
    # with a joint head: the score is its scaled cosine + fusion_weight * the fusion's logit; the loss takes each by
    # itself, so this is best searched after training, on validation data; null: the checkpoint's, else 1
    fusion_weight: float | None = None
    loss: RetrievalLossConfig = field(default_factory=RetrievalLossConfig)
    match_memory_mb: float = 1024.0  # activations of one chunk of ``match`` without gradients, MiB
    # parameter-name prefixes that learn at run.head_lr_multiplier times the base rate
    fast_parameters: list[str] = field(
        default_factory=lambda: [
            "cross_modal_",
            "token_type_embeddings",
            "rank_output",
            "joint_head",
            "image_cls",
            "image_positions",
        ]
    )

    def __post_init__(self) -> None:
        if not self.fusion_score and self.joint_head is None:
            raise ValueError("fusion_score: false, and there is no joint_head: nothing would score a pair")
        if self.fusion_weight is not None and not 0 <= self.fusion_weight < math.inf:
            raise ValueError(f"fusion_weight: {self.fusion_weight} must be a number from 0 on")
