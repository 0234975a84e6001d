"""The `run.batches:` section: which pictures meet in a batch."""

from __future__ import annotations

from dataclasses import dataclass, fields

TEACHER, BANK = "teacher", "bank"  # what `by` can be beside a key of the annotation's rows


@dataclass
class BatchesConfig:
    """Batches of pictures that belong together: neighbours by the teacher, or equal in a key of their rows.

    An epoch still has every row once. It is a number of passes over the pictures, each with another caption of a
    picture. In a pass, a neighbourhood is a random picture and the nearest ones that no batch of the pass has yet.
    """

    # teacher: neighbours in the teacher's joint space; bank: by the scores of a score bank, for teachers without one;
    # any other name: a key of the annotation's rows, whose equal values come in one batch
    by: str = "teacher"
    size: int | None = None  # pictures of a neighbourhood; null: all that a batch has in neighbourhoods
    share: float = 1.0  # of every batch, in neighbourhoods; its other pictures are drawn at random
    neighbours: int = 128  # nearest pictures that are kept for each; 4 bytes times the pictures times this, in memory
    # pictures with an equal caption (up to case and punctuation) are kept apart: an unlabelled match counts as a
    # negative where targets are one-hot, and with soft ones teaches nothing
    guard: bool = True
    # also keep two pictures apart whose nearness is above the lower one of their scores with their own captions plus
    # this; negative values keep more apart. Null: near-duplicates may meet, soft targets give them their share
    margin: float | None = None

    @property
    def of_neighbours(self) -> bool:
        """Return whether neighbourhoods are drawn, and not the rows' own groups."""
        return self.by in (TEACHER, BANK)

    def faults(self, batch_size: int) -> list[str]:
        """Return one line per value that makes no sense.

        Args:
            batch_size: of the batch of all processes.
        """
        if not self.by.strip():
            return [f"run.batches.by: is empty; it is {TEACHER}, {BANK} or a key of the annotation's rows"]
        if not self.of_neighbours:
            return self._faults_of_key()
        found = []
        if not 0 < self.share <= 1:
            found.append(f"run.batches.share: {self.share!r} is no share of a batch; it is above 0 and at most 1")
        elif round(self.share * batch_size) < 2:
            found.append(
                f"run.batches.share: {self.share!r} of a batch of {batch_size} is less than 2 pictures, which are no "
                "neighbourhood; raise it, or run.batch_size_train"
            )
        if self.size is not None and not 2 <= self.size <= batch_size:
            found.append(
                f"run.batches.size: {self.size} pictures are no neighbourhood within a batch of {batch_size}; it is "
                f"from 2 to {batch_size} (run.batch_size_train times the processes), or null for all of it"
            )
        if self.neighbours < 1:
            found.append(f"run.batches.neighbours: {self.neighbours} must be greater than 0")
        if self.margin is not None and self.by == BANK:
            found.append(
                f"run.batches.margin: has no effect with by: {BANK}, whose scores are those of some pairs only; leave "
                "it out"
            )
        return found

    def _faults_of_key(self) -> list[str]:
        given = [field.name for field in fields(self) if field.name != "by"]
        idle = [name for name in given if getattr(self, name) != getattr(BatchesConfig, name)]
        return [
            f"run.batches.{name}: has no effect with by: {self.by}, a key of the annotation's rows; leave it out, or "
            f"set by to {TEACHER} or {BANK}"
            for name in idle
        ]
