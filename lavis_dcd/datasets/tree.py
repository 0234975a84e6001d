"""Data sets inside data sets: wrappers, concatenations, and the plain sets that they hold.

A concatenation has its sets as ``datasets`` (torch's and LAVIS's), a wrapper the set around which it lies as
``dataset`` (ours are ``WrappedSet``; torch's ``Subset``). All others are plain, a ``StandInSet`` included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import Dataset, default_collate

from lavis_dcd.common.errors import UserError


class WrappedSet(Dataset):
    """A data set around another one, to which it passes on whatever a subclass does not change.

    Args:
        dataset: a plain set, a concatenation or a wrapper.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def collater(self, samples: list[Any]) -> Any:
        """A batch of these samples, as the inner set makes it."""
        return collater_of(self.dataset)(samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch for which samples are drawn."""
        set_epoch(self.dataset, epoch)


class StandInSet(Dataset):
    """A plain set in the place of ``source``, all of whose other attributes (captions, tables, processors) it has."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        # absent while a copy is being unpickled
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)


@runtime_checkable
class DrawsAnew(Protocol):
    """A set whose samples differ from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch for which samples are drawn."""


def set_epoch(dataset: Any, epoch: int) -> None:
    """Choose the epoch for which ``dataset``, or the sets of a concatenation, draw their samples."""
    if isinstance(dataset, DrawsAnew):
        dataset.set_epoch(epoch)
    for joined in _joined(dataset) or ():
        set_epoch(joined, epoch)


def collater_of(dataset: Any) -> Callable[[list[Any]], Any]:
    """The function that makes batches of the set's samples: its own as LAVIS's sets have one, else torch's."""
    return getattr(dataset, "collater", None) or default_collate


def original(dataset: Any) -> Any:
    """The set itself where ``dataset`` stands in for one."""
    while isinstance(dataset, StandInSet):
        dataset = dataset.source
    return dataset


def is_evaluation_set(dataset: Any) -> bool:
    """Return whether the set has LAVIS's retrieval evaluation shape: captions apart from the pictures."""
    return hasattr(dataset, "text") and hasattr(dataset, "img2txt")


def plain_sets(dataset: Any, name: str) -> dict[str, Any]:
    """The plain sets inside wrappers and concatenations.

    Args:
        name: of a plain set; those of a concatenation are ``name.0``, ``name.1`` and so on. A feature bank keeps
            their pictures under these names.
    """
    if (joined := _joined(dataset)) is not None:
        parts = [plain_sets(inner, f"{name}.{i}") for i, inner in enumerate(joined)]
        return {key: plain for part in parts for key, plain in part.items()}
    if (inner := _wrapped(dataset)) is not None:
        return plain_sets(inner, name)
    return {name: dataset}


def replace_plain_sets(dataset: Any, name: str, replacement: Callable[[str, Any], Any]) -> Any:
    """A copy of ``dataset`` in which other sets stand inside its wrappers and concatenations.

    Args:
        name: as for :func:`plain_sets`.
        replacement: gives the new set for the name of a plain set and that set.
    """
    if (joined := _joined(dataset)) is not None:
        return type(dataset)([replace_plain_sets(inner, f"{name}.{i}", replacement) for i, inner in enumerate(joined)])
    if (inner := _wrapped(dataset)) is not None:
        wrapper = copy.copy(dataset)
        wrapper.dataset = replace_plain_sets(inner, name, replacement)
        return wrapper
    return replacement(name, dataset)


def _joined(dataset: Any) -> Sequence[Any] | None:
    return getattr(dataset, "datasets", None)


def _wrapped(dataset: Any) -> Any:
    # of the object itself: a stand-in has its source's attributes, too
    return getattr(dataset, "__dict__", {}).get("dataset")


def annotation_rows(dataset: Any) -> list[tuple[Any, dict[str, Any]]]:
    """(plain set, row of its annotation) for every row of a training set, wrappers and concatenations included."""
    return [(plain, row) for plain in plain_sets(dataset, "").values() for row in plain.annotation]


def batch_groups(dataset: Any, key: str, where: str = "run.batch_by") -> list[tuple[Any, Any]]:
    """(value of the annotation's ``key``, picture) for every row of a training set.

    Args:
        where: the key stands in the configuration.

    Raises:
        UserError: rows without that key.
    """
    rows = [
        (name, row) for name, plain in plain_sets(dataset, "").items() for row in getattr(plain, "annotation", [{}])
    ]
    lacking = next((row for _, row in rows if key not in row), None)
    if lacking is not None:
        raise UserError(f"{where}: the rows have no {key!r}; they have {', '.join(lacking) or 'no keys'}")
    return [((name, row[key]), (name, row["image_id"])) for name, row in rows]
