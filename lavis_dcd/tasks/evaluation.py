"""One matcher on one evaluation set: encode, score, measure."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.encoding import Storage, encode_dataset
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.scoring import require_joint_space, score_exhaustive, score_joint, score_shortlist
from lavis_dcd.tasks.metrics import coco_1k_five_folds, retrieval_metrics
from lavis_dcd.tasks.timing import milliseconds_per_pair

log = logging.getLogger(__name__)

Features = tuple[ImageFeatures, TextFeatures]

COCO_TEST_IMAGES = 5000  # of the Karpathy split: five folds of a thousand

# Sets whose float32 features would take more wait in half precision in host memory.
HALF_ABOVE_BYTES = 4 * 2**30


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
    matcher: Matcher, dataset: Any, protocol: Protocol, device: Any = None, shortlist: Matcher | None = None
) -> Evaluation:
    """Scores an evaluation set with ``matcher`` and measures it.

    Args:
        dataset: LAVIS's retrieval evaluation shape.
        device: where the features are kept; the matcher's by default.
        shortlist: whose joint space makes the shortlist; the matcher's own by default.

    Raises:
        UserError: a shortlist from a matcher without a joint space; an empty set.
    """
    if protocol.k_test is not None:
        require_joint_space(shortlist or matcher)
    images, texts = _encode(matcher, dataset, protocol, device)
    options = {"amp": protocol.amp, "memory_mb": protocol.memory_mb, "progress": True}
    if protocol.k_test is None:
        scores_i2t = score_exhaustive(matcher, images, texts, **options)
        scores_t2i = scores_i2t.T
    else:
        cheap = _cheap_scores(shortlist or matcher, matcher, (images, texts), dataset, protocol, device)
        scores_i2t, scores_t2i = score_shortlist(matcher, images, texts, cheap, protocol.k_test, **options)
    tables = (scores_i2t, scores_t2i, dataset.txt2img, dataset.img2txt)
    metrics: dict[str, Any] = retrieval_metrics(*tables)
    if protocol.coco_1k_folds and len(scores_i2t) == COCO_TEST_IMAGES:
        metrics |= {f"1k_{name}": value for name, value in coco_1k_five_folds(*tables).items()}
    elif protocol.coco_1k_folds:
        log.warning("run.coco_1k_folds: %d pictures, not COCO's %d: left out", len(scores_i2t), COCO_TEST_IMAGES)
    metrics["fusion_parameters"] = matcher.fusion_parameters()
    metrics["ms_per_pair"] = milliseconds_per_pair(matcher, images, texts, amp=protocol.amp)
    metrics["how"] = protocol.how
    return Evaluation(metrics, scores_i2t, scores_t2i)


def _encode(matcher: Matcher, dataset: Any, protocol: Protocol, device: Any) -> Features:
    return encode_dataset(
        matcher,
        dataset,
        protocol.batch_size,
        device,
        protocol.num_workers,
        storage=_storage(matcher, dataset, protocol),
        amp=protocol.amp,
        progress=True,
    )


def _storage(matcher: Matcher, dataset: Any, protocol: Protocol) -> Storage:
    """As encoded, or half precision on the host where the set's features would be too big."""
    if getattr(dataset, "banked_features", None) is not None:
        return Storage()
    one = encode_dataset(matcher, _First(dataset), 1, amp=protocol.amp)
    size = one[0].nbytes * len(dataset) + one[1].nbytes * len(dataset.text)
    if size <= HALF_ABOVE_BYTES:
        return Storage()
    log.info("%.1f GB of features: kept in half precision in host memory", size / 2e9)
    return Storage.half_on_host()


def _cheap_scores(
    cheap: Matcher, matcher: Matcher, features: Features, dataset: Any, protocol: Protocol, device: Any
) -> Tensor:
    if cheap is not matcher and not cheap.shares_encoders_with(matcher):
        features = _encode(cheap, dataset, protocol, device)
    return score_joint(cheap, *features, amp=protocol.amp)


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
