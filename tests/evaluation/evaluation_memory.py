"""A script: evaluates a stub on about 200 MB of features and prints how far its memory rises, in MB, as JSON.

Arguments: run.eval_memory_mb, k_test (0: every pair), "fresh" or "bank" (a bank on disk), a folder for files.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_dcd.banks.feature_bank import build_feature_bank
from lavis_dcd.banks.feature_sets import BankedEvaluationSet
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.training import devices as memory

CPU = torch.device("cpu")
TOKENS, WIDTH, WORDS = 64, 1024, 8  # 256 kB a picture, 32 kB a caption


class Gallery(torch.utils.data.Dataset):
    """Pictures that are their numbers."""

    vis_root = None

    def __init__(self, images: int) -> None:
        self.text = [f"caption {t:05}" for t in range(2 * images)]
        self.img2txt = {i: [2 * i, 2 * i + 1] for i in range(images)}
        self.txt2img = {t: t // 2 for t in range(2 * images)}
        self.image = [f"{i}.png" for i in range(images)]
        captions = zip(self.text[::2], self.text[1::2], strict=True)
        self.annotation = [{"image": n, "caption": list(own)} for n, own in zip(self.image, captions, strict=True)]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.tensor([float(index)]), "index": index}


class Stub(nn.Module, Matcher):
    """Scores by the first tokens of noise."""

    has_joint_space = True

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(1, 1).requires_grad_(False)

    def encoder_modules(self) -> list[nn.Module]:
        return [self.tower]

    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(_noise(images[:, 0].int().tolist(), TOKENS))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return TextFeatures(_noise([100_000 + int(text.split()[1]) for text in texts], WORDS))

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        return (images.tokens[pairs[:, 0], 0] * texts.tokens[pairs[:, 1], 0]).sum(1)

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return images.tokens[:, 0] @ texts.tokens[:, 0].T

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return images.tokens[:, 1]

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.tokens[:, 1]


def _noise(numbers: list[int], tokens: int) -> Tensor:
    rows = [torch.rand(tokens, WIDTH, generator=torch.Generator().manual_seed(number)) for number in numbers]
    return torch.stack(rows).half().float()  # a bank keeps half precision


def main(limit_mb: str, k_test: str, source: str, folder: str) -> None:
    matcher, gallery = Stub(), Gallery(600)
    settings = {"k_test": int(k_test) or None, "eval_memory_mb": float(limit_mb), "spill_folder": Path(folder)}
    protocol = EvaluationProtocol(batch_size=8, memory_mb=16, **settings)
    dataset: Any = gallery
    if source == "bank":
        bank = build_feature_bank(matcher, {"val": gallery}, 8, folder=Path(folder) / "bank")
        dataset = BankedEvaluationSet(gallery, bank, "val")
    Evaluator(replace(protocol, eval_memory_mb=1)).evaluate(matcher, Gallery(4))  # what only the first call pays
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the bank's making left would hide what evaluation takes
    memory.restart(CPU)
    start = memory.peak(CPU)["host_mb"]
    found = Evaluator(protocol).evaluate(matcher, dataset)
    scores = [float(table.double().sum()) for table in (found.scores_i2t, found.scores_t2i)]
    sys.stdout.write(json.dumps({"extra_mb": memory.peak(CPU)["host_mb"] - start, "scores": scores}))


if __name__ == "__main__":
    main(*sys.argv[1:])
