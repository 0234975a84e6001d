"""Training samples of pictures and texts that do not belong together, drawn anew for every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lavis.processors.base_processor import BaseProcessor
from typing_extensions import override

from lavis_dcd.common.seeding import seed_for
from lavis_dcd.datasets.rows import RetrievalRows
from lavis_dcd.datasets.tree import WrappedSet, original, plain_sets, replace_plain_sets


class UnpairedRows(RetrievalRows):
    """Pictures and texts side by side: as many rows as the longer list has items, the shorter one repeated.

    LAVIS's training shape, so that features can be kept. The first rows hold every picture once, and every text once.
    That a row's picture and text stand in one row says nothing; :class:`UnrelatedPairs` draws what comes together.

    Args:
        pictures: distinct paths below ``vis_root``.
        texts: as written; one that is there several times comes as often.
    """

    def __init__(
        self,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
        vis_root: str,
        pictures: Sequence[str],
        texts: Sequence[str],
    ) -> None:
        self.picture_count, self.text_count = len(pictures), len(texts)
        rows: list[dict[str, Any]] = []
        for index in range(max(len(pictures), len(texts))):
            picture = pictures[index % len(pictures)]
            rows.append({"image": picture, "caption": texts[index % len(texts)], "image_id": picture})
        super().__init__(vis_processor, text_processor, vis_root, rows)


class UnrelatedPairs(WrappedSet):
    """An ``UnpairedRows``, or what stands in for one, whose samples put a picture beside a text drawn without relation.

    An epoch is one pass over the longer list, each of whose items comes once; the items of the shorter one come equally
    often, but for one. The draw follows from (seed, name, epoch) alone.

    Args:
        dataset: the plain set.
        seed: of the job.
        name: of the set among the job's.
    """

    def __init__(self, dataset: Any, seed: int, name: str = "train") -> None:
        super().__init__(dataset)
        self._seed, self._name = seed, name
        self.set_epoch(0)

    @override
    def set_epoch(self, epoch: int) -> None:
        self._pictures = self._order(epoch, "pictures", self.dataset.picture_count)
        self._texts = self._order(epoch, "texts", self.dataset.text_count)
        super().set_epoch(epoch)

    def _order(self, epoch: int, what: str, count: int) -> np.ndarray:
        """Return one item per sample, int64 ``[N]`` in 0..count-1: all of them in random order, over and over."""
        random = np.random.default_rng(seed_for(self._seed, "unpaired", self._name, what, epoch))
        passes = [random.permutation(count) for _ in range(-(-len(self) // count))]
        return np.concatenate(passes)[: len(self)]

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        text = self.dataset.annotation[self._texts[index]]["caption"]
        return {**self.dataset[int(self._pictures[index])], "text_input": self.dataset.text_processor(text)}


def drawn_apart(dataset: Any, seed: int) -> Any:
    """Return a training set whose ``UnpairedRows``, in wrappers or concatenations, come as ``UnrelatedPairs``.

    A set without any is returned as it is.

    Args:
        seed: of the job.
    """
    if not any(_is_unpaired(plain) for plain in plain_sets(dataset, "train").values()):
        return dataset
    return replace_plain_sets(
        dataset, "train", lambda name, plain: UnrelatedPairs(plain, seed, name) if _is_unpaired(plain) else plain
    )


def _is_unpaired(plain: Any) -> bool:
    return isinstance(original(plain), UnpairedRows)
