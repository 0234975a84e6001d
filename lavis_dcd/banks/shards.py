"""The shards of a feature bank: rows of features without their padding, in memory or in a folder of files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from lavis_dcd.banks.bank_records import BankRecords, cannot_write
from lavis_dcd.banks.columns import Column, FilePiece, TensorPiece
from lavis_dcd.banks.row_store import RowStore, StreamedFeatures
from lavis_dcd.banks.tensor_files import faults_as_damage, mapped, places, written
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import DamagedError
from lavis_dcd.matching.features import Features

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Features)

SHARD_BYTES = 64 * 2**20  # held back in memory before it is written; what an interrupted build repeats at most
KINDS = ("images", "texts")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Shard:
    """Some rows, one behind the other.

    ``tokens [S, D]`` floating point, ``lengths [n]`` int64 (their sum is S), ``embeds [n, ...]`` or ``None``;
    ``masked`` int64 ``[1]``: whether the features came with a mask.
    """

    tokens: Tensor
    lengths: Tensor
    masked: Tensor
    embeds: Tensor | None = None

    @classmethod
    def of(cls, features: Features) -> Shard:
        """The real tokens of ``features``.

        Raises:
            UserError: a row has padding before its last token.
        """
        mask = features.mask
        embeds = None if features.embeds is None else features.embeds.clone()
        if mask is None:
            count, length, _ = features.tokens.shape
            return cls(features.tokens.flatten(0, 1), torch.full((count,), length), torch.tensor([0]), embeds)
        if (mask.int().diff(dim=1) > 0).any():
            raise UserError(
                "run.cache_features: the encoders leave padding in front of or between the tokens "
                f"({type(features).__name__}), which the cache cannot keep; set run.cache_features=off"
            )
        return cls(features.tokens[mask], mask.sum(dim=1), torch.tensor([1]), embeds)

    @classmethod
    def cat(cls, shards: Sequence[Shard]) -> Shard:
        """The rows of all shards in one."""
        embeds = [shard.embeds for shard in shards if shard.embeds is not None]
        return cls(
            torch.cat([shard.tokens for shard in shards]),
            torch.cat([shard.lengths for shard in shards]),
            torch.stack([shard.masked for shard in shards]).amax(dim=0),
            torch.cat(embeds) if embeds else None,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def named(self) -> dict[str, Tensor]:
        """The tensors as a file holds them."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def check(self) -> None:
        """Compare the tensors with each other; raises a ``ValueError`` where they are no rows of features."""
        floats = [tensor for tensor in (self.tokens, self.embeds) if tensor is not None]
        counts = [self.lengths, self.masked]
        if any(t.dtype not in _FLOATS for t in floats) or any(t.dtype != torch.int64 for t in counts):
            raise ValueError("tensors of other types than features have")
        if self.tokens.dim() != 2 or self.lengths.dim() != 1 or self.masked.shape != (1,):
            raise ValueError("tensors of other shapes than features have")
        counted = bool((self.lengths >= 0).all()) and bool((self.lengths <= len(self.tokens)).all())
        if not counted or int(self.lengths.sum()) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens are not those of {len(self)} rows")
        if self.embeds is not None and (self.embeds.dim() < 2 or len(self.embeds) != len(self)):
            raise ValueError(f"embeds of {tuple(self.embeds.shape)} for {len(self)} rows")

    @property
    def row_kind(self) -> tuple[Any, ...]:
        """Types and widths, which all shards of a store share."""
        embeds = None if self.embeds is None else (self.embeds.dtype, *self.embeds.shape[1:])
        return self.tokens.dtype, self.tokens.shape[1], embeds

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.named().values())


class ShardedRows(RowStore):
    """Rows of several shards, read by number.

    Args:
        shards: at least one.
        source: folder and kind of shards that lie on disk, so that other processes open them by themselves.
    """

    def __init__(self, shards: Sequence[Shard], source: tuple[Path, str] | None = None) -> None:
        self.shards, self.source = list(shards), source
        self._states = [_state(path.stat()) for path in shard_files(*source)] if source else []
        count, first, begin = sum(map(len, shards)), shards[0], 0
        tokens = Column(count, first.tokens.shape[1:], first.tokens.dtype)
        embeds = None if first.embeds is None else Column(count, first.embeds.shape[1:], first.embeds.dtype)
        for shard in shards:
            rows = np.arange(begin, begin + len(shard))
            tokens.add(rows, shard.lengths.numpy(), TensorPiece(shard.tokens))
            if embeds is not None and shard.embeds is not None:
                embeds.add(rows, 1, TensorPiece(shard.embeds.flatten(1)))
            begin += len(shard)
        masked = any(bool(shard.masked) for shard in shards) or len(np.unique(tokens.lengths)) > 1
        super().__init__(tokens, embeds, masked)

    def __reduce__(self) -> Any:
        return (open_store, self.source) if self.source else (ShardedRows, (self.shards,))

    @property
    def nbytes(self) -> int:
        """The bytes of all shards, with the rows' lengths."""
        return sum(shard.nbytes for shard in self.shards)

    @override
    def streamed(self, rows: Sequence[int], kind: type[F], masked: bool = False) -> StreamedFeatures[F]:
        # Mapped pages count as this process's memory as long as the system has room, so that reading a whole bank
        # through them would look, and on some clusters be counted, as if it were loaded.
        if self.source is None:
            return super().streamed(rows, kind, masked)
        paths = shard_files(*self.source)
        if len(paths) != len(self._states):
            raise UserError(_changed(self.source[0], f"{len(paths)} of {len(self._states)} files are there"))
        files = [
            FilePiece(partial(_opened_again, path, state), _tokens_at(path))
            for path, state in zip(paths, self._states, strict=True)
        ]
        return RowStore(self.tokens.with_pieces(files), self.embeds, self.masked).streamed(rows, kind, masked)


def _state(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_size, facts.st_mtime_ns


@contextmanager
def _opened_again(path: Path, state: tuple[int, int]) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb", buffering=0) as handle:
            if _state(os.fstat(handle.fileno())) != state:
                raise UserError(_changed(path, "it has changed since the start"))
            yield handle
    except OSError as error:
        raise UserError(_changed(path, str(error))) from error


def _changed(path: Path, why: str) -> str:
    return f"run.cache_features: {path} cannot be read any more ({why}); start again, or set run.cache_features=off"


def _tokens_at(path: Path) -> int:
    """The byte at which the tokens begin in a file."""
    try:
        return places(path)["tokens"].begin
    except (DamagedError, KeyError) as error:
        raise UserError(_changed(path, str(error))) from error


def open_store(folder: Path, kind: str) -> ShardedRows:
    """The finished rows ``kind`` of a folder, memory-mapped: nothing is read but their lengths.

    Their bytes are not compared with the bank's manifest; :func:`~lavis_dcd.banks.feature_bank.build_feature_bank`
    does so once, and what changes in a mapped file afterwards is not noticed.

    Raises:
        UserError: there are none, or a file is not whole.
    """
    try:
        shards = [open_shard(path) for path in shard_files(folder, kind)]
        return ShardedRows(one_kind(shards), (folder, kind))
    except (DamagedError, OSError) as damage:
        raise UserError(_changed(folder, str(damage))) from damage


def shard_files(folder: Path, kind: str) -> list[Path]:
    """The shards of ``kind`` in their order, up to the first gap."""
    paths: list[Path] = []
    while (path := shard_file(folder, kind, len(paths))).is_file():
        paths.append(path)
    return paths


def shard_file(folder: Path, kind: str, number: int) -> Path:
    """The name of one shard."""
    return folder / f"{kind}-{number:05d}.safetensors"


def open_shard(path: Path) -> Shard:
    """The rows of a file, their tokens memory-mapped.

    Raises:
        DamagedError: it is no whole shard.
    """
    columns = mapped(path)
    with faults_as_damage(path.name):
        # only the tokens stay mapped; the small columns are read often
        shard = Shard(**{name: column if name == "tokens" else column.clone() for name, column in columns.items()})
        shard.check()
    return shard


def one_kind(shards: Sequence[Shard]) -> Sequence[Shard]:
    """The shards, as long as they are of one bank.

    Raises:
        DamagedError: there is none, or rows of some are of another type or width.
    """
    if len({shard.row_kind for shard in shards}) != 1:
        raise DamagedError("there are no rows" if not shards else "the shards are of several types or widths")
    return shards


class ShardWriter:
    """Rows of one kind on their way into shards of about ``SHARD_BYTES``, each written whole or not at all.

    Args:
        records: of the folder; ``None`` keeps the shards in memory.
        kind: "images" or "texts".
        most: rows that will come, with those of an interrupted build.
    """

    def __init__(self, records: BankRecords | None, kind: str, most: int) -> None:
        self._records, self._kind, self._most = records, kind, most
        self._waiting: list[Shard] = []
        self._written = 0
        self._finished: list[Shard] = []
        self.rows = 0  # complete and kept, at the start those of an interrupted build
        if records is not None:
            self._resume(records)

    def _resume(self, records: BankRecords) -> None:
        """Count the shards that are as they were written, up to the first that is not; that and all others go."""
        kinds: set[tuple[Any, ...]] = set()
        while (path := self._next(records)) in records or path.exists():
            try:
                records.check(path)
                shard = open_shard(path)
                if len(kinds | {shard.row_kind}) > 1 or self.rows + len(shard) > self._most:
                    raise DamagedError(f"{path.name} does not fit the others")
            except DamagedError as damage:
                level = logging.WARNING if path in records else logging.INFO  # killed before it was recorded
                log.log(level, "%s: %s; it is made again, and what follows it", records.folder, damage)
                break
            kinds.add(shard.row_kind)
            self.rows += len(shard)
            self._written += 1
        whole = shard_files(records.folder, self._kind)[: self._written]
        for stale in records.folder.glob(f"{self._kind}-*"):
            if stale not in whole:
                records.forget(stale)

    def _next(self, records: BankRecords) -> Path:
        return shard_file(records.folder, self._kind, self._written)

    def add(self, features: Features) -> None:
        """Take rows that follow those before."""
        self._waiting.append(Shard.of(features))
        if sum(shard.nbytes for shard in self._waiting) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting.

        Raises:
            UserError: the disk is full.
        """
        if not self._waiting:
            return
        shard = Shard.cat(self._waiting)
        self._waiting = []
        self.rows += len(shard)
        if self._records is None:
            self._finished.append(shard)
            return
        path = self._next(self._records)
        self._written += 1
        _save(shard, path)
        self._records.add(path)

    def store(self) -> ShardedRows:
        """All rows."""
        self.flush()
        return ShardedRows(self._finished) if self._records is None else open_store(self._records.folder, self._kind)


def _save(shard: Shard, path: Path) -> None:
    with written(path, partial(cannot_write, path.parent, path.name)) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in shard.named().items()}, str(temporary))
