"""Model sizes and inputs of the benchmarks: random weights, random pictures, captions of stated lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lavis_dcd.common.files import packaged_folder

LONGEST = 40  # tokens of a caption, specials included, and what the published code pads every caption to
_MEDIAN, _SPREAD = 13.0, 0.36  # of the caption lengths: a log-normal distribution, mean about 14, as Flickr30K's
_FIRST_WORD = 5  # ids below are specials


@dataclass(frozen=True)
class Geometry:
    """What a training step is measured on.

    Args:
        teacher: the ``model:`` section, towers frozen, weights at random.
        student_layers: of the teacher's fusion layers.
        candidates, hard_negatives, images: the counts that are timed.
        check: candidates, hard negatives and images of the comparison with the plain path.
        repeats: timed steps.
    """

    teacher: dict[str, Any]
    student_layers: tuple[int, ...] = (0, 3, 5)
    candidates: int = 63
    hard_negatives: int = 7
    images: int = 1
    check: tuple[int, int, int] = (3, 1, 1)
    repeats: int = 1


def _meter(side: int, width: int, vision_layers: int, text_layers: int, heads: int, words: int) -> dict[str, Any]:
    """A METER section with towers and fusion of one width; six fusion layers."""
    return {
        "arch": "meter_retrieval",
        "vision": {"backbone": "clip_vit", "image_size": side, "patch_size": 16, "width": width,
                   "layers": vision_layers, "heads": heads, "freeze": True},
        "text": {"family": "bert", "name": "vocab.txt", "max_length": LONGEST, "freeze": True, "config": {
            "vocab_size": words, "hidden_size": width, "num_hidden_layers": text_layers,
            "num_attention_heads": heads, "intermediate_size": 4 * width, "max_position_embeddings": 64}},
        "fusion": {"width": width, "layers": 6, "heads": heads, "dropout": 0.1},
    }  # fmt: skip


def _meter_base() -> dict[str, Any]:
    """METER's Flickr30K retriever at 384 px, with the packaged sizes."""
    path = packaged_folder("configs") / "models" / "meter_retrieval_flickr.yaml"
    section = OmegaConf.to_container(OmegaConf.load(path).model)
    section |= {"load_finetuned": False, "finetuned": None, "pretrained": None}
    section["vision"]["freeze"] = section["text"]["freeze"] = True
    return section


def training_geometry(name: str) -> Geometry:
    """By the name that ``--geometry`` takes."""
    if name == "tiny":
        counts = {"candidates": 7, "hard_negatives": 3, "images": 2}
        return Geometry(_meter(32, 32, 1, 1, 2, 50), **counts, check=(7, 3, 2))
    if name == "small":
        return Geometry(_meter(224, 256, 4, 4, 4, 1000), check=(7, 3, 1), repeats=2)
    return Geometry(_meter_base())


def caption_lengths(count: int, generator: torch.Generator) -> Tensor:
    """int64 ``[count]``: tokens with specials, log-normal, from 5 to 40."""
    drawn = _MEDIAN * (_SPREAD * torch.randn(count, generator=generator)).exp()
    return drawn.round().long().clamp(5, LONGEST)


def captions(count: int, words: int, padding: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random token ids, int64 ``[count, 40]``, and which of them are real, bool ``[count, 40]``."""
    mask = torch.arange(LONGEST) < caption_lengths(count, generator)[:, None]
    ids = torch.randint(_FIRST_WORD, words, (count, LONGEST), generator=generator)
    return ids.masked_fill(~mask, padding), mask
