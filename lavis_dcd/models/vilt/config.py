"""Sizes and switches of a ViLT retriever, as they stand in a YAML file under ``model:``."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from lavis_dcd.models.retrieval_loss import RetrievalLossConfig


@dataclass
class ViltImageConfig:
    """Patches of pictures of any size whose sides are multiples of ``patch_size``."""

    image_size: int = 384  # the side that the grid of learned positions covers; other grids are interpolated from it
    patch_size: int = 32  # side of a patch in pixels

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"image_size: {self.image_size} is no multiple of patch_size {self.patch_size}")


@dataclass
class ViltTextConfig:
    """BERT's word embeddings."""

    name: str = "bert-base-uncased"  # hub name, local folder or vocab.txt: the tokenizer
    max_length: int = 40  # tokens, specials included; longer captions are cut
    vocab_size: int = 30522  # entries of the tokenizer's vocabulary
    max_positions: int = 40  # learned positions; max_length may not exceed it

    def __post_init__(self) -> None:
        if not 3 <= self.max_length <= self.max_positions:
            raise ValueError(
                f"max_length: {self.max_length} is not between 3 (a word and two specials) and max_positions "
                f"{self.max_positions}"
            )


@dataclass
class ViltFusionConfig:
    """The transformer that reads words and patches together."""

    width: int = 768  # channels of a token
    layers: int = 12  # transformer blocks
    heads: int = 12  # attention heads per block
    mlp_ratio: int = 4  # width of a feed-forward's inside, in widths
    dropout: float = 0.1  # of the embeddings, projections and feed-forward; attention has none
    norm_eps: float = 1.0e-6  # the authors'; the hub's files were converted for 1e-12, which trained weights bear
    shortcuts: bool = True  # the same scores for less work; false: transformers' own forward for every pair
    grad_checkpoint: bool = False  # in training, keep no activations of the blocks but compute them again

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads {self.heads}")
        if self.layers < 1:
            raise ValueError(f"layers: {self.layers}, at least 1 is needed")


@dataclass
class ViltConfig:
    """Everything ``vilt_retrieval`` is built from. Unknown keys are refused."""

    arch: str = "vilt_retrieval"
    model_type: str | None = None  # the file of defaults below this section
    load_finetuned: bool = True  # read the file that finetuned names; false: start from pretrained or at random
    finetuned: str | None = None  # file or address of retrieval weights
    pretrained: str | None = None  # file or address of pre-trained weights, read when finetuned is not
    checkpoint_sha256: str | None = None  # of the file named above, at an address or here
    image: ViltImageConfig = field(default_factory=ViltImageConfig)
    text: ViltTextConfig = field(default_factory=ViltTextConfig)
    fusion: ViltFusionConfig = field(default_factory=ViltFusionConfig)
    freeze_embeddings: bool = False  # words, patches, positions and modality types do not learn
    loss: RetrievalLossConfig = field(default_factory=RetrievalLossConfig)
    match_memory_mb: float = 1024.0  # activations of one chunk of ``match`` without gradients, MiB
    # parameter-name prefixes that learn at run.head_lr_multiplier times the base rate
    fast_parameters: list[str] = field(default_factory=lambda: ["rank_output"])


def transformers_config(config: ViltConfig) -> transformers.ViltConfig:
    """The same sizes as ``transformers`` spells them."""
    fusion = config.fusion
    return transformers.ViltConfig(
        vocab_size=config.text.vocab_size,
        max_position_embeddings=config.text.max_positions,
        type_vocab_size=2,
        modality_type_vocab_size=2,
        hidden_size=fusion.width,
        num_hidden_layers=fusion.layers,
        num_attention_heads=fusion.heads,
        intermediate_size=fusion.width * fusion.mlp_ratio,
        hidden_dropout_prob=fusion.dropout,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=fusion.norm_eps,
        image_size=config.image.image_size,
        patch_size=config.image.patch_size,
    )
