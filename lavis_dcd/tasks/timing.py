"""How long one pair takes, measured on the evaluation set's own features."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lavis_dcd.matching.blocks import Rows, rows_that_fit
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.encoding import scoring_mode


def milliseconds_per_pair(
    matcher: Matcher,
    images: Rows,
    texts: Rows,
    pairs: int = 256,
    repeats: int = 5,
    *,
    amp: str = "off",
    memory_mb: float = math.inf,
) -> float:
    """Median milliseconds per pair on cached features, after one untimed call.

    A fusion model's ``match`` scores pairs that are drawn, with a fixed seed, from the given rows. A dual encoder's
    ``match_all`` scores all pairs of the rows drawn: that is how it is used, and what makes it cheap. Moving the
    rows to the device is not counted.

    Args:
        pairs: pairs in one call of ``match``; of a dual encoder, rows drawn on either side.
        repeats: timed calls; the median is reported.
        memory_mb: no more rows are drawn than take that many MiB, in float32.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randint(len(features), (min(pairs, rows_that_fit(features, memory_mb)),), generator=generator).unique()
        for features in (images, texts)
    )
    chosen = torch.stack(
        [torch.randint(len(n), (pairs,), generator=generator) for n in (rows, columns)], dim=1
    )
    dual = matcher.family == "dual"
    with scoring_mode(matcher, "off" if dual else amp) as device:  # as `score_exhaustive` does
        here = images[rows.to(images.device)].to(device, torch.float32)
        there = texts[columns.to(texts.device)].trimmed().to(device, torch.float32)
        chosen = chosen.to(device)
        if dual:
            score, scored = partial(matcher.match_all, here, there), len(here) * len(there)
        else:
            score, scored = partial(matcher.match, here, there, chosen), pairs
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
