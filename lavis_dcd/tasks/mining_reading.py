"""A training set as the matchers of a mining read it: pictures decoded once, without random changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lavis_dcd.datasets.leaves import leaf_sets
from lavis_dcd.datasets.views import View, alike, with_views
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.views import MAIN_VIEW, view_of
from lavis_dcd.tasks.mining_pools import Pairing


@dataclass(frozen=True)
class Reader:
    """A matcher with its evaluation processors (``view.vis_eval`` and ``view.text_eval``, both given)."""

    matcher: Matcher
    view: View

    def served_by(self, other: Reader) -> bool:
        """Whether the other's features are this one's too."""
        return (
            alike(self.view.vis_eval, other.view.vis_eval)
            and alike(self.view.text_eval, other.view.text_eval)
            and self.matcher.shares_encoders_with(other.matcher)
        )


class ReadSet:
    """The rows of a training set through the processors of several readers.

    Args:
        train_set: a LAVIS retrieval training set or a concatenation of some.
        readers: each is addressed by its place in this list.

    Raises:
        UserError: a set without processors.
    """

    def __init__(self, train_set: Any, readers: Sequence[Reader]) -> None:
        self._names = [MAIN_VIEW, *(f"reader.{i}" for i in range(1, len(readers)))]
        views = {
            name: View(vis_train=reader.view.vis_eval, text_train=reader.view.text_eval)
            for name, reader in zip(self._names, readers, strict=True)
        }
        self._set = with_views(train_set, views)
        self._rows = [(leaf, row) for leaf in leaf_sets(self._set, "").values() for row in leaf.annotation]

    def captions(self, reader: int, rows: Sequence[int]) -> list[str]:
        """The captions of these rows."""
        found = (leaf.text_processor(row["caption"]) for leaf, row in (self._rows[i] for i in rows))
        return [made.get(self._names[reader], made[MAIN_VIEW]) if isinstance(made, Mapping) else made for made in found]

    def batches(self, rows: list[list[int]], num_workers: int) -> DataLoader:
        """Batches of the pictures of these rows, for :meth:`pictures`."""
        return DataLoader(_Pictures(self._set), batch_sampler=rows, num_workers=num_workers)

    def pictures(self, reader: int, batch: Mapping[str, Any]) -> Tensor:
        """``[B, 3, H, W]``."""
        return view_of(batch, self._names[reader])["image"]


def pairing_of(train_set: Any) -> Pairing:
    """Who belongs to whom in a training set; captions that training reads alike are one."""
    rows = [(leaf, row) for leaf in leaf_sets(train_set, "").values() for row in leaf.annotation]
    ids = [leaf.img_ids[row["image_id"]] for leaf, row in rows]
    return Pairing.of(ids, [leaf.text_processor(row["caption"]) for leaf, row in rows])


class _Pictures(Dataset):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": self.source[row]["image"]}
