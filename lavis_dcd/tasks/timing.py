"""How long one pair takes, measured on the evaluation set's own features."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.encoding import scoring_mode
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


def milliseconds_per_pair(
    matcher: Matcher,
    images: ImageFeatures,
    texts: TextFeatures,
    pairs: int = 256,
    repeats: int = 5,
    *,
    amp: str = "off",
) -> float:
    """Median milliseconds that ``match`` takes per pair on cached features, after one untimed call.

    The pairs are drawn, with a fixed seed, from the given rows; moving the rows to the device is not counted.

    Args:
        pairs: pairs in one call.
        repeats: timed calls; the median is reported.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(images), (pairs,), generator=generator).unique()
    columns = torch.randint(len(texts), (pairs,), generator=generator).unique()
    chosen = torch.stack(
        [torch.randint(len(n), (pairs,), generator=generator) for n in (rows, columns)], dim=1
    )
    with scoring_mode(matcher, amp) as device:
        here = images[rows.to(images.device)].to(device, torch.float32)
        there = texts[columns.to(texts.device)].trimmed().to(device, torch.float32)
        chosen = chosen.to(device)
        _timed_match(matcher, here, there, chosen)
        seconds = [_timed_match(matcher, here, there, chosen) for _ in range(repeats)]
    return 1000 * statistics.median(seconds) / pairs


def _timed_match(matcher: Matcher, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> float:
    _wait_for(pairs.device)
    start = time.perf_counter()
    matcher.match(images, texts, pairs)
    _wait_for(pairs.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
