"""The teacher on pictures that it was trained on, beside the same on others: how much its doubt says there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lavis_dcd.common.texts import shown
from lavis_dcd.reporting.metrics_lines import is_number

FAR = 20.0  # points of R@1 from which on a teacher counts as one that has memorised its training pictures


@dataclass(frozen=True)
class Memorised:
    """R@1 of a teacher's captions, each looking for its picture, among as many training pictures as a split has.

    Args:
        split: the name of the other pictures' split.
        pictures: among how many each caption looks for its own.
        train_r1, split_r1: in percent.
    """

    split: str
    pictures: int
    train_r1: float
    split_r1: float

    @classmethod
    def of(cls, split: str, on_train: Mapping[str, Any], on_split: Mapping[str, Any]) -> Memorised | None:
        """Compare the metrics of two evaluations; None where either has no ``img_r1``.

        Args:
            on_train: with ``pictures``.
        """
        both = on_train.get("img_r1"), on_split.get("img_r1")
        if not all(map(is_number, both)):
            return None
        return cls(split, int(on_train["pictures"]), *map(float, both))  # type: ignore[arg-type]

    @classmethod
    def parse(cls, stored: Any) -> Memorised:
        """Read what :meth:`stored` wrote.

        Raises:
            ValueError: it is not of that form.
        """
        names = cls.__dataclass_fields__
        if not isinstance(stored, Mapping) or not set(names) <= set(stored):
            raise ValueError(f"{shown(stored)} has not {', '.join(names)}")
        numbers = [stored[name] for name in ("pictures", "train_r1", "split_r1")]
        if not isinstance(stored["split"], str) or not all(map(is_number, numbers)):
            raise ValueError(f"{shown(stored)} has other values than an evaluation writes")
        return cls(stored["split"], *numbers)

    def stored(self) -> dict[str, Any]:
        """Return plain containers, as ``results.json`` holds them."""
        return asdict(self)

    @property
    def is_far(self) -> bool:
        """Return whether the two are so far apart that the teacher's scores of training pictures are no guide."""
        return self.train_r1 - self.split_r1 >= FAR

    def __str__(self) -> str:
        found = (
            f"Of 100 captions of the training set, the teacher puts the picture first for {self.train_r1:.1f} (among "
            f"{self.pictures:,}); of {self.split}, among as many, for {self.split_r1:.1f}."
        )
        if self.is_far:
            return (
                f"{found} It has memorised the training set, so that its doubt says little about a training query: "
                "weights by entropy or confidence (loss.weighting) have next to nothing to work with, and "
                "softer scores (loss.teacher_temperature above 1) may serve the student better."
            )
        return f"{found} Its doubt about a training query says as much as about a new one."
