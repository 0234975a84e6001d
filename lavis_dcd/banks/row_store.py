"""Rows of features in temporary files, for sets that shall not stay in memory.

A file has no name: the system takes it away with its last handle, so that not even a killed process leaves one
behind. It is read plainly, row by row; the pages of a memory-mapped one would count as this process's memory.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.matching.features import Features

# ----------------------------------------------------------------------------------------------------
# Rows of features written straight into their places as the encoders bring them, in any order.

F = TypeVar("F", bound=Features)


class RowsInMemory(Generic[F]):
    """A set's features in one piece, without a second copy: the same as ``Features.cat`` of the parts, re-ordered.

    Rows take the length of the first part. A longer part that comes later has what is there copied; whoever brings
    the longest part first avoids that.

    Args:
        count: rows of the set; each must come once.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kind: type[F] | None = None
        self._masks = MaskRows(count)
        self._tokens = torch.empty(0)
        self._embeds: Tensor | None = None
        self._here = torch.zeros(count, dtype=torch.bool)

    def put(self, rows: Tensor, part: F) -> None:
        """The features of ``rows``, int64 ``[b]`` on the CPU.

        Raises:
            ValueError: some parts have embeds and some have none.
        """
        self._masks.put(rows, part)
        if self._kind is None:
            self._begin(part)
        if (part.embeds is None) != (self._embeds is None):
            raise ValueError("some parts have embeds and some have none")
        length = part.tokens.shape[1]
        if length > self._tokens.shape[1]:
            self._grow(length)
        for tensor, own in ((self._tokens[:, :length], part.tokens), (self._embeds, part.embeds)):
            if tensor is not None:
                tensor[rows.to(tensor.device)] = own
        if length < self._tokens.shape[1]:
            self._tokens[:, length:][rows.to(self._tokens.device)] = 0
        self._here[rows] = True

    def all(self) -> F:
        """The features of all rows.

        Raises:
            ValueError: a row has not come.
        """
        if self._kind is None or not self._here.all():
            raise ValueError(f"{int((~self._here).sum())} of {self._count} rows have not come")
        mask = self._masks.all()
        return self._kind(self._tokens, None if mask is None else mask.to(self._tokens.device), self._embeds)

    def _begin(self, part: F) -> None:
        self._kind = type(part)
        self._tokens = part.tokens.new_empty((self._count, *part.tokens.shape[1:]))
        if part.embeds is not None:
            self._embeds = part.embeds.new_empty((self._count, *part.embeds.shape[1:]))

    def _grow(self, length: int) -> None:
        old, there = self._tokens, self._here.to(self._tokens.device)
        self._tokens = old.new_empty((self._count, length, old.shape[2]))
        for row in there.nonzero()[:, 0].tolist():
            self._tokens[row, : old.shape[1]] = old[row]
            self._tokens[row, old.shape[1] :] = 0


class MaskRows:
    """The masks of parts of any length, each in its rows; in memory, for they are small."""

    def __init__(self, count: int) -> None:
        self._mask = torch.zeros(count, 0, dtype=torch.bool)
        self._masked = False

    def put(self, rows: Tensor, part: Features) -> None:
        length, longest = part.tokens.shape[1], self._mask.shape[1]
        # parts of other lengths are padded, and padding has to be masked
        self._masked |= part.mask is not None or longest not in (0, length)
        if length > longest:
            self._mask = torch.nn.functional.pad(self._mask, (0, length - longest))
        self._mask[rows, :length] = part.full_mask().cpu()

    def all(self) -> Tensor | None:
        """bool ``[count, N]``, ``None`` where every token of every row is real."""
        return self._mask if self._masked else None

    @property
    def longest(self) -> int:
        return self._mask.shape[1]


# ----------------------------------------------------------------------------------------------------
# Features that are read when they are needed: rows on disk, or in a bank, that stand in memory block by block.

BLOCK_BYTES = 512 * 2**20


class RowSource(Protocol):
    """Where the rows come from."""

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        """Fills ``tokens [B, N, D]``, with zeros behind a row's own tokens, and ``embeds [B, ...]``.

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
        tokens, embeds = (
            None if t is None else t.new_empty(len(rows), *t.shape[1:]) for t in (like.tokens, like.embeds)
        )
        self.source.read(rows, tokens, embeds)
        return type(like)(tokens, None if self.mask is None else self.mask[index], embeds)

    def only(self, rows: Sequence[int]) -> StreamedFeatures[F]:
        """A part of the rows; nothing is read."""
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
        """Where rows arrive: the host."""
        return torch.device("cpu")


class Spill:
    """A folder in which features may wait; leaving the ``with`` block frees the room of all of them.

    Args:
        folder: on a disk with room; the system's temporary folder by default.
        block_bytes: what a reader of all rows takes at a time.
    """

    def __init__(self, folder: Path | str | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self.folder, self.block_bytes = Path(folder or tempfile.gettempdir()), block_bytes
        self._files: WeakSet[_RowFile] = WeakSet()

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the room; what was kept here cannot be read any more."""
        for file in list(self._files):
            file.close()

    def require(self, size: float) -> None:
        """Before any work: raises a ``UserError`` where the disk has no room for so many bytes."""
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        if size > free:
            raise cannot_write(self.folder, f"they need {size_in_words(size)}, {size_in_words(free)} are free")

    def rows(self, count: int) -> SpilledRows[Any]:
        """An empty file for that many rows.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            # unbuffered: what cannot be written fails here and now, not when the file is closed
            handle = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  closed with its _RowFile
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        file = _RowFile(handle, self.folder, count)
        self._files.add(file)
        return SpilledRows(file, count, self.block_bytes)


class SpilledRows(Generic[F]):
    """What ``rows.RowsInMemory`` is, on disk; rows keep their own lengths there, so none is ever copied.

    Args:
        file: empty.
        count: rows of the set; each must come once.
    """

    def __init__(self, file: _RowFile, count: int, block_bytes: int) -> None:
        self._file, self._count, self._block_bytes = file, count, block_bytes
        self._masks = MaskRows(count)
        self._like: F | None = None

    def put(self, rows: Tensor, part: F) -> None:
        """The features of ``rows``, int64 ``[b]``.

        Raises:
            ValueError: some parts have embeds and some have none.
            UserError: the disk is full.
        """
        part = part.to("cpu")
        if self._like is None:
            self._like = _without_rows(part, 0)
        if (part.embeds is None) != (self._like.embeds is None):
            raise ValueError("some parts have embeds and some have none")
        self._masks.put(rows, part)
        self._file.append(rows.numpy(), part)

    def all(self) -> StreamedFeatures[F]:
        """The features of all rows; nothing is read.

        Raises:
            ValueError: a row has not come.
        """
        missing = int((self._file.lengths == 0).sum())
        if self._like is None or missing:
            raise ValueError(f"{missing} of {self._count} rows have not come")
        like = _without_rows(self._like, self._masks.longest)
        return StreamedFeatures(like, self._file, torch.arange(self._count), self._masks.all(), self._block_bytes)


def _without_rows(part: F, length: int) -> F:
    """New tensors of no row, and ``length`` tokens: a slice would keep all of ``part`` in memory."""
    embeds = None if part.embeds is None else part.embeds.new_empty(0, *part.embeds.shape[1:])
    return type(part)(part.tokens.new_empty(0, length, part.tokens.shape[2]), embeds=embeds)


class _RowFile:
    """Rows one behind the other: a part's tokens, then its embeds."""

    def __init__(self, handle: IO[bytes], folder: Path, count: int) -> None:
        self._handle, self._folder, self._end = handle, folder, 0
        self.lengths = np.zeros(count, np.int64)
        self._tokens_at, self._embeds_at = np.zeros(count, np.int64), np.zeros(count, np.int64)

    def append(self, rows: np.ndarray, part: Features) -> None:
        self.lengths[rows] = part.tokens.shape[1]
        for places, tensor in ((self._tokens_at, part.tokens), (self._embeds_at, part.embeds)):
            if tensor is None or not len(tensor):
                continue
            places[rows] = self._end + np.arange(len(rows)) * (tensor.nbytes // len(rows))
            self._write(tensor)

    def _write(self, tensor: Tensor) -> None:
        view = memoryview(as_bytes(tensor.contiguous()))
        self._handle.seek(self._end)
        self._end += len(view)
        try:
            while view:
                view = view[self._handle.write(view) :]
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        picked = rows.numpy()
        lengths = self.lengths[picked].tolist()
        for row, at, length in zip(tokens, self._tokens_at[picked].tolist(), lengths, strict=True):
            read_at(self._handle, at, row[:length])
            row[length:] = 0
        if embeds is not None:
            for row, at in zip(embeds, self._embeds_at[picked].tolist(), strict=True):
                read_at(self._handle, at, row)

    def close(self) -> None:
        self._handle.close()


def read_at(handle: IO[bytes], place: int, tensor: Tensor) -> None:
    """Fills a contiguous ``tensor`` from the bytes at ``place``.

    Raises:
        UserError: the file ends before that, or cannot be read.
    """
    view = memoryview(as_bytes(tensor))
    handle.seek(place)
    while view:
        count = handle.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{getattr(handle, 'name', 'a file of features')} has become shorter; start again")
        view = view[count:]


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, uint8 ``[bytes]``."""
    return tensor.detach().flatten().view(torch.uint8).numpy()


def cannot_write(folder: Path, error: OSError | str) -> UserError:
    """Why features do not fit into ``folder``, and the ways out."""
    why = error
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error.strerror or str(error)
    return UserError(
        f"run.eval_memory_mb: the features of an evaluation that take more cannot be kept in {folder}: {why}; make "
        "room, choose another disk with run.output_dir, or raise run.eval_memory_mb to keep them in memory"
    )
