"""Pairs per second of every matcher, on cached features: what one pair costs once pictures and captions are encoded.

Every family of the package in one run, with random weights: METER and ViLT, each as a teacher and as a student thinned
to half its fusion layers; ALBEF, BLIP and BLIP-2 through their adapters; CLIP and the dual encoder, whose pair is a
product of two vectors. Where a model has exact shortcuts, the plain path stands beside them, and the last column
compares the scores of the two. ``--without`` adds the fast path without a named shortcut; ``--backward`` times a
forward and a backward pass, as in training. The paths of a layout take turns, call by call, so that a busy machine
slows all alike.

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
from dataclasses import dataclass, fields, replace
from functools import partial
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
    "to_fast": "times its fast path|.2f",
    "to_teacher": "times its teacher|.2f",
    "difference": "scores differ by|.1e",
}
LAYOUTS = ("one image", "random")
EXACT = 1e-4
_PICTURES = 8
_SHORTCUTS = tuple(field.name for field in fields(Shortcuts))


@dataclass(frozen=True)
class Plan:
    """The counts of a run: pairs of one call, seconds that a layout of one matcher takes per path, and the rest.

    Args:
        without: names of ``Shortcuts``, each left out of the fast path in a row of its own.
        backward: time a forward and a backward pass.
    """

    geometry: str
    pairs: int
    seconds: float
    seed: int
    without: tuple[str, ...] = ()
    backward: bool = False

    def paths(self, matcher: Matcher) -> dict[str, Shortcuts | None]:
        """Every path of ``matcher`` by its name; ``None`` where there is one path only."""
        if not hasattr(matcher, "shortcuts"):
            return {"only": None}
        left_out = {f"no {name}": replace(Shortcuts(), **{name: False}) for name in self.without}
        return {"plain": Shortcuts.none(), "fast": Shortcuts(), **left_out}


def measure(name: str, plan: Plan) -> list[dict[str, Any]]:
    """One matcher's rows: each layout, by each path that it has."""
    torch.manual_seed(plan.seed)
    with tempfile.TemporaryDirectory() as folder:
        section, side = sections(name, plan.geometry, Path(folder))
        matcher = build_matcher(section, "model").eval()
        _enlarge(matcher)
        images, texts = _features(matcher, side, plan.pairs, plan.seed)
    paths = plan.paths(matcher)
    rows = []
    for layout in LAYOUTS:
        pairs = _pairs(layout, len(images), len(texts), plan.pairs, plan.seed)
        calls = {path: partial(_match, matcher, shortcuts, images, texts, pairs, plan.backward)
                 for path, shortcuts in paths.items()}  # fmt: skip
        for path, (rate, scores) in _rates(calls, len(pairs), plan.seconds).items():
            rows.append({"matcher": name, "name": SECTIONS[name].label, "layers": SECTIONS[name].depth(section),
                         "layout": layout, "path": path, "pairs_per_second": rate, "ms_per_pair": 1000 / rate,
                         "scores": scores})  # fmt: skip
    compare_paths(rows)
    return rows


def compare_paths(rows: list[dict[str, Any]]) -> None:
    """Replace the rows' ``scores`` by ``to_plain``, ``to_fast`` and ``difference``, within each layout."""
    by_path = {(row["layout"], row["path"]): row for row in rows}
    scores = {place: row.pop("scores") for place, row in by_path.items()}
    for (layout, path), row in by_path.items():
        plain, fast = by_path.get((layout, "plain")), by_path.get((layout, "fast"))
        if plain is None or path == "plain":
            continue
        expected = scores[layout, "plain"]
        # float32 resolves a score as a share of itself, however close the captions of random weights lie
        size = max(float(expected.max() - expected.min()), float(expected.abs().max()))
        row["to_plain"] = row["pairs_per_second"] / plain["pairs_per_second"]
        row["difference"] = float((scores[layout, path] - expected).abs().max()) / max(size, 1e-30)
        if path != "fast":
            row["to_fast"] = row["pairs_per_second"] / fast["pairs_per_second"]


@torch.no_grad()
def _enlarge(matcher: torch.nn.Module) -> None:
    """2.5 times the usual start, so that pairs differ in their scores, and a wrong score would show."""
    for weight in matcher.parameters():
        if weight.ndim == 2:
            weight.mul_(2.5)


@torch.no_grad()
def _features(matcher: Matcher, side: int, count: int, seed: int) -> tuple[ImageFeatures, TextFeatures]:
    """Return features of random pictures and ``count`` captions of Flickr30K's lengths."""
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


def _match(
    matcher: Matcher, shortcuts: Shortcuts | None, images: ImageFeatures, texts: TextFeatures, pairs: Tensor,
    backward: bool,
) -> Tensor:  # fmt: skip
    """Scores ``[P]`` by the path that ``shortcuts`` name, and where ``backward`` says so also their gradients."""
    if shortcuts is not None:
        matcher.shortcuts = shortcuts
    with torch.set_grad_enabled(backward):
        scores = matcher.match(images, texts, pairs)
        if backward:
            scores.sum().backward()
    return scores.detach()


def _rates(calls: dict[str, Callable[[], Tensor]], count: int, seconds: float) -> dict[str, tuple[float, Tensor]]:
    """Pairs per second of each path's fastest call, and its scores.

    The calls take turns for about ``seconds`` each, after one of each that is not timed.
    """
    scores = {path: call() for path, call in calls.items()}
    fastest = dict.fromkeys(calls, float("inf"))
    until = time.perf_counter() + seconds * len(calls)
    while True:
        for path, call in calls.items():
            start = time.perf_counter()
            call()
            fastest[path] = min(fastest[path], time.perf_counter() - start)
        if time.perf_counter() > until:
            gc.collect()
            return {path: (count / fastest[path], scores[path]) for path in calls}


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
    options_of.add_argument(
        "--without", metavar="A,B", help=f"shortcuts left out in rows of their own, of {', '.join(_SHORTCUTS)}"
    )
    options_of.add_argument("--backward", action="store_true", help="time a forward and a backward pass")
    options = parsed(options_of, argv)
    names = options.matchers.split(",") if options.matchers else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        options_of.error(f"--matchers: unknown {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    without = tuple(options.without.split(",")) if options.without else ()
    if unknown := [name for name in without if name not in _SHORTCUTS]:
        options_of.error(f"--without: unknown {', '.join(unknown)}; known: {', '.join(_SHORTCUTS)}")
    tiny = options.geometry == "tiny"
    pairs = options.pairs if options.pairs is not None else (6 if tiny else 64)
    seconds = options.seconds if options.seconds is not None else (0.0 if tiny else 1.0)
    if pairs < 2:
        options_of.error(f"--pairs: {pairs}, at least 2 are needed")
    plan = Plan(options.geometry, pairs, seconds, options.seed, without, options.backward)
    rows = []
    for name in names:
        rows += in_child(measure, name, plan)
        progress(f"{name}: {rows[-1]['pairs_per_second']:,.1f} pairs per second")
    compare_with_teachers(rows)
    settings = {"geometry": options.geometry, "pairs": pairs, "seconds": seconds, "seed": options.seed,
                "backward": options.backward}  # fmt: skip
    report("matching", settings, rows, COLUMNS, options.json)
    worst = max((row.get("difference", 0.0) for row in rows), default=0.0)
    if not worst < EXACT:
        raise SystemExit(f"a fast path differs from its plain path by {worst:.1e}, more than {EXACT:.0e}")


if __name__ == "__main__":
    main()
