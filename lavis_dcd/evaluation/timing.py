"""The time that a pair, or the search for one caption, takes a matcher on features that are there already."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import ImageRows, TextRows, scoring_mode
from lavis_dcd.evaluation.exhaustive import UNBOUNDED, ScoringSettings, image_block, rows_that_fit, text_block
from lavis_dcd.matching.contract import Matcher

MATCHED_AT_MOST = 256  # pairs of a search that are timed; those of more pictures are counted in proportion
COMPARED_AT_MOST = 8192  # picture vectors, as MATCHED_AT_MOST


def milliseconds_per_pair(
    matcher: Matcher,
    images: ImageRows,
    texts: TextRows,
    settings: ScoringSettings = UNBOUNDED,
    pairs: int = 256,
    repeats: int = 5,
) -> float:
    """Return the median milliseconds per pair on cached features, after one untimed call.

    A fusion model's ``match`` scores pairs that are drawn, with a fixed seed, from the given rows. A dual encoder's
    ``match_all`` scores all pairs of the rows drawn: that is how it is used, and what makes it cheap. Moving the
    rows to the device is not counted.

    Args:
        settings: no more rows are drawn than take ``memory_mb`` MiB, in float32.
        pairs: pairs in one call of ``match``; of a dual encoder, rows drawn on either side.
        repeats: timed calls; the median is reported.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randint(len(side), (min(pairs, rows_that_fit(side, settings.memory_mb)),), generator=generator).unique()
        for side in (images, texts)
    )
    chosen = torch.stack([torch.randint(len(n), (pairs,), generator=generator) for n in (rows, columns)], dim=1)
    with scoring_mode(matcher, settings.amp_of(matcher)) as device:
        pictures, captions = image_block(images, rows, device), text_block(texts, columns, device)
        chosen = chosen.to(device)
        if matcher.family == "dual":
            score, scored = partial(matcher.match_all, pictures, captions), len(pictures) * len(captions)
        else:
            score, scored = partial(matcher.match, pictures, captions, chosen), pairs
        _timed(score, device)
        seconds = [_timed(score, device) for _ in range(repeats)]
    return 1000 * statistics.median(seconds) / scored


def _timed(score: Callable[[], Tensor], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    score()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds_to_match(
    matcher: Matcher,
    images: ImageRows,
    texts: TextRows,
    settings: ScoringSettings = UNBOUNDED,
    pictures: int = MATCHED_AT_MOST,
    repeats: int = 3,
) -> float:
    """Return the median milliseconds in which a fusion model's ``match`` scores one caption with ``pictures``.

    At most ``MATCHED_AT_MOST`` of them are scored, fewer where the features are of fewer: the time of more is counted
    in proportion. Each timed call has another caption.
    """
    rows = _spread(len(images), min(pictures, MATCHED_AT_MOST, rows_that_fit(images, settings.memory_mb)))
    pairs = torch.stack([torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.long)], dim=1)
    with scoring_mode(matcher, settings.amp_of(matcher)) as device:
        shown, pairs = image_block(images, rows, device), pairs.to(device)
        seconds = [
            _timed(partial(matcher.match, shown, text_block(texts, column[None], device), pairs), device)
            for column in _spread(len(texts), repeats)
        ]
    return 1000 * statistics.median(seconds) * pictures / len(rows)


def milliseconds_to_embed_and_compare(
    matcher: Matcher,
    images: ImageRows,
    texts: TextRows,
    settings: ScoringSettings = UNBOUNDED,
    pictures: int = COMPARED_AT_MOST,
    repeats: int = 5,
) -> float:
    """Return the median milliseconds in which a joint space scores one caption with the vectors of ``pictures``.

    The pictures are embedded beforehand, as a gallery's are. Of more than ``COMPARED_AT_MOST``, or than the features
    are of, the time is counted in proportion. Each timed call has another caption, after one that is not timed.
    """
    fit = min(pictures, COMPARED_AT_MOST, rows_that_fit(images, settings.memory_mb))
    rows = _spread(len(images), fit)
    with scoring_mode(matcher, settings.amp_of(matcher)) as device:
        vectors = matcher.embed_images(image_block(images, rows, device))

        def search(column: Tensor) -> Tensor:
            return matcher.joint_scores(vectors, matcher.embed_texts(text_block(texts, column[None], device)))

        seconds = [_timed(partial(search, column), device) for column in _spread(len(texts), repeats + 1)]
    return 1000 * statistics.median(seconds[1:] or seconds) * pictures / len(rows)


def _spread(count: int, chosen: int) -> Tensor:
    """Return at most ``chosen`` rows of ``count``, evenly spread, int64 ``[min(count, chosen)]``."""
    chosen = max(1, min(count, chosen))
    return torch.arange(chosen) * count // chosen
