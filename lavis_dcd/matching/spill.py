"""Rows of features in temporary files, for sets that shall not stay in memory.

A file has no name: the system takes it away with its last handle, so that not even a killed process leaves one
behind. It is read plainly, row by row; the pages of a memory-mapped one would count as this process's memory.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any, Generic, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.matching.features import Features
from lavis_dcd.matching.rows import MaskRows
from lavis_dcd.matching.streamed import BLOCK_BYTES, StreamedFeatures

F = TypeVar("F", bound=Features)


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
