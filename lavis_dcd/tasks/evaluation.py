"""One matcher, or an ensemble of several, on one evaluation set: encode, score, measure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.encoding import Storage, encode_dataset
from lavis_dcd.matching.ensemble import Ensemble, members_of, weights_of
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.gather import ALONE, Ranks, gather_rows
from lavis_dcd.matching.scoring import Shortlist, require_joint_space, score_exhaustive, score_joint
from lavis_dcd.tasks.metrics import coco_1k_five_folds, retrieval_metrics
from lavis_dcd.tasks.timing import milliseconds_per_pair

log = logging.getLogger(__name__)

Features = tuple[ImageFeatures, TextFeatures]
Tables = tuple[Tensor, Tensor]  # of pictures as queries, of texts as queries
DatasetOf = Callable[[Matcher], Any]

COCO_TEST_IMAGES = 5000  # of the Karpathy split: five folds of a thousand

# Sets whose float32 features would take more wait in half precision in host memory.
HALF_ABOVE_BYTES = 4 * 2**30

ROWS_PER_COMBINATION = 256


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


@dataclass(frozen=True)
class Protocol:
    """How evaluation sets are scored: the keys of ``run:`` that it reads.

    Args:
        k_test: rerank that many per query; ``None`` scores every pair.
        shortlist: name of the matcher whose joint space makes the shortlist; ``None`` or "joint": its own.
        coco_1k_folds: add COCO's 1K protocol under the prefix ``1k_``.
    """

    k_test: int | None = None
    shortlist: str | None = None
    batch_size: int = 64
    num_workers: int = 0
    amp: str = "off"
    memory_mb: float = 1024
    coco_1k_folds: bool = False

    @classmethod
    def of_run(cls, run: Any) -> Protocol:
        """From a ``run:`` section, a dataclass or a mapping; what it leaves out has its default."""
        keys = {name: name for name in cls.__dataclass_fields__}
        keys |= {"batch_size": "batch_size_eval", "memory_mb": "match_memory_mb"}
        found = {name: _read(run, key) for name, key in keys.items()}
        given = {name: value for name, value in found.items() if value is not None}
        if given.get("amp") is False:  # LAVIS's own way to say off
            given["amp"] = "off"
        return cls(**given)

    @property
    def how(self) -> str:
        """In words, for tables."""
        if self.k_test is None:
            return "exhaustive"
        return f"shortlist k={self.k_test} ({self.shortlist or 'joint'})"


def evaluate(
    matcher: Matcher | Ensemble,
    dataset: Any,
    protocol: Protocol,
    device: Any = None,
    shortlist: Matcher | Ensemble | None = None,
    dataset_of: DatasetOf | None = None,
    ranks: Ranks = ALONE,
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
        UserError: a shortlist from a matcher without a joint space; an empty set.
    """
    members = members_of(matcher)
    maker = None
    if protocol.k_test is not None and any(member.family != "dual" for member in members):
        maker = shortlist or matcher
        require_joint_space(maker)
    uses = [*([] if maker is None else members_of(maker)), *members]
    encodings = _Encodings(uses, dataset_of or (lambda _: dataset), protocol, device, ranks)
    shortlisted = None if maker is None else _shortlist(maker, encodings, protocol, ranks)
    scored = [_score(member, encodings.take(member), shortlisted, protocol, ranks) for member in members]
    scores_i2t, scores_t2i = _combined([tables for tables, _ in scored], weights_of(matcher))
    if shortlisted is not None:
        scores_i2t, scores_t2i = shortlisted.tables(scores_i2t, scores_t2i)
    metrics = _metrics(scores_i2t, scores_t2i, dataset, protocol)
    metrics["fusion_parameters"] = matcher.fusion_parameters()
    metrics["ms_per_pair"] = sum(milliseconds for _, milliseconds in scored)
    metrics["how"] = _how(matcher, protocol, exhaustive=shortlisted is None)
    return Evaluation(metrics, scores_i2t, scores_t2i)


def _metrics(scores_i2t: Tensor, scores_t2i: Tensor, dataset: Any, protocol: Protocol) -> dict[str, Any]:
    tables = (scores_i2t, scores_t2i, dataset.txt2img, dataset.img2txt)
    metrics: dict[str, Any] = retrieval_metrics(*tables)
    if protocol.coco_1k_folds and len(scores_i2t) == COCO_TEST_IMAGES:
        metrics |= {f"1k_{name}": value for name, value in coco_1k_five_folds(*tables).items()}
    elif protocol.coco_1k_folds:
        log.warning("run.coco_1k_folds: %d pictures, not COCO's %d: left out", len(scores_i2t), COCO_TEST_IMAGES)
    return metrics


def _how(matcher: Matcher | Ensemble, protocol: Protocol, exhaustive: bool) -> str:
    how = "exhaustive" if exhaustive else protocol.how
    return f"ensemble of {len(matcher.members)}, {how}" if isinstance(matcher, Ensemble) else how


def _shortlist(
    maker: Matcher | Ensemble, encodings: _Encodings, protocol: Protocol, ranks: Ranks
) -> Shortlist:
    """What the joint spaces of ``maker``'s members put on top together."""
    joint = []
    for member in members_of(maker):
        images, texts = encodings.take(member)
        own = score_joint(member, images, texts, amp=protocol.amp) if len(images) else torch.empty(0, len(texts))
        joint.append(gather_rows(own, ranks))
    cheap = _combined([(scores, scores.T) for scores in joint], weights_of(maker))
    return Shortlist.of(*cheap, protocol.k_test)


def _score(
    member: Matcher, features: Features, shortlist: Shortlist | None, protocol: Protocol, ranks: Ranks
) -> tuple[Tables, float]:
    """Scores of all pairs, ``[I, T]`` and ``[T, I]``, or at the shortlist, ``[I, k]`` and ``[T, k]``; ms per pair."""
    options = {"amp": protocol.amp, "memory_mb": protocol.memory_mb, "progress": True, "ranks": ranks}
    if shortlist is None:
        scores = score_exhaustive(member, *features, **options)
        tables = (scores, scores.T)
    else:
        tables = shortlist.rerank(member, *features, **options)
    return tables, milliseconds_per_pair(member, *features, amp=protocol.amp) if ranks.rank == 0 else 0.0


def _combined(of_members: Sequence[Tables], weights: Sequence[float]) -> Tables:
    """One table per direction, of the members' standardised over each row's entries."""
    if len(of_members) == 1:
        return of_members[0]
    scores_i2t, scores_t2i = (_combined_rows(tables, weights) for tables in zip(*of_members, strict=True))
    return scores_i2t, scores_t2i


def _combined_rows(tables: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """In blocks of rows: the temporaries of a whole COCO matrix would take gigabytes."""
    blocks = zip(*(table.split(ROWS_PER_COMBINATION) for table in tables), strict=True)
    return torch.cat([combine(block, torch.ones_like(block[0], dtype=torch.bool), weights) for block in blocks])


class _Encodings:
    """Features for the matchers of an evaluation, made once for those that share encoders and read the same set.

    Args:
        uses: the matchers in the order in which ``take`` will be called; features are dropped after their last use.
    """

    def __init__(
        self,
        uses: Sequence[Matcher],
        dataset_of: DatasetOf,
        protocol: Protocol,
        device: Any,
        ranks: Ranks = ALONE,
    ) -> None:
        self._to_come = list(uses)
        self._dataset_of, self._protocol, self._device, self._ranks = dataset_of, protocol, device, ranks
        self._kept: list[tuple[Matcher, Any, Features]] = []

    def take(self, matcher: Matcher) -> Features:
        self._to_come.remove(matcher)
        dataset = self._dataset_of(matcher)
        features = next((kept for other, seen, kept in self._kept if self._serves(other, seen, matcher)), None)
        if features is None:
            features = _encode(matcher, dataset, self._protocol, self._device, self._ranks)
            self._kept.append((matcher, dataset, features))
        self._kept = [
            (other, seen, kept)
            for other, seen, kept in self._kept
            if any(self._serves(other, seen, later) for later in self._to_come)
        ]
        return features

    def _serves(self, encoded_by: Matcher, dataset: Any, matcher: Matcher) -> bool:
        if self._dataset_of(matcher) is not dataset:
            return False
        return encoded_by is matcher or encoded_by.shares_encoders_with(matcher)


def _encode(matcher: Matcher, dataset: Any, protocol: Protocol, device: Any, ranks: Ranks) -> Features:
    return encode_dataset(
        matcher,
        dataset,
        protocol.batch_size,
        device,
        protocol.num_workers,
        storage=_storage(matcher, dataset, protocol, ranks),
        amp=protocol.amp,
        progress=True,
        ranks=ranks,
    )


def _storage(matcher: Matcher, dataset: Any, protocol: Protocol, ranks: Ranks) -> Storage:
    """As encoded, or half precision on the host where the set's features would be too big."""
    if getattr(dataset, "banked_features", None) is not None:
        return Storage()
    one = encode_dataset(matcher, _First(dataset), 1, amp=protocol.amp)
    size = one[0].nbytes * len(Ranks(size=ranks.size).share(len(dataset))) + one[1].nbytes * len(dataset.text)
    if size <= HALF_ABOVE_BYTES:
        return Storage()
    log.info("%.1f GB of features: kept in half precision in host memory", size / 2e9)
    return Storage.half_on_host()


class _First(torch.utils.data.Dataset):
    """The first picture of an evaluation set with its longest caption: a sample of the features' size."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.text = [max(dataset.text, key=len)] if len(dataset.text) else []

    def __len__(self) -> int:
        return min(1, len(self.dataset))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def _read(run: Any, key: str) -> Any:
    if run is None:
        return None
    return run.get(key) if isinstance(run, Mapping) or hasattr(run, "get") else getattr(run, key, None)
