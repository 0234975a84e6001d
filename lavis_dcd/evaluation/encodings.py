"""The features of one evaluation: encoded once for all matchers that they serve, in memory or on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lavis_dcd.banks.encoding import (
    EncodingSettings,
    EvaluationSet,
    ImageRows,
    Storage,
    TextRows,
    banked_rows,
    encode_dataset,
)
from lavis_dcd.banks.row_store import Spill
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features

LONGEST_CAPTIONS = 64  # in letters; the longest in tokens is likely among them

log = logging.getLogger(__name__)

FeaturePair = tuple[ImageRows, TextRows]
# the set as a matcher reads it, through its own processors; the same object for the same view
DatasetOf = Callable[[Matcher, EvaluationSet], EvaluationSet]


class _Encoded(NamedTuple):
    """Features in memory or on disk, with whose encoders made them and what they were made from."""

    matcher: Matcher
    dataset: EvaluationSet
    features: FeaturePair


class Encodings:
    """Features for the matchers of an evaluation, made once for those that share encoders and read the same set.

    Leaving its ``with`` block removes those on disk.

    Args:
        uses: the matchers in the order in which ``take`` will be called; features are dropped after their last use.
        dataset: the evaluation set.
        dataset_of: the set as a matcher reads it.
        device: where features in memory stand; each matcher's by default.
        ranks: processes of which each encodes its share of the pictures, and all captions together.
    """

    def __init__(
        self,
        uses: Sequence[Matcher],
        dataset: EvaluationSet,
        dataset_of: DatasetOf,
        protocol: EvaluationProtocol,
        device: torch.device | str | None = None,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        self._to_come = list(uses)
        self._dataset, self._dataset_of = dataset, dataset_of
        self._protocol, self._device, self._ranks = protocol, device, ranks
        self._encoded: list[_Encoded] = []
        self._limit = protocol.eval_memory_mb * 2**20
        self._spill = Spill(protocol.spill_folder, block_bytes=int(self._limit / 2))

    def __enter__(self) -> Encodings:
        return self

    def __exit__(self, *error: object) -> None:
        self._encoded = []
        self._spill.close()

    def take(self, matcher: Matcher) -> FeaturePair:
        """Return the features of the set as ``matcher`` reads it: this process's pictures, and all captions.

        Raises:
            UserError: they do not fit on the disk that they have to wait on.
        """
        self._to_come.remove(matcher)
        entry = next((entry for entry in self._encoded if self._serves(entry, matcher)), None)
        if entry is None:
            entry = self._encode(matcher)
            self._encoded.append(entry)
        self._encoded = [entry for entry in self._encoded if any(self._serves(entry, later) for later in self._to_come)]
        return entry.features

    def _serves(self, entry: _Encoded, matcher: Matcher) -> bool:
        if self._dataset_of(matcher, self._dataset) is not entry.dataset:
            return False
        return entry.matcher is matcher or entry.matcher.shares_encoders_with(matcher)

    def _encode(self, matcher: Matcher) -> _Encoded:
        protocol, dataset = self._protocol, self._dataset_of(matcher, self._dataset)
        settings = EncodingSettings(protocol.batch_size, protocol.num_workers, protocol.amp)
        features = encode_dataset(matcher, dataset, settings, *self._storages(matcher, dataset), self._ranks)
        return _Encoded(matcher, dataset, features)

    def _storages(self, matcher: Matcher, dataset: EvaluationSet) -> tuple[Storage, Storage]:
        """Return where pictures and captions go: into memory, or onto the disk what is too big.

        Half of the limit is for what stays, half for the rows that are being read.
        """
        in_memory = (rows for entry in self._encoded for rows in entry.features if isinstance(rows, Features))
        held = sum(rows.nbytes for rows in in_memory)
        sizes, banked = feature_sizes(matcher, dataset, self._protocol.amp, self._ranks)
        if held + sum(sizes) <= self._limit:
            return Storage(self._device), Storage(self._device)
        smaller = sizes.index(min(sizes))
        stays = {smaller} if held + min(sizes) <= self._limit / 2 else set()
        waits = [side not in stays for side in range(2)]
        if waits[0] and not banked:
            self._spill.require(sizes[0])  # captions are kept without padding, so how big they become is not known
        log.info(
            "%s of features, eval_memory_mb=%g: %s are read block by block from %s",
            size_in_words(sum(sizes)),
            self._protocol.eval_memory_mb,
            " and ".join(name for name, wait in zip(("pictures", "captions"), waits, strict=True) if wait),
            "their bank" if banked else f"temporary files in {self._spill.folder}",
        )
        pictures, captions = (Storage(self._device, spill=self._spill if wait else None) for wait in waits)
        return pictures, captions


def feature_sizes(
    matcher: Matcher, dataset: EvaluationSet, amp: str, ranks: ProcessGroup
) -> tuple[tuple[int, int], bool]:
    """Return the bytes of a process's pictures and of all captions in memory, and whether they come from a bank.

    Those of a bank are exact; else a picture and the longest captions are encoded to see how big they are.
    """
    share = len(ProcessGroup(size=ranks.size).share(len(dataset)))  # the first process has the most
    banked = banked_rows(matcher, dataset)
    if banked is not None:
        return (banked[0].row_bytes * share, banked[1].nbytes), True
    images, texts = encode_dataset(matcher, _Sample(dataset), EncodingSettings(amp=amp))
    return (images.nbytes * share, texts.nbytes // len(texts) * len(dataset.text)), False


class _Sample(torch.utils.data.Dataset[Any]):
    """The first picture of an evaluation set with its longest captions: a sample of the features' size."""

    def __init__(self, dataset: EvaluationSet) -> None:
        self.dataset = dataset
        self.text = sorted(dataset.text, key=len, reverse=True)[:LONGEST_CAPTIONS]
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, int] = {}

    def __len__(self) -> int:
        return min(1, len(self.dataset))

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]
