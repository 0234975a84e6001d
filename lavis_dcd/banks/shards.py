"""The shards of a feature bank: rows of features without their padding, in memory or in a folder of files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from lavis_dcd.banks.columns import Column, FilePiece, TensorPiece
from lavis_dcd.banks.row_store import RowStore, StreamedFeatures
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_path, atomic_write, clear_leftovers
from lavis_dcd.matching.features import Features

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Features)

FORMAT = 3  # of the folder, and of how pictures are read; part of a bank's key
SHARD_BYTES = 64 * 2**20  # held back in memory before it is written; what an interrupted build repeats at most
KINDS = ("images", "texts")
META = "meta.json"


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
        files = [FilePiece(partial(_opened_again, path), _tokens_at(path)) for path in shard_files(*self.source)]
        return RowStore(self.tokens.with_pieces(files), self.embeds, self.masked).streamed(rows, kind, masked)


@contextmanager
def _opened_again(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb", buffering=0) as handle:
            yield handle
    except OSError as error:
        raise UserError(
            f"run.cache_features: {path} cannot be read any more ({error}); start again, or set run.cache_features=off"
        ) from error


def _tokens_at(path: Path) -> int:
    """The byte at which the tokens begin in a safetensors file: the length of its header, the header, the tensors."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return 8 + length + json.loads(handle.read(length))["tokens"]["data_offsets"][0]


def open_store(folder: Path, kind: str) -> ShardedRows:
    """The finished rows ``kind`` of a folder, memory-mapped: nothing is read but their lengths."""
    return ShardedRows([_opened(path) for path in shard_files(folder, kind)], (folder, kind))


def shard_files(folder: Path, kind: str) -> list[Path]:
    """The shards of ``kind`` in their order, up to the first gap."""
    paths: list[Path] = []
    while (path := folder / f"{kind}-{len(paths):05d}.safetensors").is_file():
        paths.append(path)
    return paths


def _opened(path: Path) -> Shard:
    with safe_open(str(path), "pt") as handle:
        # only the tokens stay mapped; the small columns are read often
        columns = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  no mapping, though it looks so
    return Shard(**{name: column if name == "tokens" else column.clone() for name, column in columns.items()})


def is_finished(folder: Path) -> bool:
    """Return whether ``folder`` holds a whole bank: ``meta.json``, written last, and every file as long as it says."""
    try:
        files = json.loads((folder / META).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``meta.json``: ``facts`` for people, and the files with their sizes."""
    files = {path.name: path.stat().st_size for kind in KINDS for path in shard_files(folder, kind)}
    with atomic_write(folder / META, "w") as handle:
        json.dump({"format": FORMAT, **facts, "files": files}, handle, indent=1)


class ShardWriter:
    """Rows of one kind on their way into shards of about ``SHARD_BYTES``, each written whole or not at all.

    Args:
        folder: ``None`` keeps the shards in memory.
        kind: "images" or "texts".
    """

    def __init__(self, folder: Path | None, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._waiting: list[Shard] = []
        self._written = 0
        self._finished: list[Shard] = []
        self.rows = 0  # complete and kept, at the start those of an interrupted build
        if folder is not None:
            self._resume(folder)

    def _resume(self, folder: Path) -> None:
        clear_leftovers(folder)
        for path in shard_files(folder, self._kind):
            try:
                self.rows += len(_opened(path))
            except (SafetensorError, TypeError):
                log.warning("%s is damaged and will be written again", path)
                break
            self._written += 1
        for path in folder.glob(f"{self._kind}-*"):
            if path not in shard_files(folder, self._kind)[: self._written]:
                path.unlink()

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
        if self._folder is None:
            self._finished.append(shard)
            return
        path = self._folder / f"{self._kind}-{self._written:05d}.safetensors"
        self._written += 1
        _save(shard, path)

    def store(self) -> ShardedRows:
        """All rows."""
        self.flush()
        return ShardedRows(self._finished) if self._folder is None else open_store(self._folder, self._kind)


def _save(shard: Shard, path: Path) -> None:
    try:
        with atomic_path(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in shard.named().items()}, str(partial))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"run.cache_features: {path.name} cannot be written to {path.parent} ({error}); what is there serves the "
            "next start. Make room, or choose another place with LAVIS_CACHE"
        ) from error


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from building ``folder`` meanwhile; one that comes later waits.

    The lock is one of the operating system, so that it goes when its process does. Systems without such locks go
    unlocked.
    """
    try:
        import fcntl  # noqa: PLC0415  there is none on Windows
    except ImportError:
        yield
        return
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = path.open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process keeps features in %s: waiting for it", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        # whoever had it before may have taken the file away: then this lock is on a file that nobody else can find
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                break
        handle.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()
