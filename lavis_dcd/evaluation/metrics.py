"""Recalls and ranks of image-text retrieval, exact, in blocks of rows (5,000 x 25,000 need no second copy).

Names are LAVIS's: ``txt_*`` is text retrieval (an image is the query, captions are ranked), ``img_*`` the other way.
Ties count against the model: a rank is 1 + the number of non-matching items that score at least as high as the
best match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch

Scores = np.ndarray | torch.Tensor
Matches = Mapping[int, int | Sequence[int]]

RECALL_DEPTHS = (1, 5, 10)
# Scores compared at a time, by each thread: few enough that a block and its comparisons stay in a core's cache.
_BLOCK_SCORES = 1_000_000
# Rows whose comparisons can be added up in eight bits.
_BYTE_ROWS = 255


def retrieval_metrics(scores_i2t: Scores, scores_t2i: Scores, txt2img: Matches, img2txt: Matches) -> dict[str, float]:
    """Return all metrics of one evaluation.

    Args:
        scores_i2t: floating point ``[I, T]`` on any device, image i against text t, higher is better.
        scores_t2i: floating point ``[T, I]``, text t against image i (not always the transpose: each side may have a
            shortlist of its own).
        txt2img: each text row's image row (or rows).
        img2txt: each image row's text rows.

    Returns:
        ``txt_r1, txt_r5, txt_r10, img_r1, img_r5, img_r10, txt_r_mean, img_r_mean, r_mean`` (mean of the six) in
        percent; ``r_sum`` (their sum); ``txt_median_rank, img_median_rank`` (1-based); ``agg_metrics`` (= ``r_mean``,
        by which LAVIS chooses a checkpoint).

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
    """Return the 1-based rank of each query's best match, int64 ``[Q]``; ties count against it.

    Args:
        scores: floating point ``[Q, N]`` on any device, higher is better.
        matches: each query's item (or items).

    Raises:
        ValueError: as :func:`retrieval_metrics`.
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
    """Return the metrics by COCO's 1K protocol: of five consecutive folds of 1,000 images each, averaged.

    Arguments and keys are those of :func:`retrieval_metrics`; the texts of a fold are those that match its images,
    and a median rank is the mean of the folds' medians.

    Raises:
        ValueError: as :func:`retrieval_metrics`, and when there are not exactly ``folds * images_per_fold`` images.
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
        fold_texts = np.unique(inside[:, 1])
        local = np.stack([inside[:, 0] - first, np.searchsorted(fold_texts, inside[:, 1])], axis=1)
        fold_images = np.arange(first, first + images_per_fold)
        fold_i2t = _cut_out(scores_i2t, fold_images, fold_texts)
        fold_t2i = _cut_out(scores_t2i, fold_texts, fold_images)
        ranks = {"txt": _ranks(fold_i2t, local, "scores_i2t"), "img": _ranks(fold_t2i, _swapped(local), "scores_t2i")}
        results.append(_summary(ranks))
    return {key: float(np.mean([result[key] for result in results])) for key in results[0]}


def _summary(ranks: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the metrics from the ranks by side: int64 ``[I]`` for ``txt``, ``[T]`` for ``img``."""
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
    """Return ranks, int64 ``[Q]``, of scores ``[Q, N]``; matches are int64 ``[P, 2]`` of (query, item), sorted."""
    offsets = np.searchsorted(pairs[:, 0], np.arange(scores.shape[0]))
    values = _values(scores, pairs)
    best = np.maximum.reduceat(values, offsets)
    matching = np.add.reduceat((values >= best[pairs[:, 0]]).astype(np.int64), offsets)
    return 1 + _count_at_least(scores, best, name) - matching


def _count_at_least(scores: Scores, best: np.ndarray, name: str) -> np.ndarray:
    """Return how many scores of each row reach its ``best [Q]``, int64 ``[Q]``.

    The table is read in the order of its memory.

    Raises:
        ValueError: on NaN.
    """
    if not _is_transposed(scores):
        by_rows = _in_threads(lambda place: _count_in_rows(*place, best, name), _blocks(scores, len(scores)))
        return np.concatenate(list(by_rows))
    by_columns = _in_threads(lambda place: _count_in_columns(*place, best, name), _blocks(scores.T, _BYTE_ROWS))
    counts = np.zeros(len(best), dtype=np.int64)
    for count in by_columns:
        counts += count
    return counts


def _count_in_rows(start: int, block: Scores, best: np.ndarray, name: str) -> np.ndarray:
    """Return how many scores of each row of ``block [H, N]`` reach its best, int64 ``[H]``.

    Args:
        start: the place of the block's first row in the table.
        best: of all the table's rows, ``[Q]``.
        name: of the table, for errors.
    """
    values = _as_numpy(block)
    if np.isnan(values.min()):
        raise ValueError(f"{name} holds NaN between rows {start} and {start + len(values) - 1}")
    reached = values >= best[start : start + len(values), None]
    # row by row: with an axis, numpy widens every comparison to 64 bits first
    return np.asarray([np.count_nonzero(row) for row in reached], dtype=np.int64)


def _count_in_columns(start: int, block: Scores, best: np.ndarray, name: str) -> np.ndarray:
    """Return what :func:`_count_in_rows` does, uint8 ``[Q]``, of a block ``[H < 256, Q]`` of the transposed table."""
    values = _as_numpy(block)
    if np.isnan(values.min()):
        raise ValueError(
            f"{name} holds NaN between rows 0 and {len(best) - 1}, columns {start} and {start + len(values) - 1}"
        )
    return (values >= best).view(np.uint8).sum(axis=0, dtype=np.uint8)


def _blocks(scores: Scores, tallest: int = _BYTE_ROWS) -> Iterator[tuple[int, Scores]]:
    """Yield ``scores`` in views of at most ``tallest`` rows, each with the place of its first row."""
    height = max(1, min(tallest, _BLOCK_SCORES // max(1, scores.shape[1])))
    for start in range(0, scores.shape[0], height):
        yield start, scores[start : start + height]


def _in_threads(
    count: Callable[[tuple[int, Scores]], np.ndarray], blocks: Iterator[tuple[int, Scores]]
) -> Iterator[np.ndarray]:
    """Yield the blocks' counts in their order, by as many threads as torch may use; numpy's loops run side by side."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(count, blocks)


def _is_transposed(scores: Scores) -> bool:
    """Return whether a column's scores lie closer together in memory than a row's."""
    rows, columns = scores.stride() if isinstance(scores, torch.Tensor) else scores.strides
    return 0 < rows < columns


def _values(scores: Scores, pairs: np.ndarray) -> np.ndarray:
    """Return ``scores[pairs[:, 0], pairs[:, 1]]``, ``[P]``, for pairs int64 ``[P, 2]``."""
    if isinstance(scores, torch.Tensor):
        rows, columns = torch.from_numpy(pairs).to(scores.device).T
        return _as_numpy(scores.detach()[rows, columns])
    return scores[pairs[:, 0], pairs[:, 1]]


def _as_numpy(scores: Scores) -> np.ndarray:
    """Return scores as an array; a tensor's are moved to the CPU, and widened where numpy lacks their type."""
    if not isinstance(scores, torch.Tensor):
        return scores
    scores = scores.detach().cpu()
    return (scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores).numpy()


def _cut_out(scores: Scores, rows: np.ndarray, columns: np.ndarray) -> Scores:
    """Return ``scores[rows][:, columns]``, a copy of one fold's size."""
    if isinstance(scores, torch.Tensor):
        on_device = [torch.from_numpy(index).to(scores.device) for index in (rows, columns)]
        return scores[on_device[0][:, None], on_device[1][None, :]]
    return scores[np.ix_(rows, columns)]


def _swapped(pairs: np.ndarray) -> np.ndarray:
    """Return the pairs, int64 ``[P, 2]``, with their columns exchanged, sorted."""
    flipped = pairs[:, ::-1]
    return flipped[np.lexsort((flipped[:, 1], flipped[:, 0]))]


def _check_shapes(scores_i2t: Scores, scores_t2i: Scores) -> tuple[int, int]:
    i2t, t2i = tuple(scores_i2t.shape), tuple(scores_t2i.shape)
    if len(i2t) != 2 or t2i != i2t[::-1] or 0 in i2t:
        raise ValueError(f"scores_i2t must be [I, T] and scores_t2i [T, I], none of them empty; got {i2t} and {t2i}")
    return i2t


def _match_pairs(matches: Matches, queries: int, items: int, name: str) -> np.ndarray:
    """Return the mapping as sorted, distinct pairs, int64 ``[P, 2]``; every query has at least one."""
    if len(matches) != queries or any(query not in matches for query in range(queries)):
        raise ValueError(
            f"{name} must have the keys 0..{queries - 1}, one per row of scores; it has {len(matches)} keys"
        )
    of_queries = (matches[query] for query in range(queries))
    lists = [(of_query,) if isinstance(of_query, (int, np.integer)) else of_query for of_query in of_queries]
    sizes = np.fromiter(map(len, lists), dtype=np.int64, count=queries)
    if not sizes.all():
        raise ValueError(f"{name}[{int(sizes.argmin())}] is empty: every query needs a match")
    rows = np.repeat(np.arange(queries), sizes)
    columns = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=len(rows))
    outside = np.flatnonzero((columns < 0) | (columns >= items))
    if len(outside):
        first = outside[0]
        raise ValueError(f"{name}[{rows[first]}] names row {columns[first]}, but there are {items}")
    return np.stack(np.divmod(np.unique(rows * items + columns), items), axis=1)


def _check_agreement(of_images: np.ndarray, of_texts: np.ndarray) -> None:
    if not np.array_equal(_swapped(of_images), of_texts):
        images = {(int(text), int(image)) for image, text in of_images}
        text, image = min(images ^ {(int(text), int(image)) for text, image in of_texts})
        raise ValueError(f"img2txt and txt2img disagree: only one of them joins text {text} and image {image}")
