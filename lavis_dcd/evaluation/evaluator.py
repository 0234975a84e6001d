"""One matcher, or an ensemble of several, on one evaluation set: encode, score, measure."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import scoring_mode
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.distillation.ensemble import Combination
from lavis_dcd.evaluation.encodings import DatasetOf, Encodings, FeaturePair
from lavis_dcd.evaluation.exhaustive import Rows, rows_that_fit
from lavis_dcd.evaluation.metrics import coco_1k_five_folds, retrieval_metrics
from lavis_dcd.evaluation.shortlist import Shortlist, require_joint_space, score_exhaustive, score_joint
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble, members_of, weights_of
from lavis_dcd.matching.features import gather_rows

# ----------------------------------------------------------------------------------------------------
# How long one pair takes, measured on the evaluation set's own features.


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
    chosen = torch.stack([torch.randint(len(n), (pairs,), generator=generator) for n in (rows, columns)], dim=1)
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


log = logging.getLogger(__name__)

Tables = tuple[Tensor, Tensor]  # of pictures as queries, of texts as queries

EMBED_MB = 256  # more rows at a time make no embedding faster

COCO_TEST_IMAGES = 5000  # of the Karpathy split: five folds of a thousand


@dataclass
class Evaluation(Mapping[str, Any]):
    """Figures and scores of a matcher on a set; as a mapping, its figures.

    Args:
        metrics: those of ``retrieval_metrics``, and ``fusion_parameters``, ``ms_per_pair``, ``how``.
        scores_i2t: ``[I, T]``.
        scores_t2i: ``[T, I]``.
    """

    metrics: dict[str, Any]
    scores_i2t: Tensor
    scores_t2i: Tensor

    def __getitem__(self, key: str) -> Any:
        return self.metrics[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)


def evaluate(
    matcher: Matcher | Ensemble,
    dataset: Any,
    protocol: EvaluationProtocol,
    device: Any = None,
    shortlist: Matcher | Ensemble | None = None,
    dataset_of: DatasetOf | None = None,
    ranks: ProcessGroup = ALONE,
) -> Evaluation:
    """Scores an evaluation set with ``matcher`` and measures it.

    A dual encoder scores every pair whatever ``protocol.k_test``. Of an ensemble, the members' scores of a query's
    candidates are standardised and averaged (``distillation.ensemble.combine``), each direction for itself. Where
    one member is a fusion model that reranks a shortlist, all are read at that one shortlist.

    Args:
        dataset: LAVIS's retrieval evaluation shape.
        device: where the features are kept; the matcher's by default.
        shortlist: whose joint space makes the shortlist; the matcher's own by default. An ensemble's is the
            standardised mean of its members'.
        dataset_of: the set as a matcher reads it, through its own processors; the same object for the same view.
            By default all read ``dataset``.
        ranks: processes that share the pictures; all must call, and each gets the scores and the figures. Only the
            first one takes the time.

    Raises:
        UserError: a shortlist from a matcher without a joint space; an empty set; no room on the disk for features
            that shall not stay in memory.
    """
    members = members_of(matcher)
    maker = None
    if protocol.k_test is not None and any(member.family != "dual" for member in members):
        maker = shortlist or matcher
        require_joint_space(maker)
    uses = [*([] if maker is None else members_of(maker)), *members]
    milliseconds = 0.0
    with Encodings(uses, dataset_of or (lambda _: dataset), protocol, device, ranks) as encodings:
        shortlisted = None if maker is None else _shortlist(maker, encodings, protocol, ranks)
        combined = _Combined(weights_of(matcher))
        for member in members:
            tables, of_pair = _score(member, encodings.take(member), shortlisted, protocol, ranks)
            combined.add(tables)
            milliseconds += of_pair
            del tables  # before the next member's
    scores_i2t, scores_t2i = combined.tables()
    if shortlisted is not None:
        scores_i2t, scores_t2i = shortlisted.tables(scores_i2t, scores_t2i, in_place=True)
    metrics = _metrics(scores_i2t, scores_t2i, dataset, protocol)
    metrics["fusion_parameters"] = matcher.fusion_parameters()
    metrics["ms_per_pair"] = milliseconds
    metrics["how"] = _how(matcher, protocol, exhaustive=shortlisted is None)
    return Evaluation(metrics, scores_i2t, scores_t2i)


def _metrics(scores_i2t: Tensor, scores_t2i: Tensor, dataset: Any, protocol: EvaluationProtocol) -> dict[str, Any]:
    tables = (scores_i2t, scores_t2i, dataset.txt2img, dataset.img2txt)
    metrics: dict[str, Any] = retrieval_metrics(*tables)
    if protocol.coco_1k_folds and len(scores_i2t) == COCO_TEST_IMAGES:
        metrics |= {f"1k_{name}": value for name, value in coco_1k_five_folds(*tables).items()}
    elif protocol.coco_1k_folds:
        log.warning("run.coco_1k_folds: %d pictures, not COCO's %d: left out", len(scores_i2t), COCO_TEST_IMAGES)
    return metrics


def _how(matcher: Matcher | Ensemble, protocol: EvaluationProtocol, exhaustive: bool) -> str:
    how = "exhaustive" if exhaustive else protocol.how
    return f"ensemble of {len(matcher.members)}, {how}" if isinstance(matcher, Ensemble) else how


def _shortlist(
    maker: Matcher | Ensemble, encodings: Encodings, protocol: EvaluationProtocol, ranks: ProcessGroup
) -> Shortlist:
    """What the joint spaces of ``maker``'s members put on top together."""
    cheap = _Combined(weights_of(maker))
    for member in members_of(maker):
        cheap.add(_transposed(gather_rows(_joint(member, encodings.take(member), protocol), ranks)))
    return Shortlist.of(*cheap.tables(), protocol.k_test)


def _joint(member: Matcher, features: FeaturePair, protocol: EvaluationProtocol) -> Tensor:
    images, texts = features
    if not len(images):
        return torch.empty(0, len(texts))
    return score_joint(member, images, texts, amp=protocol.amp, memory_mb=min(EMBED_MB, protocol.memory_mb))


def _score(
    member: Matcher,
    features: FeaturePair,
    shortlist: Shortlist | None,
    protocol: EvaluationProtocol,
    ranks: ProcessGroup,
) -> tuple[Tables, float]:
    """Scores of all pairs, ``[I, T]`` and ``[T, I]``, or at the shortlist, ``[I, k]`` and ``[T, k]``; ms per pair."""
    # first, so that the rows drawn for it do not stand beside a table
    milliseconds = 0.0
    if ranks.rank == 0:
        milliseconds = milliseconds_per_pair(member, *features, amp=protocol.amp, memory_mb=protocol.memory_mb)
    options = {"amp": protocol.amp, "memory_mb": protocol.memory_mb, "progress": True, "ranks": ranks}
    if shortlist is None:
        return _transposed(score_exhaustive(member, *features, **options)), milliseconds
    return shortlist.rerank(member, *features, **options), milliseconds


def _transposed(scores: Tensor) -> Tables:
    """One table in memory for both directions."""
    return scores, scores.T


class _Combined:
    """The members' tables of both directions, each standardised over its rows' entries, as they come."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._directions = Combination(weights), Combination(weights)

    def add(self, tables: Tables) -> None:
        for direction, table in zip(self._directions, tables, strict=True):
            direction.add(table)

    def tables(self) -> Tables:
        i2t, t2i = (direction.result() for direction in self._directions)
        return i2t, t2i
