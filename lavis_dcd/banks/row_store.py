"""Rows of encoded features, each with its own number of tokens: written in any order, read by number."""

from __future__ import annotations

import errno
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf
from typing_extensions import override

from lavis_dcd.banks.columns import Column, FilePiece, bytes_of, empty, words_of
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.matching.features import Features

F = TypeVar("F", bound=Features)

BLOCK_BYTES = 512 * 2**20


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
        """Fill ``tokens`` and ``embeds``, see ``RowSource``."""
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
        tokens = empty((len(picked), longest, *self.tokens.shape), self.tokens.dtype)
        embeds = None if self.embeds is None else empty((len(picked), *self.embeds.shape), self.embeds.dtype)
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


class RowSource(Protocol):
    """The source of the rows of streamed features."""

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
        block_bytes: bytes that a reader of all rows should take at a time.
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
        """The bytes of one row in memory, without its mask."""
        tensors = [t for t in (self.like.tokens, self.like.embeds) if t is not None]
        return sum(t.shape[1:].numel() * t.element_size() for t in tensors)

    @property
    def nbytes(self) -> int:
        """The bytes of all rows in memory."""
        return len(self) * self.row_bytes + (0 if self.mask is None else self.mask.nbytes)

    @property
    def device(self) -> torch.device:
        """The device on which rows arrive: the host."""
        return torch.device("cpu")


class RowWriter(ABC, Generic[F]):
    """Room for a set's features, whose rows come in any order, each once.

    Args:
        count: rows of the set.
    """

    def __init__(self, count: int) -> None:
        self._here = torch.zeros(count, dtype=torch.bool)
        self._like: F | None = None  # without a row
        self._mask, self._masked = torch.zeros(count, 0, dtype=torch.bool), False

    def put(self, rows: Tensor, features: F) -> None:
        """Keep the features of ``rows``, int64 ``[b]`` on the CPU.

        Raises:
            ValueError: some parts have embeds and some have none.
            UserError: the disk is full.
        """
        if self._like is None:
            self._like = _without_rows(features, 0)
            self._begin(features)
        if (features.embeds is None) != (self._like.embeds is None):
            raise ValueError("some parts have embeds and some have none")
        self._put_mask(rows, features)
        self._write(rows, features)
        self._here[rows] = True

    def all(self) -> F | StreamedFeatures[F]:
        """The features of all rows.

        Raises:
            ValueError: a row has not come.
        """
        if self._like is None or not self._here.all():
            raise ValueError(f"{int((~self._here).sum())} of {len(self._here)} rows have not come")
        return self._all(self._like, self._mask if self._masked else None)

    def _put_mask(self, rows: Tensor, features: F) -> None:
        length, longest = features.tokens.shape[1], self._mask.shape[1]
        # parts of other lengths are padded, and padding has to be masked
        self._masked |= features.mask is not None or longest not in (0, length)
        if length > longest:
            self._mask = nnf.pad(self._mask, (0, length - longest))
        self._mask[rows, :length] = features.full_mask().cpu()

    @abstractmethod
    def _begin(self, features: F) -> None:
        """Make room for rows like these."""

    @abstractmethod
    def _write(self, rows: Tensor, features: F) -> None:
        """Keep tokens and embeds."""

    @abstractmethod
    def _all(self, like: F, mask: Tensor | None) -> F | StreamedFeatures[F]:
        """All rows, with their mask bool ``[count, N]``, ``None`` where every token of every row is real."""


def _without_rows(features: F, length: int) -> F:
    """New tensors of no row, and ``length`` tokens: a slice would keep all of ``features`` in memory."""
    embeds = None if features.embeds is None else features.embeds.new_empty(0, *features.embeds.shape[1:])
    return type(features)(features.tokens.new_empty(0, length, features.tokens.shape[2]), embeds=embeds)


class RowsInMemory(RowWriter[F]):
    """A set's features in one piece, without a second copy: what ``Features.cat`` makes of the parts, re-ordered.

    Rows take the length of the first part. A longer part that comes later has what is there copied; whoever brings
    the longest part first avoids that.
    """

    @override
    def _begin(self, features: F) -> None:
        count = len(self._here)
        self._tokens = features.tokens.new_empty((count, *features.tokens.shape[1:]))
        self._embeds = (
            None if features.embeds is None else features.embeds.new_empty((count, *features.embeds.shape[1:]))
        )

    @override
    def _write(self, rows: Tensor, features: F) -> None:
        length = features.tokens.shape[1]
        if length > self._tokens.shape[1]:
            self._grow(length)
        places = rows.to(self._tokens.device)
        self._tokens[:, :length][places] = features.tokens
        self._tokens[:, length:][places] = 0
        if self._embeds is not None and features.embeds is not None:
            self._embeds[rows.to(self._embeds.device)] = features.embeds

    @override
    def _all(self, like: F, mask: Tensor | None) -> F:
        return type(like)(self._tokens, None if mask is None else mask.to(self._tokens.device), self._embeds)

    def _grow(self, length: int) -> None:
        old, there = self._tokens, self._here.to(self._tokens.device)
        self._tokens = old.new_empty((len(old), length, old.shape[2]))
        for row in there.nonzero()[:, 0].tolist():
            self._tokens[row, : old.shape[1]] = old[row]
            self._tokens[row, old.shape[1] :] = 0


class SpilledRows(RowWriter[F]):
    """A set's features in a temporary file, read when they are indexed; there, rows keep their own lengths.

    Args:
        file: empty.
    """

    def __init__(self, file: _TemporaryFile, count: int, block_bytes: int) -> None:
        super().__init__(count)
        self._file, self._block_bytes = file, block_bytes

    @override
    def put(self, rows: Tensor, features: F) -> None:
        super().put(rows, features.to("cpu"))

    @override
    def _begin(self, features: F) -> None:
        count, embeds = len(self._here), features.embeds
        self._tokens = Column(count, features.tokens.shape[2:], features.tokens.dtype)
        self._embeds = None if embeds is None else Column(count, embeds.shape[1:], embeds.dtype)

    @override
    def _write(self, rows: Tensor, features: F) -> None:
        self._tokens.add(rows.numpy(), features.tokens.shape[1], self._file.append(features.tokens))
        if self._embeds is not None and features.embeds is not None:
            self._embeds.add(rows.numpy(), 1, self._file.append(features.embeds))

    @override
    def _all(self, like: F, mask: Tensor | None) -> StreamedFeatures[F]:
        store, rows = RowStore(self._tokens, self._embeds), torch.arange(len(self._here))
        return StreamedFeatures(_without_rows(like, self._mask.shape[1]), store, rows, mask, self._block_bytes)


class Spill:
    """A folder in which features may wait; leaving the ``with`` block frees the room of all of them.

    A file has no name: the system takes it away with its last handle, so that not even a killed process leaves one
    behind.

    Args:
        folder: on a disk with room; the system's temporary folder by default.
        block_bytes: bytes that a reader of all rows takes at a time.
    """

    def __init__(self, folder: Path | str | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self.folder, self.block_bytes = Path(folder or tempfile.gettempdir()), block_bytes
        self._files: WeakSet[_TemporaryFile] = WeakSet()

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the room; what was kept here cannot be read any more."""
        for file in list(self._files):
            file.close()

    def require(self, size: float) -> None:
        """Raise a ``UserError``, before any work, where the disk has no room for so many bytes."""
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
            handle = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  closed with its _TemporaryFile
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        file = _TemporaryFile(handle, self.folder)
        self._files.add(file)
        return SpilledRows(file, count, self.block_bytes)


class _TemporaryFile:
    """A file without a name, one piece behind the other."""

    def __init__(self, handle: Any, folder: Path) -> None:
        self.handle, self._folder, self._end = handle, folder, 0

    def append(self, vectors: Tensor) -> FilePiece:
        """Write ``vectors``, contiguous ones or a copy of them."""
        begin, view = self._end, bytes_of(words_of(vectors.contiguous()))
        self._end += len(view)
        self.handle.seek(begin)
        try:
            while view:
                view = view[self.handle.write(view) :]
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        return FilePiece(self._still_open, begin)

    def _still_open(self) -> AbstractContextManager[Any]:
        return nullcontext(self.handle)

    def close(self) -> None:
        """Free the room."""
        self.handle.close()


def cannot_write(folder: Path, error: OSError | str) -> UserError:
    """The error for features that do not fit into ``folder``, with the ways out."""
    why: object = error
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error.strerror or str(error)
    return UserError(
        f"run.eval_memory_mb: the features of an evaluation that take more cannot be kept in {folder}: {why}; make "
        "room, choose another disk with run.output_dir, or raise run.eval_memory_mb to keep them in memory"
    )
