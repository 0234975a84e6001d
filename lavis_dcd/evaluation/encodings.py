"""The features of one evaluation: encoded once for all matchers that they serve, in memory or on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lavis_dcd.banks.encoding import Storage, encode_dataset
from lavis_dcd.banks.row_store import Spill
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation.exhaustive import Rows
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features

LONGEST_CAPTIONS = 64  # in letters; the longest in tokens is likely among them

log = logging.getLogger(__name__)

FeaturePair = tuple[Rows, Rows]
DatasetOf = Callable[[Matcher], Any]


class Encodings:
    """Features for the matchers of an evaluation, made once for those that share encoders and read the same set.

    Leaving its ``with`` block takes those on disk away.

    Args:
        uses: the matchers in the order in which ``take`` will be called; features are dropped after their last use.
    """

    def __init__(
        self,
        uses: Sequence[Matcher],
        dataset_of: DatasetOf,
        protocol: EvaluationProtocol,
        device: Any,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        self._to_come = list(uses)
        self._dataset_of, self._protocol, self._device, self._ranks = dataset_of, protocol, device, ranks
        self._kept: list[tuple[Matcher, Any, FeaturePair]] = []
        half = protocol.eval_memory_mb * 2**20 / 2
        self._spill = Spill(protocol.spill_folder, block_bytes=int(half))

    def __enter__(self) -> Encodings:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept = []
        self._spill.close()

    def take(self, matcher: Matcher) -> FeaturePair:
        """The features of the set as ``matcher`` reads it.

        Raises:
            UserError: they do not fit on the disk that they have to wait on.
        """
        self._to_come.remove(matcher)
        dataset = self._dataset_of(matcher)
        features = next((kept for other, seen, kept in self._kept if self._serves(other, seen, matcher)), None)
        if features is None:
            features = self._encode(matcher, dataset)
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

    def _encode(self, matcher: Matcher, dataset: Any) -> FeaturePair:
        protocol = self._protocol
        storages = self._storages(matcher, dataset)
        return encode_dataset(
            matcher,
            dataset,
            protocol.batch_size,
            self._device,
            protocol.num_workers,
            storage=storages[0],
            text_storage=storages[1],
            amp=protocol.amp,
            progress=True,
            ranks=self._ranks,
        )

    def _storages(self, matcher: Matcher, dataset: Any) -> tuple[Storage, Storage]:
        """For pictures and captions: memory, or the disk for what is too big.

        Half of the limit is for what stays, half for the rows that are being read.
        """
        limit = self._protocol.eval_memory_mb * 2**20
        held = sum(rows.nbytes for _, _, pair in self._kept for rows in pair if isinstance(rows, Features))
        sizes, banked = feature_sizes(matcher, dataset, self._protocol.amp, self._ranks)
        if held + sum(sizes) <= limit:
            return Storage(), Storage()
        smaller = sizes.index(min(sizes))
        stays = {smaller} if held + min(sizes) <= limit / 2 else set()
        waits = [place not in stays for place in range(2)]
        if waits[0] and not banked:
            self._spill.require(sizes[0])  # captions are kept without padding, so how big they become is not known
        log.info(
            "%s of features, run.eval_memory_mb=%g: %s are read block by block from %s",
            size_in_words(sum(sizes)),
            self._protocol.eval_memory_mb,
            " and ".join(name for name, wait in zip(("pictures", "captions"), waits, strict=True) if wait),
            "their bank" if banked else f"temporary files in {self._spill.folder}",
        )
        pictures, captions = (Storage(spill=self._spill if wait else None) for wait in waits)
        return pictures, captions


def feature_sizes(matcher: Matcher, dataset: Any, amp: str, ranks: ProcessGroup) -> tuple[tuple[int, int], bool]:
    """Bytes of this process's pictures and of all captions in memory, and whether they come from a bank.

    Those of a bank are exact; else a picture and the longest captions are encoded to see how big they are.
    """
    share = len(ProcessGroup(size=ranks.size).share(len(dataset)))  # the first process has the most
    banked = dataset.banked_rows(matcher) if hasattr(dataset, "banked_rows") else None
    if banked is not None:
        return (banked[0].row_bytes * share, banked[1].nbytes), True
    sample = _First(dataset)
    images, texts = encode_dataset(matcher, sample, amp=amp)
    return (images.nbytes * share, texts.nbytes // len(texts) * len(dataset.text)), False


class _First(torch.utils.data.Dataset):
    """The first picture of an evaluation set with its longest captions: a sample of the features' size."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.text = sorted(dataset.text, key=len, reverse=True)[:LONGEST_CAPTIONS]

    def __len__(self) -> int:
        return min(1, len(self.dataset))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]
