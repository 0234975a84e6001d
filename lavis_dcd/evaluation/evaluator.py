"""One matcher, or an ensemble of several, on one evaluation set: encode, score, measure."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lavis_dcd.banks.encoding import EvaluationSet
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.distillation.ensemble import Combination
from lavis_dcd.evaluation.encodings import DatasetOf, Encodings, FeaturePair
from lavis_dcd.evaluation.exhaustive import ScoringSettings, score_exhaustive
from lavis_dcd.evaluation.metrics import coco_1k_five_folds, retrieval_metrics
from lavis_dcd.evaluation.shortlist import Shortlist, require_joint_space, score_joint
from lavis_dcd.evaluation.timing import milliseconds_per_pair, milliseconds_to_embed_and_compare, milliseconds_to_match
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble, members_of, weights_of
from lavis_dcd.matching.features import gather_rows

log = logging.getLogger(__name__)

Tables = tuple[Tensor, Tensor]  # of pictures as queries, of texts as queries

EMBED_MB = 256  # more rows at a time make no embedding faster
COCO_TEST_IMAGES = 5000  # of the Karpathy split: five folds of a thousand


@dataclass
class Evaluation(Mapping[str, Any]):
    """Figures and scores of a matcher on a set; as a mapping, its figures.

    Args:
        metrics: those of ``retrieval_metrics``, and ``fusion_parameters``, ``ms_per_pair``, ``ms_per_search``, ``how``.
        scores_i2t: float32 ``[I, T]``.
        scores_t2i: float32 ``[T, I]``.
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


class Evaluator:
    """Scores and measures matchers on evaluation sets, all by one protocol.

    Args:
        device: where features in memory stand; each matcher's by default.
        ranks: processes that share the pictures; all must call, and each gets the scores and the figures. Only the
            first one takes the time.
        dataset_of: a set as a matcher reads it, through its own processors; the same object for the same view. By
            default all read the set itself.
    """

    def __init__(
        self,
        protocol: EvaluationProtocol,
        device: torch.device | str | None = None,
        ranks: ProcessGroup = ALONE,
        dataset_of: DatasetOf | None = None,
    ) -> None:
        self._protocol, self._device, self._ranks = protocol, device, ranks
        self._dataset_of = dataset_of or _the_set_itself
        self._settings = ScoringSettings(protocol.memory_mb, protocol.amp)

    def evaluate(
        self, matcher: Matcher | Ensemble, dataset: EvaluationSet, shortlist: Matcher | Ensemble | None = None
    ) -> Evaluation:
        """Score an evaluation set with ``matcher`` and measure it.

        A dual encoder scores every pair whatever ``protocol.k_test``. Of an ensemble, the members' scores of a
        query's candidates are standardised and averaged (``distillation.ensemble.combine``), each direction for
        itself. Where one member is a fusion model that reranks a shortlist, all are read at that one shortlist.

        Args:
            shortlist: whose joint space makes the shortlist; the matcher's own by default. An ensemble's is the
                standardised mean of its members'.

        Raises:
            ShortlistError: a shortlist from a matcher without a joint space.
            UserError: an empty set; no room on the disk for features that shall not stay in memory.
            ValueError: a score is not a finite number.
        """
        maker = self._shortlist_maker(matcher, shortlist)
        times = Times() if self._ranks.rank == 0 else None
        scores_i2t, scores_t2i = self._scored(matcher, dataset, maker, times)
        metrics = self._metrics(scores_i2t, scores_t2i, dataset)
        metrics["fusion_parameters"] = matcher.fusion_parameters()
        metrics |= asdict(times or Times())
        metrics["how"] = self._how(matcher, exhaustive=maker is None)
        return Evaluation(metrics, scores_i2t, scores_t2i)

    def scores(
        self, matcher: Matcher | Ensemble, dataset: EvaluationSet, shortlist: Matcher | Ensemble | None = None
    ) -> Tables:
        """Return the scores alone, as :meth:`evaluate` makes them: float32 ``[I, T]`` and ``[T, I]`` on the CPU.

        Raises:
            ShortlistError, UserError, ValueError: as :meth:`evaluate`.
        """
        maker = self._shortlist_maker(matcher, shortlist)
        return self._scored(matcher, dataset, maker)

    def _shortlist_maker(
        self, matcher: Matcher | Ensemble, shortlist: Matcher | Ensemble | None
    ) -> Matcher | Ensemble | None:
        """Return whose joint space makes the shortlist; ``None`` where every pair is scored."""
        if self._protocol.k_test is None or all(member.family == "dual" for member in members_of(matcher)):
            return None
        maker = shortlist or matcher
        require_joint_space(maker)
        return maker

    def _scored(
        self,
        matcher: Matcher | Ensemble,
        dataset: EvaluationSet,
        maker: Matcher | Ensemble | None,
        times: Times | None = None,
    ) -> Tables:
        """Return scores ``[I, T]`` and ``[T, I]``; what the members take together is added to ``times``."""
        members = members_of(matcher)
        uses = [*([] if maker is None else members_of(maker)), *members]
        with Encodings(uses, dataset, self._dataset_of, self._protocol, self._device, self._ranks) as encodings:
            shortlist = None if maker is None else self._shortlist(maker, encodings, times)
            combined = _Combined(weights_of(matcher))
            for member in members:
                features = encodings.take(member)
                # before the tables, so that the rows drawn for it do not stand beside one
                if times is not None:
                    self._take_time(times, member, features, len(dataset))
                tables = self._member_scores(member, features, shortlist)
                del features  # a member's that nobody needs again would stand beside the combined tables
                combined.add(tables)
                del tables  # before the next member's
        scores_i2t, scores_t2i = combined.tables()
        if shortlist is not None:
            scores_i2t, scores_t2i = shortlist.tables(scores_i2t, scores_t2i, in_place=True)
        return scores_i2t, scores_t2i

    def _shortlist(self, maker: Matcher | Ensemble, encodings: Encodings, times: Times | None) -> Shortlist:
        """Return the best items by the joint spaces of ``maker``'s members together."""
        combined = _Combined(weights_of(maker))
        for member in members_of(maker):
            features = encodings.take(member)
            scores = self._joint_scores(member, features)
            if times is not None:
                pictures = self._ranks.size * len(features[0])  # about those of all processes
                times.ms_per_search += milliseconds_to_embed_and_compare(member, *features, self._settings, pictures)
            del features
            combined.add(_both_directions(gather_rows(scores, self._ranks)))
            del scores
        return Shortlist.of(*combined.tables(), self._protocol.k_test or 0)

    def _take_time(self, times: Times, member: Matcher, features: FeaturePair, pictures: int) -> None:
        """Add what a pair and a search among ``pictures`` take ``member``; its shortlist is counted already."""
        times.ms_per_pair += milliseconds_per_pair(member, *features, self._settings)
        if member.family == "dual":
            times.ms_per_search += milliseconds_to_embed_and_compare(member, *features, self._settings, pictures)
        else:
            reranked = min(pictures, self._protocol.k_test or pictures)
            times.ms_per_search += milliseconds_to_match(member, *features, self._settings, reranked)

    def _joint_scores(self, member: Matcher, features: FeaturePair) -> Tensor:
        """Return the joint space's scores of this process's pictures, ``[I, T]``."""
        images, texts = features
        if not len(images):
            return torch.empty(0, len(texts))
        settings = ScoringSettings(min(EMBED_MB, self._protocol.memory_mb), self._protocol.amp)
        return score_joint(member, images, texts, settings)

    def _member_scores(self, member: Matcher, features: FeaturePair, shortlist: Shortlist | None) -> Tables:
        """Return scores of all pairs, ``[I, T]`` and ``[T, I]``, or at the shortlist, ``[I, k]`` and ``[T, k]``."""
        if shortlist is not None:
            return shortlist.rerank(member, *features, self._settings, self._ranks)
        return _both_directions(score_exhaustive(member, *features, self._settings, self._ranks))

    def _metrics(self, scores_i2t: Tensor, scores_t2i: Tensor, dataset: EvaluationSet) -> dict[str, Any]:
        tables = (scores_i2t, scores_t2i, dataset.txt2img, dataset.img2txt)
        metrics: dict[str, Any] = dict(retrieval_metrics(*tables))
        if self._protocol.coco_1k_folds and len(scores_i2t) == COCO_TEST_IMAGES:
            metrics |= {f"1k_{name}": value for name, value in coco_1k_five_folds(*tables).items()}
        elif self._protocol.coco_1k_folds:
            log.warning("coco_1k_folds: %d pictures, not COCO's %d: left out", len(scores_i2t), COCO_TEST_IMAGES)
        return metrics

    def _how(self, matcher: Matcher | Ensemble, exhaustive: bool) -> str:
        how = "exhaustive" if exhaustive else self._protocol.how
        return f"ensemble of {len(matcher.members)}, {how}" if isinstance(matcher, Ensemble) else how


@dataclass
class Times:
    """The members' milliseconds together, each figure as a row of the results has it."""

    ms_per_pair: float = 0.0
    ms_per_search: float = 0.0


def _the_set_itself(matcher: Matcher, dataset: EvaluationSet) -> EvaluationSet:
    return dataset


def _both_directions(scores: Tensor) -> Tables:
    """Return one table in memory for both directions."""
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


class EvaluationCache:
    """The last evaluation of each matcher, as long as its weights and the set are the ones evaluated."""

    def __init__(self) -> None:
        self._last: dict[int, _CachedEvaluation] = {}

    def put(self, matcher: Matcher | Ensemble, dataset: EvaluationSet, evaluation: Evaluation) -> None:
        """Remember ``evaluation`` in place of the matcher's last one."""
        self._last[id(matcher)] = _CachedEvaluation(matcher, dataset, _weights_state(matcher), evaluation)

    def drop(self, matcher: Matcher | Ensemble) -> None:
        """Forget the matcher's evaluation."""
        self._last.pop(id(matcher), None)

    def get(self, matcher: Matcher | Ensemble, dataset: EvaluationSet) -> Evaluation | None:
        """Return the matcher's last evaluation; ``None`` if it was of another set or of other weights."""
        last = self._last.get(id(matcher))
        if last is None or last.dataset is not dataset or last.weights != _weights_state(matcher):
            return None
        return last.evaluation


@dataclass(frozen=True)
class _CachedEvaluation:
    matcher: Matcher | Ensemble  # keeps its id from being used again
    dataset: EvaluationSet
    weights: list[tuple[int, int]]
    evaluation: Evaluation


def _weights_state(matcher: Matcher | Ensemble) -> list[tuple[int, int]]:
    """Return which tensors hold the weights, and how often each was written in place."""
    if not isinstance(matcher, nn.Module):
        return []
    # not of state_dict(), which would take a sharded model's whole weights away
    return [(t.data_ptr(), t._version) for t in (*matcher.parameters(), *matcher.buffers())]
