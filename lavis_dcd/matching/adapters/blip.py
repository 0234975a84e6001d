"""BLIP (Li et al., ICML 2022) as a matcher: LAVIS's ``blip_retrieval`` and ``blip_image_text_matching``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.cross_attention import CrossAttentionAdapter
from lavis_dcd.matching.adapters.registry import register_adapter
from lavis_dcd.matching.features import TextFeatures


@register_adapter("blip_retrieval")
class BlipAdapter(CrossAttentionAdapter):
    """Texts are word embeddings that begin with [ENC]; every layer of the text encoder works per pair.

    The same layers without cross-attention give the ITC vector, once per text. Source:
    ``lavis/models/blip_models/blip_retrieval.py`` and ``blip_image_text_matching.py``, ``forward``.
    """

    med_config = "configs/models/med_config.json"
    mode = "multimodal"

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        tokenized = self.tokenize(texts)
        _, embeds = self.text_pass(tokenized)
        ids = tokenized.input_ids.clone()
        ids[:, 0] = self.model.tokenizer.enc_token_id
        words = self.model.text_encoder.embeddings(input_ids=ids)
        return TextFeatures(words, tokenized.attention_mask.bool(), embeds)

    def encoder_modules(self) -> list[nn.Module]:
        text = self.model.text_encoder
        # the cross-attention works per pair alone, so it may learn while features are kept
        layers = [part for layer in text.encoder.layer for part in (layer.attention, layer.intermediate, layer.output)]
        return [self.model.visual_encoder, text.embeddings, *layers, self.model.vision_proj, self.model.text_proj]

    def _read(self, source: str, where: str, pretrained: bool = False) -> list[str]:
        missing = super()._read(source, where, pretrained)
        if hasattr(self.model, "reset_queue_ptr"):
            self.model.queue_ptr.zero_()  # as LAVIS's from_config; in place, so it stays on the model's device
        return missing


@register_adapter("blip_image_text_matching")
class BlipMatchingAdapter(BlipAdapter):
    """BLIP's ITM model: it scores as ``blip_retrieval`` does and brings no loss to train with."""

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        raise UserError(
            f"{type(self.model).__name__} has no training loss of its own; set model.loss.student_weight: 0, or "
            "take arch: blip_retrieval"
        )
