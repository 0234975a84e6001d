"""Vectors of many rows, a few or many for each row, in pieces: tensors in memory, or stretches of files.

Memory-mapped files are tensors in memory here. Files are read plainly where memory is bounded: the pages of a mapped
file count as this process's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lavis_dcd.common.errors import UserError

# Tensors are copied as plain words of their size, since NumPy has no bfloat16.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Piece(Protocol):
    """Vectors of one width, one behind the other."""

    def opened(self) -> AbstractContextManager[Callable[[int, np.ndarray], None]]:
        """A function that fills words ``[n, D]`` with the n vectors from a given one on."""


class TensorPiece(Piece):
    """Vectors ``[S, D]`` in memory, or memory-mapped."""

    def __init__(self, vectors: Tensor) -> None:
        self._words = words_of(vectors)

    @override
    def opened(self) -> AbstractContextManager[Callable[[int, np.ndarray], None]]:
        return nullcontext(self._read)

    def _read(self, start: int, words: np.ndarray) -> None:
        words[:] = self._words[start : start + len(words)]


class FilePiece(Piece):
    """Vectors in a file.

    Args:
        file: opens it, for as long as the ``with`` block lasts.
        begin: where its first vector stands, in bytes.
    """

    def __init__(self, file: Callable[[], AbstractContextManager[Any]], begin: int) -> None:
        self._file, self._begin = file, begin

    @override
    @contextmanager
    def opened(self) -> Iterator[Callable[[int, np.ndarray], None]]:
        with self._file() as handle:
            yield partial(self._read, handle)

    def _read(self, handle: Any, start: int, words: np.ndarray) -> None:
        view = bytes_of(words)
        handle.seek(self._begin + start * words.itemsize * words.shape[1])
        while view:
            count = handle.readinto(view)
            if not count:
                raise UserError(f"{getattr(handle, 'name', '')}: a file of features has become shorter; start again")
            view = view[count:]


class Column:
    """The vectors of many rows, some for each row, in pieces.

    Args:
        count: of the rows.
        shape: of what a row holds, beside the number of its vectors: the last side of tokens, all sides of embeds.

    ``lengths`` int64 ``[count]``: vectors of each row, 0 for one that has not come.
    """

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.lengths = np.zeros(count, np.int64)
        self._starts, self._piece_of = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._pieces: list[Piece] = []

    def add(self, rows: np.ndarray, lengths: int | np.ndarray, piece: Piece) -> None:
        """Take the vectors of ``rows``, int64 ``[b]``, which lie in their order in ``piece``."""
        self.lengths[rows] = lengths
        counts = self.lengths[rows]
        self._starts[rows], self._piece_of[rows] = counts.cumsum() - counts, len(self._pieces)
        self._pieces.append(piece)

    def with_pieces(self, pieces: Sequence[Piece]) -> Column:
        """The same rows, read from other pieces."""
        twin = Column(0, self.shape, self.dtype)
        twin.lengths, twin._starts, twin._piece_of = self.lengths, self._starts, self._piece_of
        twin._pieces = list(pieces)
        return twin

    def read(self, rows: np.ndarray, out: Tensor) -> None:
        """Fill ``out [B, N, D]``, of any floating point type, with the vectors of rows int64 ``[B]``, zeros behind."""
        starts, lengths = self._starts[rows].tolist(), self.lengths[rows].tolist()
        piece_of = self._piece_of[rows]
        places = np.argsort(piece_of, kind="stable").tolist()
        as_kept = out if out.dtype == self.dtype else torch.empty(1, *out.shape[1:], dtype=self.dtype)
        words = words_of(as_kept)
        for piece, places_in_piece in groupby(places, key=piece_of.tolist().__getitem__):
            with self._pieces[piece].opened() as read:
                for place in places_in_piece:
                    row = place if as_kept is out else 0
                    read(starts[place], words[row, : lengths[place]])
                    words[row, lengths[place] :] = 0
                    if as_kept is not out:
                        out[place] = as_kept[0]


def words_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU as integers of its elements' size, of the same shape."""
    return tensor.detach().view(_WORDS[tensor.element_size()]).numpy()


def bytes_of(words: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(words.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # a buffer


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU."""
    # NumPy's memory comes in huge pages: half the time of torch.empty for batches of many megabytes
    return torch.from_numpy(np.empty(shape, f"i{dtype.itemsize}")).view(dtype)
