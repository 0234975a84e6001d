"""Recalls and ranks of image-text retrieval, exact, in blocks of rows (5,000 x 25,000 need no second copy).

Names are LAVIS's: `txt_*` is text retrieval (an image asks, captions answer), `img_*` the other way. Ties
count against the model: a rank is 1 + the number of non-matching items that score at least as high as the
best match.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Scores = np.ndarray | torch.Tensor
Matches = Mapping[int, int | Sequence[int]]

RECALL_DEPTHS = (1, 5, 10)
# Scores compared at a time; the temporaries of a block stay below about 40 MB.
_BLOCK_SCORES = 4_000_000


def retrieval_metrics(
    scores_i2t: Scores, scores_t2i: Scores, txt2img: Matches, img2txt: Matches
) -> dict[str, float]:
    """All metrics of one evaluation.

    Args:
        scores_i2t: [I, T], image i against text t, higher is better, any float type, on any device.
        scores_t2i: [T, I], text t against image i (not always the transpose: each side may have its own
            shortlist).
        txt2img: text row -> its image row (or rows).
        img2txt: image row -> its text rows.

    Returns:
        txt_r1, txt_r5, txt_r10, img_r1, img_r5, img_r10, txt_r_mean, img_r_mean, r_mean (mean of the six) in
        percent; r_sum (their sum); txt_median_rank, img_median_rank (1-based); agg_metrics (= r_mean, by
        which LAVIS chooses a checkpoint).

    Raises:
        ValueError: on shapes that do not fit, NaN scores, rows without a match, rows out of range, or two
            mappings that disagree.
    """
    images, texts = _check_shapes(scores_i2t, scores_t2i)
    of_images = _match_pairs(img2txt, images, texts, "img2txt")
    of_texts = _match_pairs(txt2img, texts, images, "txt2img")
    _check_agreement(of_images, of_texts)
    ranks = {
        "txt": _ranks(scores_i2t, of_images, "scores_i2t"),
        "img": _ranks(scores_t2i, of_texts, "scores_t2i"),
    }
    return _summary(ranks)


def match_ranks(scores: Scores, matches: Matches) -> np.ndarray:
    """1-based rank, int64 [Q], of each query's best match among scores [Q, N]; ties count against it.

    Raises:
        ValueError: as `retrieval_metrics`.
    """
    if len(scores.shape) != 2:
        raise ValueError(f"scores must be [Q, N], got shape {tuple(scores.shape)}")
    return _ranks(scores, _match_pairs(matches, *scores.shape, "matches"), "scores")


def coco_1k_five_folds(
    scores_i2t: Scores,
    scores_t2i: Scores,
    txt2img: Matches,
    img2txt: Matches,
    images_per_fold: int = 1000,
    folds: int = 5,
) -> dict[str, float]:
    """COCO's 1K protocol: the metrics of each of five consecutive folds of 1,000 images, averaged.

    Arguments and keys are those of `retrieval_metrics`; the texts of a fold are those that match its images,
    and a median rank is the mean of the folds' medians.

    Raises:
        ValueError: as `retrieval_metrics`, and when there are not exactly folds * images_per_fold images.
    """
    images, texts = _check_shapes(scores_i2t, scores_t2i)
    if images != folds * images_per_fold:
        raise ValueError(
            f"{folds} folds of {images_per_fold} images need {folds * images_per_fold} images, got {images}"
        )
    pairs = _match_pairs(img2txt, images, texts, "img2txt")
    _check_agreement(pairs, _match_pairs(txt2img, texts, images, "txt2img"))
    results = []
    for first in range(0, images, images_per_fold):
        inside = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < first + images_per_fold)]
        own_texts = np.unique(inside[:, 1])
        local = np.stack([inside[:, 0] - first, np.searchsorted(own_texts, inside[:, 1])], axis=1)
        rows = np.arange(first, first + images_per_fold)
        results.append(
            _summary(
                {
                    "txt": _ranks(_part(scores_i2t, rows, own_texts), local, "scores_i2t"),
                    "img": _ranks(_part(scores_t2i, own_texts, rows), _swapped(local), "scores_t2i"),
                }
            )
        )
    return {key: float(np.mean([result[key] for result in results])) for key in results[0]}


def _summary(ranks: dict[str, np.ndarray]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for side, values in ranks.items():
        for depth in RECALL_DEPTHS:
            metrics[f"{side}_r{depth}"] = 100.0 * int((values <= depth).sum()) / len(values)
    recalls = list(metrics.values())
    for side, values in ranks.items():
        metrics[f"{side}_r_mean"] = float(np.mean([metrics[f"{side}_r{depth}"] for depth in RECALL_DEPTHS]))
        metrics[f"{side}_median_rank"] = float(np.median(values))
    metrics["r_sum"] = float(sum(recalls))
    metrics["r_mean"] = metrics["r_sum"] / len(recalls)
    metrics["agg_metrics"] = metrics["r_mean"]
    return metrics


def _ranks(scores: Scores, pairs: np.ndarray, name: str) -> np.ndarray:
    """Ranks [Q] from scores [Q, N] and the matches, int64 [P, 2] of (query, item), sorted by query."""
    queries = scores.shape[0]
    ranks = np.empty(queries, dtype=np.int64)
    bounds = np.searchsorted(pairs[:, 0], np.arange(queries + 1))
    for start, block in _blocks(scores):
        if np.isnan(block.min()):
            raise ValueError(f"{name} holds NaN between rows {start} and {start + len(block) - 1}")
        stop = start + len(block)
        own = pairs[bounds[start] : bounds[stop]]
        rows, offsets = own[:, 0] - start, bounds[start:stop] - bounds[start]
        values = block[rows, own[:, 1]]
        best = np.maximum.reduceat(values, offsets)
        matching = np.add.reduceat((values >= best[rows]).astype(np.int64), offsets)
        ranks[start:stop] = 1 + np.count_nonzero(block >= best[:, None], axis=1) - matching
    return ranks


def _blocks(scores: Scores) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, numpy block) over rows; a tensor is moved and widened one block at a time."""
    height = max(1, _BLOCK_SCORES // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0], height):
        block: Any = scores[start : start + height]
        if isinstance(block, torch.Tensor):
            block = block.detach().cpu()
            block = (block.float() if block.dtype in (torch.bfloat16, torch.float16) else block).numpy()
        yield start, block


def _part(scores: Scores, rows: np.ndarray, columns: np.ndarray) -> Scores:
    """scores[rows][:, columns], a copy of one fold's size."""
    if isinstance(scores, torch.Tensor):
        where = [torch.from_numpy(index).to(scores.device) for index in (rows, columns)]
        return scores[where[0][:, None], where[1][None, :]]
    return scores[np.ix_(rows, columns)]


def _swapped(pairs: np.ndarray) -> np.ndarray:
    flipped = pairs[:, ::-1]
    return flipped[np.lexsort((flipped[:, 1], flipped[:, 0]))]


def _check_shapes(scores_i2t: Scores, scores_t2i: Scores) -> tuple[int, int]:
    i2t, t2i = tuple(scores_i2t.shape), tuple(scores_t2i.shape)
    if len(i2t) != 2 or t2i != i2t[::-1] or 0 in i2t:
        raise ValueError(
            f"scores_i2t must be [I, T] and scores_t2i [T, I], none of them empty; got {i2t} and {t2i}"
        )
    return i2t


def _match_pairs(matches: Matches, queries: int, items: int, name: str) -> np.ndarray:
    """The mapping as sorted, distinct pairs, int64 [P, 2]; every query has at least one."""
    if len(matches) != queries or any(query not in matches for query in range(queries)):
        raise ValueError(
            f"{name} must have the keys 0..{queries - 1}, one per row of scores; it has {len(matches)} keys"
        )
    pairs = []
    for query in range(queries):
        found = matches[query]
        found = [found] if isinstance(found, (int, np.integer)) else list(found)
        if not found:
            raise ValueError(f"{name}[{query}] is empty: every query needs a match")
        pairs += [(query, item) for item in sorted(set(found))]
    array = np.asarray(pairs, dtype=np.int64)
    outside = array[(array[:, 1] < 0) | (array[:, 1] >= items)]
    if len(outside):
        raise ValueError(f"{name}[{outside[0, 0]}] names row {outside[0, 1]}, but there are {items}")
    return array


def _check_agreement(of_images: np.ndarray, of_texts: np.ndarray) -> None:
    if not np.array_equal(_swapped(of_images), of_texts):
        images = {(int(text), int(image)) for image, text in of_images}
        text, image = min(images ^ {(int(text), int(image)) for text, image in of_texts})
        raise ValueError(
            f"img2txt and txt2img disagree: only one of them joins text {text} and image {image}"
        )
