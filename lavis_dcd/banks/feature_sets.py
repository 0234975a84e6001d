"""Retrieval sets that answer from a feature bank instead of decoding pictures."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import override

from lavis_dcd.banks.feature_bank import FeatureBank, read_rows
from lavis_dcd.banks.row_store import StreamedFeatures
from lavis_dcd.datasets.training_sample import TrainingSample
from lavis_dcd.datasets.tree import StandInSet, WrappedSet, collater_of, replace_plain_sets
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class PictureRows(StandInSet):
    """A training set whose ``image`` is the picture's row in the bank; ``rows`` has those of all items."""

    def __init__(self, source: Any, captions: list[str], rows: list[int]) -> None:
        super().__init__(source)
        self.captions, self.rows = captions, rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.source.annotation[index]
        item = {
            "image": self.rows[index],
            "text_input": self.captions[index],
            "image_id": self.source.img_ids[row["image_id"]],
        }
        return item | ({"instance_id": row["instance_id"]} if "instance_id" in row else {})


class BankedTrainingSet(WrappedSet):
    """A training set, perhaps in wrappers that draw captions, whose batches carry features, not pictures.

    A batch is the set's own, with ``image`` an ``ImageFeatures`` (one row per sample, as precise as it is kept) and
    ``text_features`` a ``TextFeatures`` of ``text_input``, then of ``candidate_text`` where there is one. A batch's
    ``candidate_image`` (int64 ``[B * K]``, rows of pictures in the bank) becomes further rows of ``image``.

    Args:
        dataset: a LAVIS retrieval training set, a ``ConcatDataset`` of them, or a wrapper with ``.dataset``.
        name: of the set when the bank was built.

    Raises:
        KeyError: a set that the bank was not built from.
    """

    def __init__(self, dataset: Any, bank: FeatureBank, name: str = "train") -> None:
        def of_rows(plain_name: str, plain: Any) -> PictureRows:
            return PictureRows(plain, read_rows(plain, plain_name).captions, bank.picture_rows[plain_name])

        super().__init__(replace_plain_sets(dataset, name, of_rows))
        self.bank = bank

    @override
    def collater(self, samples: list[Any]) -> dict[str, Any]:
        batch = collater_of(self.dataset)(samples)
        captions = [*batch["text_input"], *batch.get("candidate_text", ())]
        rows = torch.as_tensor(batch["image"])
        more = batch.pop("candidate_image", None)
        if more is not None:
            rows = torch.cat([rows, torch.as_tensor(more).flatten()])
        return {**batch, "image": self.bank.images(rows), "text_features": self.bank.texts(captions)}

    def wrapped(self, wrap: Callable[[Any], Any]) -> BankedTrainingSet:
        """The same with ``wrap`` around the rows, below the features."""
        outer = copy.copy(self)
        outer.dataset = wrap(self.dataset)
        return outer


class BankedEvaluationSet(StandInSet):
    """An evaluation set whose features come from the bank for every matcher that the bank serves."""

    def __init__(self, source: Any, bank: FeatureBank, name: str) -> None:
        super().__init__(source)
        self.bank, self.name_in_bank = bank, name

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index]

    def banked_rows(
        self, matcher: Matcher
    ) -> tuple[StreamedFeatures[ImageFeatures], StreamedFeatures[TextFeatures]] | None:
        """Float32 features of all pictures and captions, in order, which nobody has read yet; ``None`` for other
        encoders than the bank's."""
        if not self.bank.serves(matcher):
            return None
        return self.bank.image_rows(self.bank.picture_rows[self.name_in_bank]), self.bank.text_rows(self.source.text)


def banked_sample(sample: TrainingSample, bank: FeatureBank) -> BankedEvaluationSet:
    """The sample with the bank's features of its pictures and captions.

    Args:
        sample: read by the training set's own processors, as the bank's features were.
        bank: built from that training set under the name "train".
    """
    name = "train, a sample"
    rows = [bank.picture_rows[of_set][row] for of_set, row in sample.places]
    seen = dataclasses.replace(bank, picture_rows={**bank.picture_rows, name: rows})
    return BankedEvaluationSet(sample, seen, name)
