"""ALBEF and BLIP as matchers: a ViT, a BERT whose layers attend to its tokens, an ITM head, an ITC joint space."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lavis.common.utils import get_abs_path
from lavis.models.med import XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import BertConfig
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import unknown_key
from lavis_dcd.matching.adapters.base import Adapter, CommonOptions
from lavis_dcd.matching.adapters.packed_pairs import MATCH_CHUNK, PackedMatch
from lavis_dcd.matching.adapters.registry import register_adapter
from lavis_dcd.matching.attention import BertLayer, Shortcuts, bert_layers
from lavis_dcd.matching.features import ImageFeatures, TextFeatures, last_used


@dataclass
class VisionSizes:
    """A ViT of other sizes than LAVIS's, in the names of its ``VisionTransformer``; the defaults are ViT-B/16."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")


@dataclass
class Sizes:
    """Other sizes than LAVIS's own.

    Args:
        vision: the ViT; its input is the section's ``image_size``.
        text: values over those of LAVIS's ``med_config`` file, under the names that stand there (``hidden_size``,
            ``num_hidden_layers``, for ALBEF ``fusion_layer``...). ``encoder_width`` follows the ViT.
    """

    vision: VisionSizes | None = None
    text: dict[str, Any] = field(default_factory=dict)


def vision_encoder(section: Any, sizes: VisionSizes | None) -> Any:
    """Return LAVIS's ViT of a model section, in other ``sizes`` where they are given."""
    if sizes is None:
        return VisionTransformerEncoder.from_config(section)
    encoder = VisionTransformerEncoder(img_size=section.get("image_size", 384), **asdict(sizes))
    encoder.vision_width = sizes.embed_dim
    return encoder


def text_encoder(section: Any, sizes: Sizes, default_file: str, vision_width: int) -> Any:
    """Return LAVIS's BERT of a model section, on a ViT of ``vision_width``.

    Raises:
        ValueError: no such ``med_config_path``, or a key that it does not have.
    """
    path = Path(get_abs_path(section.get("med_config_path") or default_file))
    if not path.is_file():
        raise ValueError(f"med_config_path: no file {path}")
    values = json.loads(path.read_text())
    if unknown := [unknown_key("sizes.text", key, values) for key in sizes.text if key not in values]:
        raise ValueError(unknown[0])
    values |= sizes.text
    if sizes.vision is not None and "encoder_width" not in sizes.text:
        values["encoder_width"] = vision_width
    return XBertEncoder(config=BertConfig(**values), add_pooling_layer=False)


@dataclass
class CrossAttentionOptions(CommonOptions):
    """Keys of an ALBEF or BLIP section beside LAVIS's own.

    Args:
        sizes: see :class:`Sizes`.
        score: ``log_odds``, the ITM head's match logit minus its other one, so that its sigmoid is the head's
            softmax; or ``lavis``, what LAVIS's evaluation ranks by: the match logit plus the ITC cosine.
        scoring_txt_len: tokens of a caption, specials included, when encoding; ``None``: the model's
            ``max_txt_len``. LAVIS's evaluation takes 35, whatever ``max_txt_len`` says.
        shortcuts: compute what does not change from pair to pair once, and nothing that no score reads; ``false``:
            LAVIS's own forward for every pair. The scores are the same.
        grad_checkpoint: in training, keep no activations of the fusing layers but compute them again.
    """

    sizes: Sizes = field(default_factory=Sizes)
    score: Literal["log_odds", "lavis"] = "log_odds"
    scoring_txt_len: int | None = None
    shortcuts: bool = True
    grad_checkpoint: bool = False


class CrossAttentionAdapter(Adapter):
    """The base class of ALBEF's and BLIP's adapters.

    Image features: ViT tokens ``[B, 1 + patches, Dv]`` and ITC vectors ``[B, E]``. Text features: the tokens
    ``[B, L, D]`` that the text encoder's ``mode`` starts from, mask and ITC vectors; sub-classes encode them.
    """

    options_class = CrossAttentionOptions
    inference_modules = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head")
    has_joint_space = True
    model: Any  # a LAVIS model: LAVIS declares no types
    options: CrossAttentionOptions
    med_config: ClassVar[str]  # LAVIS's file of text sizes, where the section names none
    mode: ClassVar[str]  # of the text encoder in ``match``

    def __init__(self, model: nn.Module, section: Any = None, options: CommonOptions | None = None) -> None:
        super().__init__(model, section, options)
        self.shortcuts = Shortcuts() if self.options.shortcuts else Shortcuts.none()

    # -- building ------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, model_class: Any, section: Any, options: CrossAttentionOptions) -> nn.Module:
        """Return the LAVIS model as its ``from_config`` assembles it, without loading a checkpoint.

        Raises:
            ValueError: sizes that cannot work.
        """
        vision = vision_encoder(section, options.sizes.vision)
        text = text_encoder(section, options.sizes, cls.med_config, vision.vision_width)
        settings = {"queue_size": 0, **section}
        parameters = inspect.signature(model_class.__init__).parameters
        arguments = {name: settings[name] for name in parameters if settings.get(name) is not None}
        model: nn.Module = model_class(image_encoder=vision, text_encoder=text, **arguments)
        return model

    @override
    def check(self, path: str) -> None:
        text = self.model.text_encoder
        config, faults = text.config, []
        width = self.model.visual_encoder.vision_width
        if config.encoder_width != width:
            faults.append(f"{path}.med_config_path: its encoder_width is {config.encoder_width}, the ViT gives {width}")
        rows, ids = text.embeddings.word_embeddings.num_embeddings, len(self.model.tokenizer)
        if ids > rows:
            faults.append(
                f"{path}.tokenizer: the vocabulary has {ids} ids, special ones included, the text encoder {rows}; "
                f"set {path}.sizes.text.vocab_size to {ids}, or name the vocabulary that the model was made with"
            )
        if not self.fusion_layers():
            faults.append(
                f"{path}.sizes.text: with fusion_layer {config.fusion_layer} none of the {config.num_hidden_layers} "
                f"layers fuses; set fusion_layer below {config.num_hidden_layers}"
            )
        longest = max(self.text_length, self.model.max_txt_len)
        if longest > config.max_position_embeddings:
            faults.append(f"{path}.max_txt_len: {longest} tokens, the text encoder has {config.max_position_embeddings}"
                          " positions")  # fmt: skip
        if self.text_length < 3:
            faults.append(f"{path}: captions are cut to {self.text_length} tokens, which leaves no word; raise "
                          "max_txt_len or scoring_txt_len to 3 or more")  # fmt: skip
        if faults:
            raise UserError(faults)

    @override
    def _read(self, source: str, where: str, pretrained: bool = False) -> list[str]:
        missing = super()._read(source, where, pretrained)
        pointer = getattr(self.model, "queue_ptr", None)
        if pointer is not None and not 0 <= int(pointer) < self.model.queue_size:
            pointer.zero_()  # of a queue of another size, or of none: outside of this one
        if any(name.split(".")[0].endswith("_m") for name in missing):
            self.model.copy_params()  # a file without the momentum copies: they start from what was loaded
        return missing

    # -- the matching contract -----------------------------------------------------------------------------------

    @property
    def text_length(self) -> int:
        """Tokens of a caption at most, specials included."""
        length: int = self.options.scoring_txt_len or self.model.max_txt_len
        return length

    @override
    def encode_images(self, images: Tensor) -> ImageFeatures:
        expected = tuple(self.model.visual_encoder.patch_embed.img_size)
        if tuple(images.shape[-2:]) != expected:
            raise UserError(
                f"{type(self.model).__name__} takes pictures of {expected[0]}x{expected[1]}, got "
                f"{images.shape[-2]}x{images.shape[-1]}; set image_size of its vis_processor (or of the model)"
            )
        tokens = self.model.visual_encoder.forward_features(images)
        return ImageFeatures(tokens, None, nnf.normalize(self.model.vision_proj(tokens[:, 0]), dim=-1))

    def tokenize(self, texts: list[str]) -> Any:
        """Return the model's tokenizer's int64 ``input_ids`` and ``attention_mask`` of ``texts``, ``[B, L]``."""
        return self.model.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=self.text_length, return_tensors="pt"
        ).to(self.device)

    def text_pass(self, tokenized: Any) -> tuple[Tensor, Tensor]:
        """Return the uni-modal text pass: tokens ``[B, L, D]`` and ITC vectors ``[B, E]``."""
        hidden: Tensor = self.model.text_encoder.forward_text(tokenized).last_hidden_state
        return hidden, nnf.normalize(self.model.text_proj(hidden[:, 0]), dim=-1)

    @override
    def embed_images(self, images: ImageFeatures) -> Tensor:
        return images.required_embeds()

    @override
    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.required_embeds()

    @override
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """Return scores ``[P]`` as ``options.score`` says: the text encoder on the features, then the ITM head."""
        if len(pairs) and self._takes_shortcuts(texts):
            return PackedMatch(self, images, texts).scores(pairs)
        return self._match_plainly(images, texts, pairs)

    def _takes_shortcuts(self, texts: TextFeatures) -> bool:
        """Return whether the fusion may run in parts: nothing is set that only LAVIS's own forward does."""
        layers = self._fusing_layers()
        return (
            self.shortcuts.any
            and self.model.text_encoder.config.position_embedding_type == "absolute"
            and all(hasattr(layer, "crossattention") for layer in layers)
            # attention maps, which LAVIS's GradCAM reads
            and not any(layer.crossattention.self.save_attention for layer in layers)
            and bool(texts.full_mask()[:, 0].all())
        )

    def _match_plainly(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """Return the scores of LAVIS's own forward for every pair, with which the shortcuts must agree."""
        mask = texts.full_mask()
        # pairs in the order of their captions' lengths: a chunk pays for its own longest caption only
        order = mask.sum(dim=1)[pairs[:, 1]].argsort(stable=True)

        def score(image: Tensor, text: Tensor) -> Tensor:
            return self._score(images, texts, mask, image, text)

        size = self.bytes_per_pair(images.tokens.shape[1], last_used(mask))
        scores = [self.in_chunks(score, chunk, size) for chunk in torch.split(pairs[order], MATCH_CHUNK)]
        return torch.cat(scores)[order.argsort()]

    def _score(self, images: ImageFeatures, texts: TextFeatures, mask: Tensor, image: Tensor, text: Tensor) -> Tensor:
        dtype = self.model.itm_head.weight.dtype
        mask = mask[text]
        longest = last_used(mask)
        # index_select, not indexing: its gradient is an index_add, many times faster on a CPU
        image_tokens = images.tokens.index_select(0, image).to(dtype)
        text_tokens = texts.tokens[:, :longest].index_select(0, text).to(dtype)
        output = self.model.text_encoder(
            encoder_embeds=text_tokens,
            attention_mask=mask[:, :longest].long(),
            encoder_hidden_states=image_tokens,
            encoder_attention_mask=images.full_mask()[image].long(),
            return_dict=True,
            mode=self.mode,
        )
        return self.head_scores(output.last_hidden_state[:, 0], images, texts, image, text)

    def head_scores(
        self, classes: Tensor, images: ImageFeatures, texts: TextFeatures, image: Tensor, text: Tensor
    ) -> Tensor:
        """Return float32 scores ``[p]`` of pairs of rows ``[p]`` by their last class tokens ``[p, D]``."""
        logits: Tensor = self.model.itm_head(classes).float()
        if self.options.score == "log_odds":
            return logits[:, 1] - logits[:, 0]
        image_embeds = images.required_embeds().index_select(0, image).float()
        cosine = image_embeds * texts.required_embeds().index_select(0, text).float()
        return logits[:, 1] + cosine.sum(dim=-1)

    def bytes_per_pair(self, image_tokens: int, text_tokens: int) -> int:
        """Return a pair's activations on the plain path without gradients: what lives together in a layer."""
        config = self.model.text_encoder.config
        # the gathered image tokens; keys and values, and their copies in the order that the product wants
        image = image_tokens * (config.encoder_width + 4 * config.hidden_size)
        text = text_tokens * (8 * config.hidden_size + 2 * config.intermediate_size)
        scores = 3 * config.num_attention_heads * text_tokens * max(image_tokens, text_tokens)
        size: int = self.model.itm_head.weight.element_size() * (image + text + scores)
        return size

    @override
    def fusion_modules(self) -> list[nn.Module]:
        return [*self._fusing_layers(), self.model.itm_head]

    def fusion_layers(self) -> list[BertLayer]:
        """Return the layers of the text encoder that work per pair, in order: ALBEF's upper ones, all of BLIP's."""
        return bert_layers(self._fusing_layers())

    def _fusing_layers(self) -> list[Any]:
        layers = self.model.text_encoder.encoder.layer
        return list(layers[getattr(self.model.text_encoder.config, "fusion_layer", 0) :])

    @override
    def encoder_settings(self) -> dict[str, Any]:
        config = self.model.text_encoder.config
        vocabulary = json.dumps(self.model.tokenizer.get_vocab(), sort_keys=True)
        return {
            "text_length": self.text_length,
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "text": [config.num_attention_heads, str(config.hidden_act), config.position_embedding_type],
            "vision": [block.attn.num_heads for block in self.model.visual_encoder.blocks],
        }

    # -- the model's own training --------------------------------------------------------------------------------

    @override
    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return LAVIS's ITC and ITM losses, ``loss``, ``loss_itc`` and ``loss_itm``, 0-dim; moves queues and copies.

        Raises:
            UserError: a batch that LAVIS's code cannot take: features instead of pictures, captions of one picture
                only, a size that does not divide the queue's.
        """
        name = type(self.model).__name__
        if not isinstance(samples["image"], Tensor):
            raise UserError(f"model.loss.student_weight: {name}'s own loss reads pictures; set run.cache_features: off")
        ids = torch.as_tensor(samples["image_id"])
        if len(torch.unique(ids)) < 2:
            raise UserError(f"{name}'s own loss draws negatives from the batch, which has one picture only; raise "
                            "run.batch_size_train, or set model.loss.student_weight: 0")  # fmt: skip
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        size = len(ids) * (torch.distributed.get_world_size() if distributed else 1)
        queue = self.model.queue_size
        if queue < size or queue % size:
            raise UserError(f"model.queue_size: {queue} is no multiple of the {size} samples of a batch (all processes "
                            "together), as LAVIS's queue needs; change it or run.batch_size_train")  # fmt: skip
        if getattr(self.model, "negative_all_rank", False) and not distributed:
            raise UserError("model.negative_all_rank: true needs a distributed run; set it to false")
        return super().forward({**samples, "image_id": ids.to(self.device)})


@register_adapter("albef_retrieval")
class AlbefAdapter(CrossAttentionAdapter):
    """ALBEF (Li et al., NeurIPS 2021). Texts run through the layers below ``fusion_layer``, pairs through the rest.

    Source: ``lavis/models/albef_models/albef_retrieval.py``, ``forward``.
    """

    med_config = "configs/models/med_config_albef.json"
    mode = "fusion"

    @override
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        tokenized = self.tokenize(texts)
        hidden, embeds = self.text_pass(tokenized)
        return TextFeatures(hidden, tokenized.attention_mask.bool(), embeds)

    @override
    def encoder_modules(self) -> list[nn.Module]:
        text = self.model.text_encoder
        layers = text.encoder.layer[: text.config.fusion_layer]
        return [self.model.visual_encoder, text.embeddings, *layers, self.model.vision_proj, self.model.text_proj]


@register_adapter("blip_retrieval")
class BlipAdapter(CrossAttentionAdapter):
    """BLIP (Li et al., ICML 2022). Texts are word embeddings that begin with [ENC]; every text layer works per pair.

    The same layers without cross-attention give the ITC vector, once per text. Source:
    ``lavis/models/blip_models/blip_retrieval.py`` and ``blip_image_text_matching.py``, ``forward``.
    """

    med_config = "configs/models/med_config.json"
    mode = "multimodal"

    @override
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        tokenized = self.tokenize(texts)
        _, embeds = self.text_pass(tokenized)
        ids = tokenized.input_ids.clone()
        ids[:, 0] = self.model.tokenizer.enc_token_id
        words = self.model.text_encoder.embeddings(input_ids=ids)
        return TextFeatures(words, tokenized.attention_mask.bool(), embeds)

    @override
    def encoder_modules(self) -> list[nn.Module]:
        text = self.model.text_encoder
        # the cross-attention works per pair alone, so it may learn while features are kept
        layers = [m for layer in text.encoder.layer for m in (layer.attention, layer.intermediate, layer.output)]
        return [self.model.visual_encoder, text.embeddings, *layers, self.model.vision_proj, self.model.text_proj]

    @override
    def _read(self, source: str, where: str, pretrained: bool = False) -> list[str]:
        missing = super()._read(source, where, pretrained)
        if hasattr(self.model, "reset_queue_ptr"):
            self.model.queue_ptr.zero_()  # as LAVIS's from_config; in place, so it stays on the model's device
        return missing


@register_adapter("blip_image_text_matching")
class BlipMatchingAdapter(BlipAdapter):
    """BLIP's ITM model: it scores as ``blip_retrieval`` does and brings no loss to train with."""

    @override
    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        raise UserError(
            f"{type(self.model).__name__} has no training loss of its own; set model.loss.student_weight: 0, or "
            "take arch: blip_retrieval"
        )
