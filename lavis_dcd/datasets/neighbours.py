"""The pictures of a training set that are neighbours, and those that should not meet in a batch."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_path, update_with_tensors
from lavis_dcd.common.tensor_files import load_tensors

_NOT_LETTERS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class NeighbourTable:
    """Neighbours of P pictures that R rows of a training set show.

    Args:
        picture_of_row: int64 ``[R]``, the number of each row's picture.
        nearest: int32 ``[P, N]``, the nearest pictures of each, nearest first; -1 where there are no more.
        apart: int32 ``[M]``, groups of pictures that should not meet in a batch, one group behind the other.
        apart_starts: int64 ``[G + 1]``, where each group starts in ``apart``, and where the last one ends.

    Raises:
        ValueError: shapes, types or numbers that do not fit.
    """

    picture_of_row: Tensor
    nearest: Tensor
    apart: Tensor
    apart_starts: Tensor

    def __post_init__(self) -> None:
        kinds = [(self.picture_of_row, 1, torch.int64), (self.nearest, 2, torch.int32), (self.apart, 1, torch.int32),
                 (self.apart_starts, 1, torch.int64)]  # fmt: skip
        if any(tensor.ndim != ndim or tensor.dtype != dtype for tensor, ndim, dtype in kinds):
            raise ValueError("a neighbour table has other shapes or types than [R], [P, N], [M] and [G + 1]")
        pictures = len(self.nearest)
        if not len(self.picture_of_row) or not _within(self.picture_of_row, 0, pictures):
            raise ValueError(f"a row's picture is none of {pictures}")
        if not _within(self.nearest, -1, pictures) or not _within(self.apart, 0, pictures):
            raise ValueError(f"a neighbour is none of {pictures} pictures")
        starts = self.apart_starts
        if not len(starts) or starts[0] != 0 or starts[-1] != len(self.apart) or bool((starts.diff() < 0).any()):
            raise ValueError("the groups of pictures to keep apart do not follow each other")

    @classmethod
    def of(
        cls,
        picture_of_row: Tensor,
        nearest: Tensor,
        apart: Iterable[Sequence[int]] = (),
        pairs: Tensor | None = None,
    ) -> NeighbourTable:
        """Make a table.

        Args:
            apart: groups of pictures to keep apart.
            pairs: int64 ``[M, 2]``, further groups, of two pictures each.
        """
        groups = [list(group) for group in apart]
        pairs = torch.empty(0, 2, dtype=torch.int64) if pairs is None else pairs
        members = torch.tensor([picture for group in groups for picture in group], dtype=torch.int32)
        sizes = torch.cat([torch.tensor([0, *map(len, groups)]), torch.full((len(pairs),), 2)])
        return cls(picture_of_row, nearest, torch.cat([members, pairs.flatten().int()]), sizes.cumsum(0))

    def digest(self) -> str:
        """Return the SHA-256 of all that the table holds."""
        digest = hashlib.sha256()
        update_with_tensors(digest, sorted(vars(self).items()))
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the table to a file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in vars(self).items()}, str(temporary))

    @classmethod
    def load(cls, path: Path) -> NeighbourTable:
        """Read the table in a file.

        Raises:
            ValueError: there is no such file, or it is damaged, or holds something else.
        """
        try:
            return cls(**load_tensors(path))
        except (UserError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no neighbours of pictures ({error})") from error


def pictures_with_equal_captions(picture_of_row: Tensor, captions: Sequence[str]) -> list[list[int]]:
    """Return the pictures of every caption that several have; captions are equal up to case and punctuation.

    Args:
        picture_of_row: int64 ``[R]``.
        captions: R, as the annotation has them.
    """
    pictures_of: dict[str, dict[int, None]] = defaultdict(dict)
    for picture, caption in zip(picture_of_row.tolist(), captions, strict=True):
        if words := _NOT_LETTERS.sub(" ", caption.casefold()).strip():
            pictures_of[words][picture] = None
    groups = {tuple(pictures) for pictures in pictures_of.values() if len(pictures) > 1}
    return [list(group) for group in sorted(groups)]


def _within(numbers: Tensor, least: int, end: int) -> bool:
    return not numbers.numel() or bool((numbers.min() >= least) & (numbers.max() < end))
