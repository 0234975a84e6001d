"""What LAVIS-DCD needs to know of RingNet: its encoders, and how it scores a pair."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lavis_dcd.matching.adapters.base import Adapter
from lavis_dcd.matching.adapters.registry import register_adapter
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


@register_adapter("ringnet_retrieval")  # the model's LAVIS name
class RingNetAdapter(Adapter):
    has_joint_space = True
    # a checkpoint that lacks one of these is refused, so that no weight of a score stays at random
    inference_modules = ("conv", "words", "image_proj", "text_proj", "fusion")

    @classmethod
    def build(cls, model_class: type[nn.Module], section: Any, options: Any) -> nn.Module:
        # without weights: the base class loads those that the section names, and checks that they fit
        return model_class.from_config({**section, "finetuned": None})

    # Once per picture and once per caption. A caption here is one token: TextFeatures holds [B, N, D].
    def encode_images(self, images: Tensor) -> ImageFeatures:
        rings, embeds = self.model.see(images)
        return ImageFeatures(rings, embeds=embeds)

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        words, embeds = self.model.read(texts)
        return TextFeatures(words[:, None], embeds=embeds)

    # Once per pair. Features may have been kept in half precision, hence float().
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        rings, words = images.tokens.float(), texts.tokens[:, 0].float()
        hidden = self.model.fusion[0]
        floats = 2 * (hidden.in_features + hidden.out_features)  # a pair's inputs and hidden layer, each with a copy
        return self.in_chunks(lambda i, t: self.model.fuse(rings[i], words[t]), pairs, bytes_per_pair=4 * floats)

    # The joint space, for a cheap shortlist (run.k_test). Leave these out where a model has none.
    def embed_images(self, images: ImageFeatures) -> Tensor:
        return images.embeds

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.embeds

    # Who learns what: `freeze: [encoders]` in a job, features kept while the encoders are frozen, and
    # run.head_lr_multiplier for the fusion.
    def encoder_modules(self) -> list[nn.Module]:
        return [self.model.conv, self.model.words, self.model.image_proj, self.model.text_proj]

    def encoder_settings(self) -> dict[str, Any]:
        return {"rings": self.model.rings}  # it shapes the features and shows in no encoder's weights

    def fusion_modules(self) -> list[nn.Module]:
        return [self.model.fusion]
