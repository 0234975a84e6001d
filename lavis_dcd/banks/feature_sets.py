"""Retrieval sets that answer from a feature bank instead of decoding pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from lavis_dcd.banks.feature_bank import FeatureBank, read_rows
from lavis_dcd.banks.row_store import StreamedFeatures
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class _Delegating(Dataset):
    """A set around ``source`` that has all its other attributes (captions, mappings, processors)."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        # Absent while a copy is being unpickled.
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)


class PictureRows(_Delegating):
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


class BankedTrainingSet(Dataset):
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
        self.bank, self.dataset = bank, _as_rows(dataset, bank, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def collater(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = getattr(self.dataset, "collater", default_collate)(items)
        captions = [*batch["text_input"], *batch.get("candidate_text", ())]
        rows = torch.as_tensor(batch["image"])
        more = batch.pop("candidate_image", None)
        if more is not None:
            rows = torch.cat([rows, torch.as_tensor(more).flatten()])
        return {**batch, "image": self.bank.images(rows), "text_features": self.bank.texts(captions)}

    def set_epoch(self, epoch: int) -> None:
        """Passed on to wrappers that draw anew each epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def wrapped(self, wrap: Callable[[Any], Any]) -> BankedTrainingSet:
        """The same with ``wrap`` around the rows, below the features."""
        outer = copy.copy(self)
        outer.dataset = wrap(self.dataset)
        return outer


class BankedEvaluationSet(_Delegating):
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


def _as_rows(dataset: Any, bank: FeatureBank, name: str) -> Any:
    if hasattr(dataset, "datasets"):
        return type(dataset)([_as_rows(part, bank, f"{name}.{i}") for i, part in enumerate(dataset.datasets)])
    if "dataset" in vars(dataset):
        wrapper = copy.copy(dataset)
        wrapper.dataset = _as_rows(dataset.dataset, bank, name)
        return wrapper
    return PictureRows(dataset, read_rows(dataset, name).captions, bank.picture_rows[name])
