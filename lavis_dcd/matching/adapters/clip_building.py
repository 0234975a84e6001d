"""LAVIS's CLIP, of its own types or of other sizes, from the files that CLIP's weights come in."""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lavis_dcd.common import assets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.matching.adapters.base import AdapterOptions

BPE_ENTRIES = 49408  # of the vocabulary file that LAVIS ships


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


def assembled(model_class: type[nn.Module], section: Any, options: ClipOptions) -> nn.Module:
    """A CLIP of ``options.sizes``, at random.

    Args:
        model_class: LAVIS's ``CLIP``.
        section: whose ``pretrained`` and ``finetuned`` may name local files of these sizes, read later.

    Raises:
        UserError: unknown or missing sizes, sizes that cannot work, ``pretrained`` that names LAVIS's own weights.
    """
    from lavis.models.clip_models.model import CLIPTextCfg, CLIPVisionCfg

    sizes = parse(ClipSizes, options.sizes, "model.sizes")
    vision = parse(CLIPVisionCfg, sizes.vision, "model.sizes.vision")
    _check_sizes(sizes, vision)
    named = section.get("pretrained")
    if named and not finetuned(section) and local_file(named) is None:
        raise UserError(f"model.pretrained: {named} fits LAVIS's own sizes only; with model.sizes set it to null")
    text = CLIPTextCfg(**vars(sizes.text))
    model = model_class(sizes.embed_dim, vision, text, quick_gelu=bool(options.quick_gelu))
    # LAVIS's forward tokenizes to 77 whatever the model's context
    model.tokenizer = functools.partial(model.tokenizer, context_length=text.context_length)
    return model


def _check_sizes(sizes: ClipSizes, vision: Any) -> None:
    found = []
    if isinstance(vision.layers, int) and not vision.timm_model_name:
        if vision.width < 64 or vision.width % 64:
            found.append(f"model.sizes.vision.width: {vision.width} is no multiple of 64, the width of one head")
        if isinstance(vision.image_size, int) and vision.image_size % vision.patch_size:
            found.append(
                f"model.sizes.vision.image_size: {vision.image_size} is no multiple of patch_size {vision.patch_size}"
            )
    if sizes.text.width % sizes.text.heads:
        found.append(f"model.sizes.text.width: {sizes.text.width} is no multiple of heads {sizes.text.heads}")
    if sizes.text.vocab_size < BPE_ENTRIES:
        found.append(f"model.sizes.text.vocab_size: {sizes.text.vocab_size} is below CLIP's own {BPE_ENTRIES}")
    if found:
        raise UserError(found)


def created(name: str, pretrained: str, precision: str, quick_gelu: bool) -> nn.Module:
    """One of LAVIS's own types on the CPU, with the weights that LAVIS or OpenAI publish.

    Args:
        name: ViT-B-16, say.
        pretrained: a tag of LAVIS's (``openai``), a local file, or empty. Only an archive of OpenAI's is read here.
        precision: LAVIS's ``fp32`` or ``amp``; OpenAI's half-precision weights become float32.

    Raises:
        UserError: an unknown type or tag, weights that cannot be fetched, half precision.
    """
    from lavis.models.clip_models import model as lavis_clip

    file = local_file(pretrained)
    try:
        if file is not None and is_torchscript(file):
            return lavis_clip.load_openai_model(str(file), device="cpu", jit=False).float()
        # a local file's weights follow in _load, which knows more forms of files than LAVIS here
        source = "" if file is not None else pretrained
        return lavis_clip.create_model(name, source, precision=precision, force_quick_gelu=quick_gelu)
    except AssertionError as error:
        raise UserError(f"model.precision: {precision} cannot be built on a CPU; leave it at fp32") from error
    except (RuntimeError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model.pretrained: {pretrained or '(none)'} for clip {name}: {reason}; name a local file, or run once "
            "with a network"
        ) from error


def finetuned(section: Any) -> str | None:
    """The fine-tuned weights that a section asks for."""
    return (section.get("load_finetuned", True) and section.get("finetuned")) or None


def local_file(source: Any) -> Path | None:
    """``source`` as a path where it is a file here; ``None`` for tags, addresses and nothing."""
    path = Path(assets.resolve(str(source))).expanduser() if source else None
    return path if path is not None and path.is_file() else None


def is_torchscript(path: Path) -> bool:
    """Whether it is an archive of code and weights, as OpenAI publishes its models."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
