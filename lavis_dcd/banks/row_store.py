"""Rows of encoded features, each with its own number of tokens, read by number.

Rows lie in pieces: tensors in memory, memory-mapped files, or stretches of a file that are read plainly. Reading them
plainly matters where memory is bounded: the pages of a mapped file count as this process's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import Features

F = TypeVar("F", bound=Features)

BLOCK_BYTES = 512 * 2**20
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
        lengths = self.lengths[rows]
        self._starts[rows], self._piece_of[rows] = lengths.cumsum() - lengths, len(self._pieces)
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


class RowStore:
    """Rows of features, read by number.

    Args:
        embeds: one vector a row; ``None`` where rows have none.
        masked: the features come with a mask, though every token of them may be real.
    """

    def __init__(self, tokens: Column, embeds: Column | None = None, masked: bool = False) -> None:
        self.tokens, self.embeds, self.masked = tokens, embeds, masked

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``[rows]``."""
        return self.tokens.lengths

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        """See ``RowSource``."""
        self.tokens.read(rows.numpy(), tokens)
        if embeds is not None and self.embeds is not None:
            self.embeds.read(rows.numpy(), embeds.flatten(1)[:, None])

    def gather(self, rows: Tensor | Sequence[int], kind: type[F]) -> F:
        """Features of ``rows`` int64 ``[B]`` as precise as they are kept, padded with zeros to the longest of them.

        Each row is copied once, and no other row is read.
        """
        picked = torch.as_tensor(rows, dtype=torch.long)
        lengths = self.lengths[picked.numpy()]
        longest = max(1, int(lengths.max()))
        tokens = _empty((len(picked), longest, *self.tokens.shape), self.tokens.dtype)
        embeds = None if self.embeds is None else _empty((len(picked), *self.embeds.shape), self.embeds.dtype)
        self.read(picked, tokens, embeds)
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None]) if self.masked else None
        return kind(tokens, mask, embeds)

    def streamed(self, rows: Sequence[int], kind: type[F], masked: bool = False) -> StreamedFeatures[F]:
        """``gather(rows, kind).float()``, of which nothing is read before it is indexed.

        Args:
            masked: with a mask even where every token of every row is real.
        """
        picked = torch.tensor(rows, dtype=torch.long)
        lengths = torch.from_numpy(self.lengths)[picked]
        longest = max(1, int(lengths.max()))
        embeds = None if self.embeds is None else torch.empty(0, *self.embeds.shape)
        like = kind(torch.empty(0, longest, *self.tokens.shape), embeds=embeds)
        mask = torch.arange(longest) < lengths[:, None] if masked or self.masked else None
        return StreamedFeatures(like, self, picked, mask)


def words_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU as integers of its elements' size, of the same shape."""
    return tensor.detach().view(_WORDS[tensor.element_size()]).numpy()


def bytes_of(words: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(words.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  NumPy's stubs hide that it is a buffer


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # NumPy's memory comes in huge pages: half the time of torch.empty for batches of many megabytes
    return torch.from_numpy(np.empty(shape, f"i{dtype.itemsize}")).view(dtype)


class RowSource(Protocol):
    """Where the rows of streamed features come from."""

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        """Fill ``tokens [B, N, D]``, with zeros behind a row's tokens, and ``embeds [B, ...]``.

        Args:
            rows: int64 ``[B]``, numbers in the source.
        """


@dataclass(frozen=True)
class StreamedFeatures(Generic[F]):
    """Rows of features that an index brings into host memory, where they read as ``Features`` do.

    Args:
        like: such features without a row, ``tokens [0, N, D]`` on the CPU: N counts the padding of every row.
        rows: int64 ``[B]``, the numbers in ``source`` of these rows.
        mask: bool ``[B, N]`` (it stays in memory), or ``None``.
        block_bytes: what a reader of all rows should take at a time.
    """

    like: F
    source: RowSource
    rows: Tensor
    mask: Tensor | None = None
    block_bytes: int = BLOCK_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> F:
        """Rows by slice, list or LongTensor, read into host memory; a row index may repeat."""
        index = torch.as_tensor(index, dtype=torch.long) if isinstance(index, (list, tuple)) else index
        rows, like = self.rows[index], self.like
        tokens = like.tokens.new_empty(len(rows), *like.tokens.shape[1:])
        embeds = None if like.embeds is None else like.embeds.new_empty(len(rows), *like.embeds.shape[1:])
        self.source.read(rows, tokens, embeds)
        return type(like)(tokens, None if self.mask is None else self.mask[index], embeds)

    def only(self, rows: Sequence[int]) -> StreamedFeatures[F]:
        """Some of the rows; nothing is read."""
        index = torch.tensor(rows, dtype=torch.long)
        return replace(self, rows=self.rows[index], mask=None if self.mask is None else self.mask[index])

    def in_blocks_of(self, block_bytes: int) -> StreamedFeatures[F]:
        """The same rows for readers that take so many bytes at a time."""
        return replace(self, block_bytes=block_bytes)

    @property
    def row_shape(self) -> tuple[int, int]:
        """Tokens of every row, with its padding, and their width: ``(N, D)``."""
        return self.like.row_shape

    @property
    def row_bytes(self) -> int:
        """What one row takes in memory, without its mask."""
        tensors = [t for t in (self.like.tokens, self.like.embeds) if t is not None]
        return sum(t.shape[1:].numel() * t.element_size() for t in tensors)

    @property
    def nbytes(self) -> int:
        """What all rows would take in memory."""
        return len(self) * self.row_bytes + (0 if self.mask is None else self.mask.nbytes)

    @property
    def device(self) -> torch.device:
        """The device on which rows arrive: the host."""
        return torch.device("cpu")
