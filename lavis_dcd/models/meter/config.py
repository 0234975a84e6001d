"""Sizes and switches of a METER retriever, as they stand in a YAML file under ``model:``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lavis_dcd.models.retrieval_loss import RetrievalLossConfig
from lavis_dcd.models.towers import TextConfig, VisionConfig


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
