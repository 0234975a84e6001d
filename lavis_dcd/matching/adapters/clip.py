"""CLIP as a matcher: two encoders, a learned scale, every pair one scalar product."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.dist_utils import is_dist_avail_and_initialized
from lavis.models.clip_models import model as lavis_clip
from lavis.models.clip_models.loss import ClipLoss
from torch import Tensor, nn
from torch.jit import load as load_script
from torch.nn import functional as nnf
from typing_extensions import override

from lavis_dcd.common.archives import opened_file
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import asset_path
from lavis_dcd.common.schema import parse
from lavis_dcd.common.tensor_files import load_tensors, tensor_faults, tensors_of
from lavis_dcd.matching.adapters.base import ENCODERS, Adapter, AdapterOptions, CommonOptions, naming
from lavis_dcd.matching.adapters.registry import register_adapter
from lavis_dcd.matching.features import ImageFeatures, TextFeatures

BPE_ENTRIES = 49408  # of the vocabulary file that LAVIS ships
# one product of all rows costs less than gathering pairs until it holds this many times more of them
DENSE_FACTOR = 4


@dataclass
class ClipTextSizes:
    """LAVIS's ``CLIPTextCfg``, with CLIP's own values where a small model need not differ."""

    width: int
    heads: int
    layers: int
    context_length: int = 77
    vocab_size: int = BPE_ENTRIES


@dataclass
class ClipSizes:
    """A CLIP of another size than LAVIS's types.

    Args:
        embed_dim: width of the joint space.
        vision: fields of LAVIS's ``CLIPVisionCfg``; a ViT has ``width / 64`` heads.
        text: the text transformer.
    """

    embed_dim: int
    vision: dict[str, Any]
    text: ClipTextSizes


@dataclass
class ClipOptions(AdapterOptions):
    """Further keys of a CLIP's section.

    Args:
        quick_gelu: whether the weights were trained with OpenAI's approximation of GELU; ``None``: as LAVIS builds
            the type, and yes where ``pretrained`` says ``openai``, for files that were fine-tuned from there.
        sizes: see :class:`ClipSizes`.
    """

    quick_gelu: bool | None = None
    sizes: dict[str, Any] = field(default_factory=dict)


def assembled(model_class: Any, section: Any, options: ClipOptions) -> nn.Module:
    """Return a CLIP of ``options.sizes``, at random.

    Args:
        model_class: LAVIS's ``CLIP``.
        section: whose ``pretrained`` and ``finetuned`` may name local files of these sizes, read later.

    Raises:
        UserError: unknown or missing sizes, sizes that cannot work, ``pretrained`` that names LAVIS's own weights.
    """
    sizes = parse(ClipSizes, options.sizes, "model.sizes")
    vision = parse(lavis_clip.CLIPVisionCfg, sizes.vision, "model.sizes.vision")
    _check_sizes(sizes, vision)
    named = section.get("pretrained")
    if named and not finetuned(section) and local_file(named) is None:
        raise UserError(f"model.pretrained: {named} fits LAVIS's own sizes only; with model.sizes set it to null")
    text = lavis_clip.CLIPTextCfg(**vars(sizes.text))
    model = model_class(sizes.embed_dim, vision, text, quick_gelu=bool(options.quick_gelu))
    # LAVIS's forward tokenizes to 77 whatever the model's context
    model.tokenizer = functools.partial(model.tokenizer, context_length=text.context_length)
    small: nn.Module = model
    return small


def _check_sizes(sizes: ClipSizes, vision: Any) -> None:
    faults = []
    if isinstance(vision.layers, int) and not vision.timm_model_name:
        if vision.width < 64 or vision.width % 64:
            faults.append(f"model.sizes.vision.width: {vision.width} is no multiple of 64, the width of one head")
        if isinstance(vision.image_size, int) and vision.image_size % vision.patch_size:
            faults.append(
                f"model.sizes.vision.image_size: {vision.image_size} is no multiple of patch_size {vision.patch_size}"
            )
    if sizes.text.width % sizes.text.heads:
        faults.append(f"model.sizes.text.width: {sizes.text.width} is no multiple of heads {sizes.text.heads}")
    if sizes.text.vocab_size < BPE_ENTRIES:
        faults.append(f"model.sizes.text.vocab_size: {sizes.text.vocab_size} is below CLIP's own {BPE_ENTRIES}")
    if faults:
        raise UserError(faults)


def created(name: str, pretrained: str, precision: str, quick_gelu: bool) -> nn.Module:
    """Return one of LAVIS's own types on the CPU, with the weights that LAVIS or OpenAI publish.

    Args:
        name: ViT-B-16, say.
        pretrained: a tag of LAVIS's (``openai``), a local file, whose weights follow in ``_load``, or empty.
        precision: LAVIS's ``fp32`` or ``amp``; OpenAI's half-precision weights become float32.

    Raises:
        UserError: an unknown type or tag, weights that cannot be fetched or are not OpenAI's, half precision.
    """
    address = published(name, pretrained)
    if pretrained and not address and local_file(pretrained) is None:
        raise UserError(_not_built(name, pretrained, "it is neither a file nor a tag that LAVIS lists for this type"))
    try:
        if address and pretrained.lower() == "openai":
            return _openai_model(address)
        # LAVIS takes whatever exists for a path; a local file is read here instead
        source = pretrained if address else ""
        model: nn.Module = lavis_clip.create_model(name, source, precision=precision, force_quick_gelu=quick_gelu)
        return model
    except UserError:
        raise
    except AssertionError as error:
        raise UserError(f"model.precision: {precision} cannot be built on a CPU; leave it at fp32") from error
    except (RuntimeError, OSError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(_not_built(name, pretrained, reason)) from error


def _not_built(name: str, pretrained: str, reason: str) -> str:
    named = pretrained or "(none)"
    return (
        f"model.pretrained: {named} for clip {name}: {reason}; name a local file of tensors, or run once with a network"
    )


def published(name: str, tag: Any) -> str:
    """Return the address of the weights that LAVIS lists for a type under a tag; empty where it lists none."""
    address: str = lavis_clip.get_pretrained_url(name.replace("/", "-"), str(tag)) if tag else ""
    return address


def _openai_model(address: str) -> nn.Module:
    archive = official_script(Path(lavis_clip.download_pretrained(address)), [address]).eval()
    model: nn.Module = lavis_clip.build_model_from_openai_state_dict(archive.state_dict()).float()
    return model


def official_script(path: Path, addresses: Sequence[str] | None = None) -> Any:
    """Return an archive of OpenAI's: TorchScript, which runs when it is read, and so for its official SHA-256 alone.

    The checked bytes are those that run, whatever gets the file's name meanwhile.

    Args:
        path: of the archive.
        addresses: from which it may be; by default any that LAVIS lists. OpenAI's have the SHA-256 as their last but
            one part.

    Raises:
        UserError: the file has another SHA-256.
    """
    if addresses is None:
        addresses = [published(name, "openai") for name in lavis_clip.list_openai_models()]
    with opened_file(path) as file:
        content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if all(address.split("/")[-2] != found for address in addresses):
        raise UserError(
            f"model.pretrained: {path} has the SHA-256 {found}, which is not that of OpenAI's file: it was not run; "
            "remove it, or name a file of tensors"
        )
    return load_script(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]


def finetuned(section: Any) -> str | None:
    """Return the fine-tuned weights that a section names; ``None`` where it names none or switches them off."""
    return (section.get("load_finetuned", True) and section.get("finetuned")) or None


def local_file(source: Any) -> Path | None:
    """Return ``source`` as a path where it is a file here; ``None`` for tags, addresses and nothing."""
    path = Path(asset_path(str(source))).expanduser() if source else None
    return path if path is not None and path.is_file() else None


@register_adapter("clip", "clip_feature_extractor")
class ClipAdapter(Adapter):
    """``lavis.models.clip_models.model.CLIP``. The score of a pair is ``exp(logit_scale) * cosine``.

    Features: ``embeds [B, E]``, unit vectors of the joint space, and the same as one token, ``tokens [B, 1, E]``.
    """

    options_class: ClassVar[type[CommonOptions]] = ClipOptions
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
    model: Any  # LAVIS's CLIP, which declares no types
    options: ClipOptions

    def __init__(
        self, model: nn.Module, section: Mapping[str, Any] | None = None, options: CommonOptions | None = None
    ) -> None:
        super().__init__(model, section, options)
        if ENCODERS in self.options.freeze:
            for parameter in self._bare_parameters():
                parameter.requires_grad_(False)

    # -- building and loading ------------------------------------------------------------------------------------

    @classmethod
    def build(cls, model_class: Any, section: Any, options: ClipOptions) -> nn.Module:
        """Return LAVIS's ``create_model``, or a CLIP of ``options.sizes``; a local file's weights follow in ``_load``.

        Raises:
            UserError: sizes that cannot work; a type that LAVIS does not have; weights that cannot be fetched.
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

    @override
    def _load(self, section: Any, path: str) -> list[str]:
        named = None if finetuned(section) else section.get("pretrained")
        if named and not self.options.sizes and published(str(section.get("model_type")), named):
            return []  # a tag: the weights came when the model was built
        return super()._load(section, path)

    @override
    def _read(self, source: str, where: str, pretrained: bool = False) -> list[str]:
        """Load a local file of any usual form (ours, a bare state dict, open_clip's); the rest as LAVIS does."""
        file = local_file(source)
        if file is None:
            return super()._read(source, where, pretrained)
        with naming(where):
            saved = load_tensors(file)
        weights = tensors_of(saved.get("model", saved.get("state_dict", saved)))
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        if faults := tensor_faults(weights, self.model.state_dict(), file):
            raise UserError([f"{where}: {line}" for line in faults[:10]])
        try:
            missing = list(self.model.load_state_dict(weights, strict=False).missing_keys)
        except RuntimeError as error:
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
        """Return whether the wrapped model runs OpenAI's approximation of GELU."""
        return any(type(module).__name__ == "QuickGELU" for module in self.model.modules())

    @override
    def checkpoint(self) -> dict[str, Any]:
        saved = super().checkpoint()
        saved["config"]["quick_gelu"] = self.quick_gelu
        return saved

    # -- the matching contract -----------------------------------------------------------------------------------

    @override
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Return features of ``images``, float ``[B, 3, S, S]``.

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

    @override
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        """Return features of B texts by the model's own tokenizer, cut at its context length as LAVIS cuts them."""
        ids = self.model.tokenizer(list(texts), context_length=self.model.context_length).to(self.device)
        return TextFeatures(*_one_token(self.model.encode_text(ids)))

    @override
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        if len(images) * len(texts) <= DENSE_FACTOR * len(pairs):
            return self.match_all(images, texts)[pairs[:, 0], pairs[:, 1]]
        image_embeds, text_embeds, scale = self.embed_images(images), self.embed_texts(texts), self._scale()

        def score(image_rows: Tensor, text_rows: Tensor) -> Tensor:
            products = image_embeds.index_select(0, image_rows) * text_embeds.index_select(0, text_rows)
            return scale * products.sum(dim=-1)

        return self.in_chunks(score, pairs, bytes_per_pair=3 * 4 * image_embeds.shape[1])

    @override
    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return self._scale() * self.joint_scores(self.embed_images(images), self.embed_texts(texts))

    @override
    def embed_images(self, images: ImageFeatures) -> Tensor:
        return images.required_embeds().float()

    @override
    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.required_embeds().float()

    @override
    def joint_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Return cosines ``[I, T]``, float32 under autocast too: times 100, half precision would mix up ranks."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            return image_embeds.float() @ text_embeds.float().T

    def _scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale.float().exp()
        return scale

    @override
    def encoder_modules(self) -> list[nn.Module]:
        model = self.model
        return [model.visual, model.transformer, model.token_embedding, model.ln_final]

    def _bare_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that encode texts and belong to none of the model's modules but to the model itself."""
        return [self.model.positional_embedding, self.model.text_projection]

    @override
    def encoders_frozen(self) -> bool:
        return super().encoders_frozen() and not any(p.requires_grad for p in self._bare_parameters())

    @override
    def encoder_settings(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for parameter in self._bare_parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return {"context_length": self.model.context_length, "bare_parameters": digest.hexdigest()}

    @override
    def fusion_parameters(self) -> int:
        return 0  # the scale can be folded into one side's embeddings

    # -- the model's own loss ------------------------------------------------------------------------------------

    @override
    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return LAVIS's InfoNCE over the batch, 0-dim ``loss``, and ``logit_scale_exp``."""
        # LAVIS makes its loss at first use and takes its size from the process group, which a single process lacks
        if self.model._loss is None and not is_dist_avail_and_initialized():
            self.model._loss = ClipLoss()
        return super().forward(samples)


def _one_token(embeds: Tensor) -> tuple[Tensor, None, Tensor]:
    embeds = nnf.normalize(embeds.float(), dim=-1)
    # a copy: files of tensors cannot hold two views of one storage
    return embeds[:, None].clone(), None, embeds
