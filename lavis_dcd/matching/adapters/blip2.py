"""BLIP-2's first stage as a matcher: a frozen ViT, and a Q-Former that reads pictures, texts and pairs of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import torch
from lavis.common.dist_utils import is_dist_avail_and_initialized
from lavis.models.blip2_models.blip2 import LayerNorm, disabled_train
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from lavis.models.eva_vit import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as nnf
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.matching.adapters.base import ENCODERS, Adapter, AdapterOptions, CommonOptions
from lavis_dcd.matching.adapters.lavis_files import towers_fetched_here
from lavis_dcd.matching.adapters.registry import register_adapter
from lavis_dcd.matching.features import ImageFeatures, TextFeatures, last_used


@dataclass
class TransformerSizes:
    """Sizes of the ViT or of the Q-Former."""

    width: int
    layers: int
    heads: int


@dataclass
class Blip2Sizes:
    """A BLIP-2 of another size than LAVIS's, whose parts start at random: ``model.sizes``.

    Args:
        vision: LAVIS's EVA ViT.
        qformer: every ``cross_attention_freq``-th of its layers, from the first, attends to the picture.
        num_query_token: queries per picture.
        embed_dim: width of the joint space.
        max_txt_len: a text's tokens.
    """

    image_size: int
    patch_size: int
    vision: TransformerSizes
    qformer: TransformerSizes
    num_query_token: int = 32
    cross_attention_freq: int = 2
    embed_dim: int = 256
    max_txt_len: int = 32


def assemble(model_class: Any, sizes: Blip2Sizes, tokenizer: Any) -> nn.Module:
    """Return a BLIP-2 of LAVIS's own modules in small, weights at random; LAVIS's constructor builds large ones alone.

    Args:
        model_class: ``Blip2ITM`` or ``Blip2Qformer``.
        tokenizer: with LAVIS's further tokens (``model_class.init_tokenizer()``).

    Raises:
        UserError: sizes that cannot work.
    """
    _check_sizes(sizes)
    width = sizes.qformer.width
    model = model_class.__new__(model_class)
    nn.Module.__init__(model)
    model.tokenizer, model.max_txt_len = tokenizer, sizes.max_txt_len
    model.visual_encoder = _vision_encoder(sizes)
    model.ln_vision = LayerNorm(sizes.vision.width)
    config = _qformer_config(sizes, len(tokenizer))
    model.Qformer = BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(config.initializer_range * torch.randn(1, sizes.num_query_token, width))
    model.vision_proj = nn.Linear(width, sizes.embed_dim)
    model.text_proj = nn.Linear(width, sizes.embed_dim)
    model.itm_head = nn.Linear(width, 2)
    model.temp = nn.Parameter(torch.tensor(0.07))
    assembled: nn.Module = model
    return assembled


def _vision_encoder(sizes: Blip2Sizes) -> Any:
    return VisionTransformer(
        img_size=sizes.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.vision.width,
        depth=sizes.vision.layers,
        num_heads=sizes.vision.heads,
        qkv_bias=True,
        use_mean_pooling=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def _qformer_config(sizes: Blip2Sizes, words: int) -> Any:
    config = BertConfig(
        vocab_size=words,
        hidden_size=sizes.qformer.width,
        num_hidden_layers=sizes.qformer.layers,
        num_attention_heads=sizes.qformer.heads,
        intermediate_size=4 * sizes.qformer.width,
    )
    config.encoder_width, config.query_length = sizes.vision.width, sizes.num_query_token
    config.add_cross_attention, config.cross_attention_freq = True, sizes.cross_attention_freq
    return config


def _check_sizes(sizes: Blip2Sizes) -> None:
    faults = []
    if sizes.image_size % sizes.patch_size:
        faults.append(f"model.sizes.image_size: {sizes.image_size} is no multiple of patch_size {sizes.patch_size}")
    for name, tower in (("vision", sizes.vision), ("qformer", sizes.qformer)):
        if tower.width % tower.heads:
            faults.append(f"model.sizes.{name}.width: {tower.width} is no multiple of heads {tower.heads}")
    if faults:
        raise UserError(faults)


@register_adapter("blip2_image_text_matching", "blip2", "blip2_feature_extractor")
class Blip2Adapter(Adapter):
    """``Blip2ITM`` and ``Blip2Qformer`` of ``lavis.models.blip2_models``.

    Image features: the ViT's tokens ``[B, N, width]``, and in ``embeds [B, Q * D]`` the joint-space vectors of the Q
    queries, which read the picture without a text. Text features: the Q-Former's embeddings of the words
    ``[B, L, hidden]`` with mask, and the joint-space vector. The keys and values that the Q-Former makes of a
    picture are many times larger than its tokens, so they are made in ``match``, once per picture of a chunk.
    """

    inference_modules: ClassVar[tuple[str, ...]] = (
        "visual_encoder",
        "ln_vision",
        "Qformer.bert",
        "query_tokens",
        "vision_proj",
        "text_proj",
        "itm_head",
    )
    has_joint_space = True
    model: Any  # Blip2ITM or Blip2Qformer: LAVIS declares no types
    options: AdapterOptions

    def __init__(
        self, model: nn.Module, section: Mapping[str, Any] | None = None, options: CommonOptions | None = None
    ) -> None:
        _require_matching_head(type(model), hasattr(model, "itm_head"))
        super().__init__(model, section, options)
        if ENCODERS in self.options.freeze:
            self.model.query_tokens.requires_grad_(False)

    # -- building ------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, model_class: Any, section: Any, options: AdapterOptions) -> nn.Module:
        """Return LAVIS's model, which fetches EVA's and BERT's weights, or a small one of ``options.sizes``.

        Raises:
            UserError: a BLIP-2 without matching head, sizes that cannot work, weights that cannot be fetched.
        """
        _require_matching_head(model_class, hasattr(model_class, "compute_itm"))
        if options.sizes:
            sizes = parse(Blip2Sizes, options.sizes, "model.sizes")
            small = assemble(model_class, sizes, model_class.init_tokenizer())
            if section.get("freeze_vit", True):
                _freeze_as_lavis(small.visual_encoder)
            return small
        # from_config also loads the checkpoint and ignores weights that it lacks; _load refuses those that scores need
        try:
            unread = mock.patch.object(model_class, "load_checkpoint_from_config", lambda *args, **kwargs: None)
            with unread, towers_fetched_here():
                model: nn.Module = model_class.from_config(section)
                return model
        except (OSError, RuntimeError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"model: {model_class.__name__} cannot be built: {reason}; it takes its ViT and BERT from the network "
                "or LAVIS's and the hub's caches (a small one without: model.sizes and model.tokenizer)"
            ) from error

    @override
    def is_inference_weight(self, name: str) -> bool:
        # LAVIS's checkpoints leave out a frozen ViT: its weights came when LAVIS built it
        came_with_lavis = name.startswith("visual_encoder.") and not self.options.sizes
        return super().is_inference_weight(name) and not came_with_lavis

    # -- features ------------------------------------------------------------------------------------------------

    @property
    def bert(self) -> Any:
        """The Q-Former's transformer."""
        return self.model.Qformer.bert

    @property
    def queries(self) -> int:
        """Query tokens per picture, Q."""
        queries: int = self.model.query_tokens.shape[1]
        return queries

    @override
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Return features of ``images``, float ``[B, 3, S, S]``; one pass of the ViT, one of the queries.

        Raises:
            UserError: pictures of another size than the model's.
        """
        model = self.model
        self._check_size(images)
        self._widen_on_cpu()
        with model.maybe_autocast():
            tokens = model.ln_vision(model.visual_encoder(images))
        tokens = tokens.float()
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        query_output = self.bert(
            query_embeds=model.query_tokens.expand(len(tokens), -1, -1),
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask,
            return_dict=True,
        )
        embeds = nnf.normalize(model.vision_proj(query_output.last_hidden_state).float(), dim=-1)
        return ImageFeatures(tokens, None, embeds.flatten(1))

    @override
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        """Return features of B texts, L the longest's tokens and at most ``max_txt_len``."""
        model = self.model
        batch = model.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=model.max_txt_len, return_tensors="pt"
        ).to(self.device)
        tokens = self.bert.embeddings(input_ids=batch.input_ids)
        hidden = self.bert.encoder(
            tokens, attention_mask=self._additive(batch.attention_mask), return_dict=True
        ).last_hidden_state
        embeds = nnf.normalize(model.text_proj(hidden[:, 0]).float(), dim=-1)
        return TextFeatures(tokens, batch.attention_mask.bool(), embeds)

    def _additive(self, mask: Tensor) -> Tensor:
        """Return the wrapped model's own additive form of a mask ``[B, L]``."""
        additive: Tensor = self.bert.get_extended_attention_mask(mask.long(), mask.shape, mask.device, False)
        return additive

    def _check_size(self, images: Tensor) -> None:
        size = getattr(self.model.visual_encoder, "image_size", None)
        if isinstance(size, int) and tuple(images.shape[-2:]) != (size, size):
            raise UserError(
                f"pictures of {tuple(images.shape[-2:])} pixels, but this BLIP-2 takes {size}: set the processor's "
                f"image_size to {size}"
            )

    def _widen_on_cpu(self) -> None:
        """Widen the ViT to float32 on a CPU: LAVIS keeps it in half precision under autocast, on a GPU only."""
        vit = self.model.visual_encoder
        if self.device.type == "cpu" and any(p.dtype == torch.float16 for p in vit.parameters()):
            vit.float()

    # -- pairs ---------------------------------------------------------------------------------------------------

    @override
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """Return log-odds of the matching head, mean over the queries: float32 ``[P]``."""
        order = pairs[:, 0].argsort(stable=True)
        text_mask = texts.full_mask()

        def score(image_rows: Tensor, text_rows: Tensor) -> Tensor:
            distinct, rows = torch.unique_consecutive(image_rows, return_inverse=True)
            mask = text_mask.index_select(0, text_rows)
            length = last_used(mask)
            words = texts.tokens[:, :length].index_select(0, text_rows)
            return self._fuse(images.tokens.index_select(0, distinct), rows, words, mask[:, :length])

        scores = self.in_chunks(score, pairs[order], self._bytes_per_pair(images, texts))
        return scores[order.argsort()]

    def _fuse(self, tokens: Tensor, rows: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Return scores ``[P]`` of words ``[P, L, H]`` with the pictures ``rows [P]`` of ``tokens [U, N, W]``."""
        model, dtype = self.model, self.model.query_tokens.dtype
        queries = self.bert.embeddings(query_embeds=model.query_tokens.expand(len(rows), -1, -1))
        hidden = torch.cat([queries, words.to(dtype)], dim=1)
        all_real = mask.new_ones(1, tokens.shape[1]).long()
        with _projected_once(self.bert.encoder, rows):
            output = self.bert.encoder(
                hidden,
                attention_mask=self._additive(nnf.pad(mask, (self.queries, 0), value=True)),
                encoder_hidden_states=tokens.to(dtype),
                encoder_attention_mask=self.bert.invert_attention_mask(all_real),
                query_length=self.queries,
                return_dict=True,
            ).last_hidden_state[:, : self.queries]
        logits: Tensor = model.itm_head(output).mean(dim=1)
        return logits[:, 1] - logits[:, 0]

    def _bytes_per_pair(self, images: ImageFeatures, texts: TextFeatures) -> int:
        """Return a pair's float32 activations in a cross layer: keys and values with copies, maps, feed-forward."""
        config, patches = self.bert.config, images.tokens.shape[1]
        length = self.queries + texts.tokens.shape[1]
        maps = 3 * config.num_attention_heads * max(self.queries * patches, length * length)
        hidden = 4 * patches * config.hidden_size + length * (6 * config.hidden_size + 2 * config.intermediate_size)
        size: int = 4 * (maps + hidden)
        return size

    # -- the joint space -----------------------------------------------------------------------------------------

    @override
    def embed_images(self, images: ImageFeatures) -> Tensor:
        """Return unit vectors of every query, ``[B, Q, D]``."""
        return images.required_embeds().view(len(images), self.queries, -1)

    @override
    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.required_embeds()

    @override
    def joint_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Return the best query's cosine, ``[I, T]``, from ``[I, Q, D]`` and ``[T, D]``."""
        bytes_per_image = 4 * self.queries * max(1, len(text_embeds))
        rows = max(1, int(self.options.match_memory_mb * 2**20 // bytes_per_image))
        return torch.cat([(some @ text_embeds.T).amax(dim=1) for some in torch.split(image_embeds, rows)])

    # -- roles ---------------------------------------------------------------------------------------------------

    @override
    def encoder_modules(self) -> list[nn.Module]:
        model = self.model
        return [model.visual_encoder, model.ln_vision, model.Qformer.bert, model.vision_proj, model.text_proj]

    @override
    def encoders_frozen(self) -> bool:
        # the queries are a bare parameter of the model and shape the features too
        return super().encoders_frozen() and not self.model.query_tokens.requires_grad

    @override
    def encoder_settings(self) -> dict[str, Any]:
        tokens = self.model.query_tokens.detach().float().cpu().contiguous()
        return {
            "max_txt_len": self.model.max_txt_len,
            "vocabulary": sorted(self.model.tokenizer.get_vocab().items()),
            "query_tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        }

    @override
    def fusion_modules(self) -> list[nn.Module]:
        """Return the Q-Former's layers, which serve the encoders too, and the head."""
        return [self.bert.encoder, self.model.itm_head]

    @override
    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return LAVIS's pre-training loss (contrastive, matching, captioning) and its terms, 0-dim; ``blip2`` only.

        Raises:
            UserError: the model has no loss, or its loss cannot run in a process without a process group.
        """
        name = type(self.model).__name__
        if isinstance(self.model, Blip2ITM):
            raise UserError(f"{name} has no training loss of its own; set model.loss.student_weight: 0, or arch: blip2")
        if not is_dist_avail_and_initialized():
            raise UserError(
                f"{name}'s own loss asks for a process group: start the run with torchrun, or set "
                "model.loss.student_weight: 0"
            )
        return super().forward(samples)


def _freeze_as_lavis(encoder: Any) -> None:
    encoder.requires_grad_(False)
    encoder.eval()
    encoder.train = disabled_train


def _require_matching_head(model_class: type, has_head: bool) -> None:
    if not has_head:
        raise UserError(
            f"model.arch: {model_class.__name__} has no image-text matching head and cannot score pairs; "
            "choose blip2_image_text_matching or blip2"
        )


def _projections(encoder: Any) -> list[nn.Module]:
    """Return the layers that make keys and values of a picture, in every block that attends to it."""
    layers = [layer.crossattention.self for layer in encoder.layer if layer.has_cross_attention]
    return [projection for layer in layers for projection in (layer.key, layer.value)]


@contextmanager
def _projected_once(encoder: Any, rows: Tensor) -> Iterator[None]:
    """Let cross-attention read distinct pictures within the block, and see picture ``rows[p]`` at pair p.

    A picture's keys and values do not depend on the text. They are most of a pair's cost, so they are repeated
    after their projection, not before it.
    """

    def repeat(module: nn.Module, inputs: Any, projected: Tensor) -> Tensor:
        return projected.index_select(0, rows)

    handles = [projection.register_forward_hook(repeat) for projection in _projections(encoder)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
