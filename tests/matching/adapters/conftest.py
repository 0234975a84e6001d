"""A vocabulary of a few words, and tiny ALBEF and BLIP models on it: no network, no shared folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_dcd.matching.adapters import albef_blip as albef  # noqa: F401  they register themselves
from lavis_dcd.matching.adapters.base import Adapter
from lavis_dcd.matching.adapters.registry import adapter_for

WORDS = ["a", "the", "dog", "cat", "red", "blue", "car", "runs", "sleeps", "on", "in", "grass", "street", "two", "man"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CAPTIONS = [
    "a dog runs on the grass",
    "a red car",
    "two cat sleeps in the blue car on the street in the red grass",
    "the man runs",
]
TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 40, "vocab_size": len(SPECIAL) + len(WORDS) + 2}  # fmt: skip
VISION = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with BERT's kind of ``vocab.txt``."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS) + "\n")
    return folder


@pytest.fixture
def captions() -> list[str]:
    return list(CAPTIONS)


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tiny_section(vocabulary: Path) -> Callable[..., dict[str, Any]]:
    """``tiny_section(arch, **overrides)``: a ``model:`` section that builds in milliseconds."""

    def section(arch: str, **overrides: Any) -> dict[str, Any]:
        text = {**TEXT, "fusion_layer": 2} if arch.startswith("albef") else dict(TEXT)
        own = {"arch": arch, "tokenizer": str(vocabulary), "image_size": 32, "embed_dim": 16, "max_txt_len": 20,
               "queue_size": 8, "sizes": {"vision": dict(VISION), "text": text}}  # fmt: skip
        return {**own, **overrides}

    return section


@pytest.fixture
def tiny(tiny_section) -> Callable[..., Adapter]:
    """``tiny(arch, **overrides)``: the adapter of that section in evaluation mode, seeded weights that matter."""

    def build(arch: str, seed: int = 0, **overrides: Any) -> Adapter:
        torch.manual_seed(seed)
        section = OmegaConf.create(tiny_section(arch, **overrides))
        adapter = adapter_for(arch).from_config(registry.get_model_class(arch), section)
        if not (section.get("finetuned") or section.get("pretrained")):
            # LAVIS starts at std 0.02, where a wrong score would differ by less than a test sees
            for parameter in adapter.model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.25)
            getattr(adapter.model, "copy_params", lambda: None)()
        return adapter.eval()

    return build
