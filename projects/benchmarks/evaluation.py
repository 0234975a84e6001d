"""Recalls from a table of scores: seconds and memory of ours, and of LAVIS's own loop beside it.

Every image is scored against every text (five captions per image), both directions. The scores are random numbers
with the matches raised, so that the recalls lie between 0 and 100. Each implementation runs in a process of its own;
"extra memory" is how far the process rises above the tables that it is given.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from measuring import PeakMemory, in_child, parsed, parser, progress, report

from lavis_dcd.evaluation.metrics import retrieval_metrics

CAPTIONS = 5
# agg_metrics is left out: LAVIS's is the mean of the text recalls, ours of all six
COMPARED = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
COLUMNS = {
    "name": "implementation|s",
    "seconds": "seconds|.3f",
    "faster": "times faster|.1f",
    "extra_mb": "extra memory, MB|,.0f",
    "tables_mb": "tables, MB|,.0f",
    "r_mean": "r_mean|.3f",
    "difference": "largest difference of a figure|.1e",
}
Metrics = Callable[..., dict[str, float]]


def ours() -> Metrics:
    return retrieval_metrics


def lavis_loop() -> Metrics:
    """``RetrievalTask._report_metrics``, which writes a line into a file of the folder that LAVIS is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lavis.common.registry import registry
        from lavis.tasks.retrieval import RetrievalTask
    registry.register_path("output_dir", tempfile.mkdtemp())
    return RetrievalTask._report_metrics


IMPLEMENTATIONS = {"lavis": ("LAVIS's loop", lavis_loop), "ours": ("lavis_dcd.evaluation.metrics", ours)}


def tables(images: int, texts: int, layout: str, seed: int) -> tuple[np.ndarray, np.ndarray, dict, dict]:
    """float32 scores ``[I, T]`` and ``[T, I]``, and whose caption is whose."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((images, texts), dtype=np.float32)
    img2txt = {i: list(range(CAPTIONS * i, CAPTIONS * (i + 1))) for i in range(images)}
    for image, own in img2txt.items():
        scores[image, own] += 3.0
    txt2img = {text: image for image, own in img2txt.items() for text in own}
    return scores, (np.ascontiguousarray(scores.T) if layout == "copies" else scores.T), txt2img, img2txt


def measure(name: str, images: int, texts: int, layout: str, seed: int, repeats: int) -> dict[str, Any]:
    """One implementation's figures."""
    label, load = IMPLEMENTATIONS[name]
    compute = load()
    given = tables(images, texts, layout, seed)
    compute(*tables(20, 100, layout, seed))  # what only the first call pays
    seconds = []
    with PeakMemory() as memory:
        for _ in range(repeats):
            start = time.perf_counter()
            found = compute(*given)
            seconds.append(time.perf_counter() - start)
    held = given[0].nbytes * (2 if layout == "copies" else 1)
    return {
        "implementation": name,
        "name": label,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "extra_mb": memory.extra / 1e6,
        "tables_mb": held / 1e6,
        "metrics": {key: found[key] for key in COMPARED},
        "r_mean": found["r_mean"],
    }


def main(argv: list[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--images", type=int, default=5000, help="default: 5000, as COCO's test split")
    options_of.add_argument("--texts", type=int, help="default: five per image; must be just that")
    options_of.add_argument("--repeats", type=int, default=3, help="timed calls; the median is shown (default: 3)")
    options_of.add_argument(
        "--layout",
        choices=("copies", "view"),
        default="copies",
        help="text-to-image scores as a table of their own, as LAVIS's models return them (default), or as the "
        "transposed view of the other table",
    )
    options = parsed(options_of, argv)
    texts = CAPTIONS * options.images if options.texts is None else options.texts
    if options.images < 2 or texts != CAPTIONS * options.images:
        options_of.error(f"--texts: {texts}; at least 2 --images with {CAPTIONS} texts each are needed")
    settings = {"images": options.images, "texts": texts, "layout": options.layout, "repeats": options.repeats,
                "seed": options.seed}  # fmt: skip
    rows = []
    for name, (label, _) in IMPLEMENTATIONS.items():
        progress(f"{label} ...")
        rows.append(in_child(measure, name, options.images, texts, options.layout, options.seed, options.repeats))
    base = rows[0]
    for row in rows:
        row["faster"] = base["seconds"] / row["seconds"]
        row["difference"] = max(abs(row["metrics"][key] - base["metrics"][key]) for key in COMPARED)
    report("evaluation", settings, rows, COLUMNS, options.json)
    if any(row["difference"] > 1e-6 for row in rows):
        raise SystemExit("the implementations disagree")


if __name__ == "__main__":
    main()
