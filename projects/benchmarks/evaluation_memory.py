"""Memory of a whole evaluation, encoding and scoring, with features in memory and with run.eval_memory_mb.

A stub stands for the matcher: its features have the size asked for, and a score costs next to nothing, so that seconds
are those of making, keeping and reading features. Every evaluation runs in a process of its own. "Peak" is how far its
resident memory rises, score tables included; the scores of both settings must be equal to the bit.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import PeakMemory, in_child, parsed, parser, progress, report
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.features import ImageFeatures, TextFeatures

CAPTIONS = 5
UNBOUNDED_MB = 1e9
WAYS = {
    "fusion": "fusion, every pair",
    "dual": "dual encoder, every pair",
    "shortlist": "fusion, shortlist of 16",
    "ensemble": "two fusions, every pair",
}
COLUMNS = {
    "name": "evaluation|s",
    "setting": "run.eval_memory_mb|s",
    "features_mb": "features, MB|,.0f",
    "tables_mb": "score tables, MB|,.0f",
    "peak_mb": "peak, MB|,.0f",
    "seconds": "seconds|.1f",
    "equal": "scores|s",
}


class Gallery(torch.utils.data.Dataset):
    """Pictures that are their numbers, with captions that are theirs."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.text = [f"{t:>{8 + t % 9}}" for t in range(CAPTIONS * images)]
        self.img2txt = {i: list(range(CAPTIONS * i, CAPTIONS * (i + 1))) for i in range(images)}
        self.txt2img = {t: t // CAPTIONS for t in range(CAPTIONS * images)}

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.tensor([float(index)]), "index": index}


class Stub(nn.Module, Matcher):
    """Features of noise; a score is the product of the class tokens."""

    has_joint_space = True

    def __init__(self, family: str, image_tokens: int, text_tokens: int, width: int, seed: int) -> None:
        super().__init__()
        self.family, self.width, self.seed = family, width, seed
        self.image_tokens, self.text_tokens = image_tokens, text_tokens

    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(self._noise(images[:, 0].int().tolist(), self.image_tokens))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        lengths = torch.tensor([max(2, self.text_tokens - 16 + len(text)) for text in texts])
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return TextFeatures(self._noise([-1 - int(text) for text in texts], longest), mask)

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        return (images.tokens[pairs[:, 0], 0] * texts.tokens[pairs[:, 1], 0]).sum(1)

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return images.tokens[:, 0] @ texts.tokens[:, 0].T

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return images.tokens[:, 1]

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.tokens[:, 1]

    def _noise(self, numbers: list[int], tokens: int) -> Tensor:
        found = torch.empty(len(numbers), tokens, self.width)
        for row, number in zip(found, numbers, strict=True):
            row.uniform_(-1, 1, generator=torch.Generator().manual_seed(2**32 + 2**20 * self.seed + number))
        return found


def measure(
    way: str, images: int, sizes: tuple[int, int, int], limit_mb: float, folder: str, seed: int
) -> dict[str, Any]:
    """One evaluation's figures; to be called in a process of its own."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    family = "dual" if way == "dual" else "fusion"
    matcher: Any = Stub(family, *sizes, seed)
    if way == "ensemble":
        matcher = Ensemble([matcher, Stub(family, *sizes, seed + 1)])
    protocol = EvaluationProtocol(
        k_test=16 if way == "shortlist" else None, eval_memory_mb=limit_mb, spill_folder=Path(folder)
    )
    Evaluator(protocol).evaluate(matcher, Gallery(8))  # what only the first call pays
    gallery = Gallery(images)
    with PeakMemory() as memory:
        start = time.perf_counter()
        found = Evaluator(protocol).evaluate(matcher, gallery)
        seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for table in (found.scores_i2t, found.scores_t2i):
        for rows in table.split(256):
            digest.update(rows.contiguous().numpy())
    tables = {table.untyped_storage().data_ptr(): table.nbytes for table in (found.scores_i2t, found.scores_t2i)}
    image_tokens, text_tokens, width = sizes
    return {
        "evaluation": way,
        "name": WAYS[way],
        "setting": "no bound" if limit_mb == UNBOUNDED_MB else f"{limit_mb:,g}",
        "features_mb": images * (image_tokens + CAPTIONS * text_tokens) * width * 4 / 1e6,
        "tables_mb": sum(tables.values()) / 1e6,
        "peak_mb": memory.extra / 1e6,
        "seconds": seconds,
        "sha256": digest.hexdigest(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    of = parser(__doc__)
    of.add_argument("--images", type=int, default=5000, help=f"with {CAPTIONS} captions each (default: 5000, as COCO)")
    of.add_argument("--image-tokens", type=int, default=197, help="of a picture (default: 197)")
    of.add_argument("--text-tokens", type=int, default=24, help="of the longest caption (default: 24)")
    of.add_argument("--width", type=int, default=768, help="of a token, float32 (default: 768)")
    of.add_argument("--eval-memory-mb", type=float, default=512, metavar="MB", help="the bound (default: 512)")
    of.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    of.add_argument("--folder", default=tempfile.gettempdir(), help="of the temporary files, on a disk with room")
    options = parsed(of, argv)
    if options.images < 2 or min(options.image_tokens, options.text_tokens) < 2:
        of.error("--images, --image-tokens, --text-tokens: at least 2 of each are needed")
    sizes = (options.image_tokens, options.text_tokens, options.width)
    settings = {
        "images": options.images, "texts": CAPTIONS * options.images, "image tokens": sizes[0],
        "text tokens": sizes[1], "width": sizes[2], "eval_memory_mb": options.eval_memory_mb, "seed": options.seed,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    try:
        for way in options.ways:
            for limit_mb in (UNBOUNDED_MB, options.eval_memory_mb):
                progress(f"{WAYS[way]}, {limit_mb:g} MB ...")
                rows.append(in_child(measure, way, options.images, sizes, limit_mb, options.folder, options.seed))
            rows[-1]["equal"] = "equal" if rows[-1]["sha256"] == rows[-2]["sha256"] else "DIFFERENT"
    except UserError as error:
        of.error(str(error))
    report("evaluation_memory", settings, rows, COLUMNS, options.json)
    return int(any(row.get("equal") == "DIFFERENT" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
