"""The ``model:`` sections of ``matching.py``: every family of the package in three sizes, weights at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geometries import LONGEST, training_geometry

# one token each, in BERT's kind of vocabulary below and in CLIP's own
WORDS = [
    "a", "the", "dog", "cat", "man", "woman", "red", "blue", "green", "car", "runs", "on", "in", "grass",
    "street", "two", "boy", "girl", "ball", "water", "white", "black", "house", "tree", "with", "and", "of",
    "at",
]  # fmt: skip
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BERT_WORDS = 30522


@dataclass(frozen=True)
class Sizes:
    """Of towers and fusion: side of a picture, width, layers, heads, ViLT's patch, entries of the vocabulary."""

    side: int
    width: int
    layers: int
    heads: int
    vilt_patch: int
    words: int


SIZES = {
    "tiny": Sizes(32, 64, 2, 1, 16, 60),
    "small": Sizes(224, 256, 4, 4, 32, 1000),
    "base": Sizes(384, 768, 12, 12, 32, _BERT_WORDS),
}


@dataclass(frozen=True)
class Section:
    """A matcher: its section, how deep its fusion is, and whose student it is."""

    label: str
    build: Callable[[str, Sizes, Path], dict[str, Any]]
    depth: Callable[[dict[str, Any]], str]
    teacher: str | None = None


def sections(name: str, geometry: str, folder: Path) -> tuple[dict[str, Any], int]:
    """The section of the matcher ``name`` and the side of its pictures; ``folder`` gets a vocabulary."""
    sizes = SIZES[geometry]
    words = [*_SPECIAL, *WORDS]
    # two entries are left for what BLIP adds
    words += [f"word{i}" for i in range(sizes.words - 2 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return SECTIONS[name].build(geometry, sizes, folder), sizes.side


def _meter(layers: int) -> Callable[[str, Sizes, Path], dict[str, Any]]:
    def section(geometry: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
        found = training_geometry("meter-base-384" if geometry == "base" else geometry).teacher
        return {**found, "fusion": {**found["fusion"], "layers": layers}}

    return section


def _vilt(share: int) -> Callable[[str, Sizes, Path], dict[str, Any]]:
    def section(geometry: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
        return {
            "arch": "vilt_retrieval",
            "image": {"image_size": sizes.side, "patch_size": sizes.vilt_patch},
            "text": {"name": "vocab.txt", "vocab_size": sizes.words, "max_length": LONGEST},
            "fusion": {"width": sizes.width, "layers": sizes.layers // share, "heads": sizes.heads},
        }

    return section


def _lavis(arch: str) -> Callable[[str, Sizes, Path], dict[str, Any]]:
    """ALBEF and BLIP."""

    def section(geometry: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
        text = {"hidden_size": sizes.width, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
                "intermediate_size": 4 * sizes.width, "max_position_embeddings": 64,
                "vocab_size": sizes.words}  # fmt: skip
        if arch.startswith("albef"):
            text["fusion_layer"] = sizes.layers // 2
        vision = {"embed_dim": sizes.width, "depth": sizes.layers, "num_heads": sizes.heads, "patch_size": 16}
        return {"arch": arch, "tokenizer": str(folder), "image_size": sizes.side, "embed_dim": sizes.width // 3,
                "max_txt_len": LONGEST, "queue_size": 8, "sizes": {"vision": vision, "text": text}}  # fmt: skip

    return section


def _blip2(geometry: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    one = {"width": sizes.width, "layers": sizes.layers, "heads": sizes.heads}
    return {"arch": "blip2_image_text_matching", "tokenizer": str(folder), "sizes": {
        "image_size": sizes.side, "patch_size": 16, "vision": one, "qformer": one, "embed_dim": sizes.width // 3,
        "max_txt_len": LONGEST}}  # fmt: skip


def _clip(geometry: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    vision = {"width": sizes.width, "layers": sizes.layers, "patch_size": 16, "image_size": sizes.side}
    text = {"width": sizes.width, "heads": sizes.heads, "layers": sizes.layers}
    return {"arch": "clip", "sizes": {"embed_dim": sizes.width, "vision": vision, "text": text}}


def _dual(geometry: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    found = training_geometry("meter-base-384" if geometry == "base" else geometry).teacher
    return {"arch": "dual_encoder", "vision": found["vision"], "text": found["text"], "head": {"dim": 256, "hidden": 0}}


def _of_fusion(section: dict[str, Any]) -> str:
    return str(section["fusion"]["layers"])


def _of_text(section: dict[str, Any]) -> str:
    text = section["sizes"]["text"]
    return str(text["num_hidden_layers"] - text.get("fusion_layer", 0))


SECTIONS = {
    "meter": Section("METER teacher", _meter(6), _of_fusion),
    "meter-student": Section("METER student", _meter(3), _of_fusion, teacher="meter"),
    "vilt": Section("ViLT teacher", _vilt(1), _of_fusion),
    "vilt-student": Section("ViLT student", _vilt(2), _of_fusion, teacher="vilt"),
    "albef": Section("ALBEF", _lavis("albef_retrieval"), _of_text),
    "blip": Section("BLIP", _lavis("blip_retrieval"), _of_text),
    "blip2": Section("BLIP-2", _blip2, lambda section: str(section["sizes"]["qformer"]["layers"])),
    "clip": Section("CLIP", _clip, lambda section: "0"),
    "dual": Section("dual encoder", _dual, lambda section: "0"),
}
