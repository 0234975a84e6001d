"""Sizes and switches of a dual encoder, as they stand in a YAML file under ``model:``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lavis_dcd.models.pooling import PoolingName
from lavis_dcd.models.towers import TextConfig, VisionConfig


@dataclass
class HeadConfig:
    """From each tower's tokens to the joint space.

    Raises:
        ValueError: a size below its least, a dropout rate outside [0, 1), a temperature that is not positive.
    """

    dim: int = 256  # of the joint space
    hidden: int = 1024  # width between the projection's two layers; 0: a single linear map without bias, as CLIP's
    dropout: float = 0.4  # of the pooled vector, after its norm
    hidden_dropout: float = 0.4  # between the projection's two layers
    token_dropout: float = 0.3  # share of the tokens left out of the pooling in training; cls keeps its token
    temperature: float = 0.05  # where the learned temperature starts; it stays at or above 0.01
    image_pooling: PoolingName = "mean"  # how a picture's tokens become one vector
    text_pooling: PoolingName = "mean"  # how a caption's tokens become one vector
    pooling_heads: int = 4  # of attention and attention_mean

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}, at least {least} is needed"
            for name, least in (("dim", 1), ("hidden", 0), ("pooling_heads", 1))
            if getattr(self, name) < least
        ]
        faults += [
            f"{name} is {getattr(self, name)}, not in [0, 1)"
            for name in ("dropout", "hidden_dropout", "token_dropout")
            if not 0 <= getattr(self, name) < 1
        ]
        if not self.temperature > 0:
            faults.append(f"temperature is {self.temperature}, it must be above 0")
        if faults:
            raise ValueError("; ".join(faults))


@dataclass
class ContrastiveLossConfig:
    """The dual encoder's own loss: symmetric InfoNCE over all pairs of a batch.

    Raises:
        ValueError: a smoothing outside [0, 1).
    """

    label_smoothing: float = 0.0  # share of the target spread evenly over a query's candidates

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, not in [0, 1)")


@dataclass
class DualEncoderConfig:
    """Everything ``dual_encoder`` is built from. Unknown keys are refused."""

    arch: str = "dual_encoder"
    model_type: str | None = None  # the file of defaults below this section
    load_finetuned: bool = True  # read the file that finetuned names; false: start from pretrained or at random
    finetuned: str | None = None  # a file of a dual_encoder
    pretrained: str | None = None  # the same, read when finetuned is not
    checkpoint_sha256: str | None = None  # of the file named above, at an address or here
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: ContrastiveLossConfig = field(default_factory=ContrastiveLossConfig)
    match_memory_mb: float = 1024.0  # vectors of one chunk of ``match`` without gradients, MiB
    # parameter-name prefixes that learn at run.head_lr_multiplier times the base rate
    fast_parameters: list[str] = field(default_factory=lambda: ["image_head", "text_head", "logit_scale"])
