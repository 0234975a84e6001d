"""Pairs per second of every matcher, on cached features: what one pair costs once pictures and captions are encoded.

Every family of the package in one run, with random weights: METER and ViLT, each as a teacher and as a student thinned
to half its fusion layers; ALBEF, BLIP and BLIP-2 through their adapters; CLIP and the dual encoder, whose pair is a
product of two vectors. Where a model has exact shortcuts, the plain path stands beside them, and the last column
compares the scores of the two.

Pairs are laid out in two ways: "one image", a picture against many captions, as a candidate pool or a search lays them
out; "random", pairs of pictures and captions drawn at random, where little can be shared between pairs.

Geometries: small (default; under a minute on two cores) and base (the published sizes: ViT-B/16 at 384 px, BLIP-2 with
its Q-Former but a ViT-B; minutes); tiny, of a few seconds, is for tests.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from geometries import caption_lengths, captions
from matcher_sections import SECTIONS, WORDS, sections
from measuring import in_child, parsed, parser, progress, report
from torch import Tensor

from lavis_dcd.matching.attention import Shortcuts
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.building import build_matcher

COLUMNS = {
    "name": "matcher|s",
    "layers": "fusion layers|s",
    "layout": "pairs|s",
    "path": "path|s",
    "pairs_per_second": "pairs/s|,.1f",
    "ms_per_pair": "ms/pair|.3f",
    "to_plain": "times its plain path|.2f",
    "to_teacher": "times its teacher|.2f",
    "difference": "scores differ by|.1e",
}
LAYOUTS = ("one image", "random")
EXACT = 1e-4
_PICTURES = 8


def measure(name: str, geometry: str, pairs: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """One matcher's rows: each layout, by each path that it has."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        section, side = sections(name, geometry, Path(folder))
        matcher = build_matcher(section, "model").eval()
        _enlarge(matcher)
        images, texts = _features(matcher, side, pairs, seed)
    paths: dict[str, Shortcuts | None] = {"only": None}
    if hasattr(matcher, "shortcuts"):
        paths = {"plain": Shortcuts.none(), "fast": Shortcuts()}
    rows = []
    for layout in LAYOUTS:
        which = _pairs(layout, len(images), len(texts), pairs, seed)
        plain_rate = plain_scores = None
        for path, shortcuts in paths.items():
            if shortcuts is not None:
                matcher.shortcuts = shortcuts
            rate, scores = _rate(lambda which=which: matcher.match(images, texts, which), len(which), seconds)
            row = {"matcher": name, "name": SECTIONS[name].label, "layers": SECTIONS[name].depth(section),
                   "layout": layout, "path": path, "pairs_per_second": rate, "ms_per_pair": 1000 / rate}  # fmt: skip
            if path == "plain":
                plain_rate, plain_scores = rate, scores
            elif plain_scores is not None:
                # float32 resolves a score as a share of itself, however close the captions of random weights lie
                size = max(float(plain_scores.max() - plain_scores.min()), float(plain_scores.abs().max()))
                row["to_plain"] = rate / plain_rate
                row["difference"] = float((scores - plain_scores).abs().max()) / max(size, 1e-30)
            rows.append(row)
    return rows


@torch.no_grad()
def _enlarge(matcher: torch.nn.Module) -> None:
    """2.5 times the usual start, so that pairs differ in their scores, and a wrong score would show."""
    for weight in matcher.parameters():
        if weight.ndim == 2:
            weight.mul_(2.5)


@torch.no_grad()
def _features(matcher: Matcher, side: int, count: int, seed: int) -> tuple[ImageFeatures, TextFeatures]:
    """Of random pictures and ``count`` captions of Flickr30K's lengths."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(_PICTURES, 3, side, side, generator=generator)
    images = ImageFeatures.cat([matcher.encode_images(part) for part in pictures.split(2)])
    if hasattr(matcher, "encode_token_ids"):
        config = matcher.text_tower.model.config if hasattr(matcher, "text_tower") else matcher.config.text
        padding = getattr(config, "pad_token_id", 0)
        ids, mask = captions(count, config.vocab_size, padding, generator)
        return images, matcher.encode_token_ids(ids, mask).trimmed()
    lengths = caption_lengths(count, generator) - 2  # without the specials
    drawn = torch.randint(len(WORDS), (count, int(lengths.max())), generator=generator)
    texts = [" ".join(WORDS[w] for w in row[:n]) for row, n in zip(drawn.tolist(), lengths.tolist(), strict=True)]
    return images, matcher.encode_texts(texts)


def _pairs(layout: str, images: int, texts: int, count: int, seed: int) -> Tensor:
    """int64 ``[count, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "one image":
        return torch.stack([torch.zeros(count, dtype=torch.long), torch.arange(count) % texts], dim=1)
    drawn = [torch.randint(rows, (count,), generator=generator) for rows in (images, texts)]
    return torch.stack(drawn, dim=1)


@torch.no_grad()
def _rate(match: Callable[[], Tensor], count: int, seconds: float) -> tuple[float, Tensor]:
    """Pairs per second of the fastest call in about ``seconds``, after one that is not timed, and the scores."""
    scores = match()
    fastest, until = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        match()
        end = time.perf_counter()
        fastest = min(fastest, end - start)
        if end > until:
            gc.collect()
            return count / fastest, scores


def compare_with_teachers(rows: list[dict[str, Any]]) -> None:
    """Adds ``to_teacher`` to the students' rows: the same layout and path of the teacher."""
    rates = {(row["matcher"], row["layout"], row["path"]): row["pairs_per_second"] for row in rows}
    for row in rows:
        teacher = SECTIONS[row["matcher"]].teacher
        base = rates.get((teacher, row["layout"], row["path"])) if teacher else None
        if base:
            row["to_teacher"] = row["pairs_per_second"] / base


def main(argv: list[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--geometry", choices=("small", "base", "tiny"), default="small")
    options_of.add_argument("--pairs", type=int, metavar="P", help="pairs of one call (64; tiny: 6)")
    options_of.add_argument("--seconds", type=float, metavar="S", help="timed per row, about (1; tiny: 0)")
    options_of.add_argument("--matchers", metavar="A,B", help=f"only these, of {', '.join(SECTIONS)}")
    options = parsed(options_of, argv)
    names = options.matchers.split(",") if options.matchers else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        options_of.error(f"--matchers: unknown {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    tiny = options.geometry == "tiny"
    pairs = options.pairs if options.pairs is not None else (6 if tiny else 64)
    seconds = options.seconds if options.seconds is not None else (0.0 if tiny else 1.0)
    if pairs < 2:
        options_of.error(f"--pairs: {pairs}, at least 2 are needed")
    rows = []
    for name in names:
        rows += in_child(measure, name, options.geometry, pairs, seconds, options.seed)
        progress(f"{name}: {rows[-1]['pairs_per_second']:,.1f} pairs per second")
    compare_with_teachers(rows)
    settings = {"geometry": options.geometry, "pairs": pairs, "seconds": seconds, "seed": options.seed}
    report("matching", settings, rows, COLUMNS, options.json)
    worst = max((row.get("difference", 0.0) for row in rows), default=0.0)
    if not worst < EXACT:
        raise SystemExit(f"a fast path differs from its plain path by {worst:.1e}, more than {EXACT:.0e}")


if __name__ == "__main__":
    main()
