"""Captions of other pictures, drawn at random for every training sample: the release's candidate pool."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.tree import WrappedSet, annotation_rows, collater_of


class WithCandidates(WrappedSet):
    """A training set around ``dataset`` whose samples carry candidates, drawn from its rows by (seed, epoch, index).

    Args:
        dataset: a LAVIS ``RetrievalDataset``, a concatenation of some, or a wrapper with ``.dataset``.
        seed: of the draws.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(dataset)
        self.seed, self.epoch = seed, 0
        self._rows = annotation_rows(dataset)

    def _image_ids(self) -> list[int]:
        """The id that every row's picture has in samples, whatever its set calls it."""
        return [plain.img_ids[row["image_id"]] for plain, row in self._rows]

    def _captions(self, rows: Iterable[int]) -> Any:
        """The captions of these rows through their sets' text processors, by view where that makes several."""
        return _by_view([plain.text_processor(row["caption"]) for plain, row in (self._rows[i] for i in rows)])

    @override
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        super().set_epoch(epoch)

    def _inner_batch(self, samples: list[dict[str, Any]], added: Collection[str]) -> dict[str, Any]:
        """The inner set's batch, without the keys ``added``."""
        collate = collater_of(self.dataset)
        return collate([{k: v for k, v in sample.items() if k not in added} for sample in samples])


class RandomCaptions(WithCandidates):
    """A training set whose samples carry ``count`` captions of other pictures.

    Adds ``candidate_text`` (list of ``count`` strings, through the set's text processor; a mapping from view to such
    lists where that makes several, see ``datasets.views``) and ``candidate_image_id`` (int64 ``[count]``). The draw is
    without replacement and depends on (seed, epoch, index) alone, so any number of loader workers gives the same.

    Args:
        dataset: a LAVIS ``RetrievalDataset`` or a concatenation of some.
        count: captions per sample.
        seed: of the draws.

    Raises:
        UserError: when some picture has fewer than ``count`` captions of other pictures beside it.
    """

    def __init__(self, dataset: Any, count: int, seed: int) -> None:
        super().__init__(dataset, seed)
        self.count = count
        self._ids = np.array(self._image_ids())
        most = int(np.unique(self._ids, return_counts=True)[1].max())
        if len(self._rows) - most < count:
            raise UserError(
                f"model.candidates.image_to_text.count: {count} captions of other pictures cannot be drawn from "
                f"{len(self._rows)} captions (one picture has {most} of them); lower it or add data"
            )

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self._draw(index)
        return {
            **self.dataset[index],
            "candidate_text": self._captions(rows),
            "candidate_image_id": torch.from_numpy(self._ids[rows]),
        }

    def _draw(self, index: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, self.epoch, index])
        image_id, drawn = self._ids[index], np.empty(0, np.int64)
        while len(drawn) < self.count:  # rejection: few rows share the picture, so one round nearly always does
            more = random.integers(len(self._rows), size=2 * self.count)
            more = more[self._ids[more] != image_id]
            drawn = np.concatenate([drawn, more])
            drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        return drawn[: self.count]

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The inner set's batch, with ``candidate_text`` a flat row-major list of B * count strings (per view, where
        there are several) and ``candidate_image_id`` int64 ``[B, count]``."""
        batch = self._inner_batch(samples, ("candidate_text", "candidate_image_id"))
        batch["candidate_text"] = flat_texts(samples)
        batch["candidate_image_id"] = torch.stack([s["candidate_image_id"] for s in samples])
        return batch


def flat_texts(samples: list[dict[str, Any]]) -> Any:
    """All samples' ``candidate_text`` as one list, row-major; by view where there are several."""
    texts = _by_view([sample["candidate_text"] for sample in samples])
    if isinstance(texts, Mapping):
        return {view: _flat(rows) for view, rows in texts.items()}
    return _flat(texts)


def _by_view(texts: list[Any]) -> Any:
    """A list of values as it is; of mappings, the mapping of lists."""
    if not texts or not isinstance(texts[0], Mapping):
        return texts
    return {view: [text[view] for text in texts] for view in texts[0]}


def _flat(rows: list[list[str]]) -> list[str]:
    return [text for row in rows for text in row]
