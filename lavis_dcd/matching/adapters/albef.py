"""ALBEF (Li et al., NeurIPS 2021) as a matcher: LAVIS's ``albef_retrieval``."""

from __future__ import annotations

from torch import nn

from lavis_dcd.matching.adapters.cross_attention import CrossAttentionAdapter
from lavis_dcd.matching.adapters.registry import register_adapter
from lavis_dcd.matching.features import TextFeatures


@register_adapter("albef_retrieval")
class AlbefAdapter(CrossAttentionAdapter):
    """Texts run through the layers below ``fusion_layer`` once; pairs through those above it, which fuse.

    Source: ``lavis/models/albef_models/albef_retrieval.py``, ``forward``.
    """

    med_config = "configs/models/med_config_albef.json"
    mode = "fusion"

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        tokenized = self.tokenize(texts)
        hidden, embeds = self.text_pass(tokenized)
        return TextFeatures(hidden, tokenized.attention_mask.bool(), embeds)

    def encoder_modules(self) -> list[nn.Module]:
        text = self.model.text_encoder
        own = text.encoder.layer[: text.config.fusion_layer]
        return [self.model.visual_encoder, text.embeddings, *own, self.model.vision_proj, self.model.text_proj]
