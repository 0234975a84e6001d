"""CLIP as a matcher: two encoders, a learned scale, every pair one scalar product."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import load_tensors
from lavis_dcd.matching.adapters.base import ENCODERS, Adapter, AdapterOptions
from lavis_dcd.matching.adapters.clip_building import (
    ClipOptions,
    assembled,
    created,
    finetuned,
    is_torchscript,
    local_file,
)
from lavis_dcd.matching.adapters.registry import register_adapter
from lavis_dcd.matching.features import ImageFeatures, TextFeatures

# one product of all rows costs less than gathering pairs until it holds this many times more of them
DENSE_FACTOR = 4


@register_adapter("clip", "clip_feature_extractor")
class ClipAdapter(Adapter):
    """``lavis.models.clip_models.model.CLIP``. The score of a pair is ``exp(logit_scale) * cosine``.

    Features: ``embeds [B, E]``, unit vectors of the joint space, and the same as one token, ``tokens [B, 1, E]``.
    """

    options_class: ClassVar[type[AdapterOptions]] = ClipOptions
    inference_modules: ClassVar[tuple[str, ...]] = (
        "visual",
        "transformer",
        "token_embedding",
        "positional_embedding",
        "ln_final",
        "text_projection",
        "logit_scale",
    )
    family: ClassVar[str] = "dual"
    has_joint_space = True
    options: ClipOptions

    def __init__(
        self, model: nn.Module, section: Mapping[str, Any] | None = None, options: AdapterOptions | None = None
    ) -> None:
        super().__init__(model, section, options)
        if ENCODERS in self.options.freeze:
            for parameter in self._bare_parameters():
                parameter.requires_grad_(False)

    # -- building and loading ------------------------------------------------------------------------------------

    @classmethod
    def build(cls, model_class: type[nn.Module], section: Any, options: ClipOptions) -> nn.Module:
        """LAVIS's ``create_model``, or a CLIP of ``options.sizes``; the weights of a local file follow in ``_load``.

        Raises:
            UserError: sizes that cannot work; a type that LAVIS does not know; weights that cannot be fetched.
        """
        if options.sizes:
            return assembled(model_class, section, options)
        name = section.get("model_type")
        if not name:
            raise UserError("model.model_type: clip needs one, ViT-B-16 say (or model.sizes)")
        named = str(section.get("pretrained") or "")
        quick_gelu = named.lower() == "openai" if options.quick_gelu is None else options.quick_gelu
        named = "" if finetuned(section) else named
        return created(str(name), named, str(section.get("precision", "fp32")), quick_gelu)

    def _load(self, section: Any, path: str) -> list[str]:
        named = None if finetuned(section) else section.get("pretrained")
        if named and ((file := local_file(named)) is None or is_torchscript(file)):
            return []  # an address, a tag, an archive of OpenAI's: LAVIS loaded it while it built the model
        return super()._load(section, path)

    def _read(self, source: str, where: str, pretrained: bool = False) -> list[str]:
        """A local file in any of its usual forms (ours, a bare state dict, open_clip's); the rest as LAVIS does."""
        file = local_file(source)
        if file is None:
            return super()._read(source, where, pretrained)
        saved = load_tensors(file)
        weights = saved.get("model", saved.get("state_dict", saved))
        try:
            weights = {key.removeprefix("module."): value for key, value in weights.items()}
            missing = list(self.model.load_state_dict(weights, strict=False).missing_keys)
        except (RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: {source} cannot be loaded into this CLIP: {reason}") from error
        self._refuse_random(missing, source, where)
        # the wrong GELU costs recall in silence; a file of ours says with which its weights were trained
        config = saved.get("config")
        trained = config.get("quick_gelu") if isinstance(config, Mapping) else None
        if trained is not None and trained != self.quick_gelu:
            raise UserError(f"{where}: {source} was trained with quick_gelu: {str(trained).lower()}; "
                            "set model.quick_gelu to that")  # fmt: skip
        return missing

    @property
    def quick_gelu(self) -> bool:
        """Whether the wrapped model runs OpenAI's approximation of GELU."""
        return any(type(module).__name__ == "QuickGELU" for module in self.model.modules())

    def checkpoint(self) -> dict[str, Any]:
        saved = super().checkpoint()
        saved["config"]["quick_gelu"] = self.quick_gelu
        return saved

    # -- the matching contract -----------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Features of ``[B, 3, S, S]``.

        Raises:
            UserError: pictures of another size than the model's.
        """
        size = self.model.visual.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(images.shape[-2:]) != size:
            raise UserError(
                f"pictures of {tuple(images.shape[-2:])} pixels, but this CLIP takes {size}: set the processor's "
                f"image_size to {size[0]}"
            )
        return ImageFeatures(*_one_token(self.model.encode_image(images)))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        """Features of B texts through the model's own tokenizer, cut at its context length as LAVIS cuts them."""
        ids = self.model.tokenizer(list(texts), context_length=self.model.context_length).to(self.device)
        return TextFeatures(*_one_token(self.model.encode_text(ids)))

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        if len(images) * len(texts) <= DENSE_FACTOR * len(pairs):
            return self.match_all(images, texts)[pairs[:, 0], pairs[:, 1]]
        image_embeds, text_embeds, scale = self.embed_images(images), self.embed_texts(texts), self._scale()

        def score(image_rows: Tensor, text_rows: Tensor) -> Tensor:
            products = image_embeds.index_select(0, image_rows) * text_embeds.index_select(0, text_rows)
            return scale * products.sum(dim=-1)

        return self.in_chunks(score, pairs, bytes_per_pair=3 * 4 * image_embeds.shape[1])

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return self._scale() * self.joint_scores(self.embed_images(images), self.embed_texts(texts))

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return images.embeds.float()

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.embeds.float()

    def joint_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Cosines ``[I, T]``, float32 under autocast too: times a scale of 100, half precision would mix up ranks."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            return image_embeds.float() @ text_embeds.float().T

    def _scale(self) -> Tensor:
        return self.model.logit_scale.float().exp()

    def encoder_modules(self) -> list[nn.Module]:
        model = self.model
        return [model.visual, model.transformer, model.token_embedding, model.ln_final]

    def _bare_parameters(self) -> list[nn.Parameter]:
        """What encodes texts and belongs to no module of the model's but to the model itself."""
        return [self.model.positional_embedding, self.model.text_projection]

    def encoders_frozen(self) -> bool:
        return super().encoders_frozen() and not any(p.requires_grad for p in self._bare_parameters())

    def encoder_settings(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for parameter in self._bare_parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return {"context_length": self.model.context_length, "bare_parameters": digest.hexdigest()}

    def fusion_parameters(self) -> int:
        """None: the scale can be folded into one side's embeddings."""
        return 0

    # -- the model's own loss ------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """LAVIS's InfoNCE over the batch, 0-dim ``loss``, and ``logit_scale_exp``."""
        from lavis.common.dist_utils import is_dist_avail_and_initialized
        from lavis.models.clip_models.loss import ClipLoss

        # LAVIS makes its loss at first use and asks the process group for its size; a single process has no group
        if self.model._loss is None and not is_dist_avail_and_initialized():
            self.model._loss = ClipLoss()
        return super().forward(samples)


def _one_token(embeds: Tensor) -> tuple[Tensor, None, Tensor]:
    embeds = nnf.normalize(embeds.float(), dim=-1)
    # a copy: files of tensors cannot hold two views of one storage
    return embeds[:, None].clone(), None, embeds
