"""Rows of features of any length without their padding: in memory, or memory-mapped from a folder of shards."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lavis_dcd.banks.row_store import StreamedFeatures, read_at
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_path, atomic_write, clear_leftovers
from lavis_dcd.matching.features import Features

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Features)

FORMAT = 3  # of the folder, and of how pictures are read; part of a bank's key
SHARD_BYTES = 64 * 2**20  # held back in memory before it is written; what an interrupted build repeats at most
KINDS = ("images", "texts")
META = "meta.json"
# Tensors are copied as plain words of their size, since NumPy has no bfloat16.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    def cat(cls, parts: Sequence[Shard]) -> Shard:
        embeds = [part.embeds for part in parts if part.embeds is not None]
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.stack([part.masked for part in parts]).amax(dim=0),
            torch.cat(embeds) if embeds else None,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def named(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.named().values())


class RowStore:
    """Rows of several shards, read by number.

    Args:
        shards: at least one.
        source: folder and kind of shards that lie on disk, so that other processes open them by themselves.

    ``lengths``, ``shard_of`` and ``start_of`` int64 ``[rows]``: a row's tokens, its shard, its first token in it.
    """

    def __init__(self, shards: Sequence[Shard], source: tuple[Path, str] | None = None) -> None:
        self.shards, self.source = list(shards), source
        self.lengths = torch.cat([shard.lengths for shard in self.shards]).numpy()
        counts = [len(shard) for shard in self.shards]
        self.masked = any(bool(shard.masked) for shard in self.shards) or len(np.unique(self.lengths)) > 1
        self.shard_of = np.repeat(np.arange(len(counts)), counts)
        self._place = np.concatenate([np.arange(count) for count in counts])
        self.start_of = np.concatenate([(s.lengths.cumsum(0) - s.lengths).numpy() for s in self.shards])
        self._tokens = [_words(shard.tokens) for shard in self.shards]

    def __reduce__(self) -> Any:
        return (open_store, self.source) if self.source else (RowStore, (self.shards,))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def gather(self, rows: Tensor | Sequence[int], kind: type[F]) -> F:
        """Features of ``rows`` int64 ``[B]`` as precise as they are kept, padded with zeros to the longest of them.

        Each row is copied once, and no other row is read.
        """
        picked = np.asarray(rows, dtype=np.int64)
        lengths, shards, starts = self.lengths[picked], self.shard_of[picked], self.start_of[picked]
        longest = max(1, int(lengths.max()))
        first = self.shards[0].tokens
        # NumPy's memory comes in huge pages: half the time of torch.empty for batches of many megabytes
        words = np.empty((len(picked), longest, first.shape[1]), self._tokens[0].dtype)
        where = zip(words, shards.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        for row, shard, start, length in where:
            row[:length] = self._tokens[shard][start : start + length]
            row[length:] = 0
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None]) if self.masked else None
        return kind(torch.from_numpy(words).view(first.dtype), mask, self.embeds(picked))

    def embeds(self, picked: np.ndarray) -> Tensor | None:
        """The vectors of rows int64 ``[B]``; ``None`` where rows have none."""
        kept, shards = self.shards[0].embeds, self.shard_of[picked]
        if kept is None:
            return None
        found = torch.empty(len(picked), *kept.shape[1:], dtype=kept.dtype)
        for shard in np.unique(shards):
            here = torch.from_numpy(shards == shard)
            found[here] = self.shards[shard].embeds[torch.from_numpy(self._place[picked])[here]]
        return found


def _words(tokens: Tensor) -> np.ndarray:
    return tokens.view(_WORDS[tokens.element_size()]).numpy()


def open_store(folder: Path, kind: str) -> RowStore:
    """The finished rows ``kind`` of a folder, memory-mapped: nothing is read but their lengths."""
    return RowStore([_opened(path) for path in shard_files(folder, kind)], (folder, kind))


def shard_files(folder: Path, kind: str) -> list[Path]:
    """The shards of ``kind`` in their order, up to the first gap."""
    found: list[Path] = []
    while (path := folder / f"{kind}-{len(found):05d}.safetensors").is_file():
        found.append(path)
    return found


def _opened(path: Path) -> Shard:
    with safe_open(str(path), "pt") as handle:
        # only the tokens stay mapped; the small columns are read often
        columns = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  no mapping, though it looks so
    return Shard(**{name: kept if name == "tokens" else kept.clone() for name, kept in columns.items()})


def is_finished(folder: Path) -> bool:
    """Whether ``folder`` holds a whole bank: ``meta.json``, written last, and every file as long as it says."""
    try:
        files = json.loads((folder / META).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Writes ``meta.json``: ``facts`` for people, and the files with their sizes."""
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
        self._kept: list[Shard] = []
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
        """Rows that follow those before."""
        self._waiting.append(Shard.of(features))
        if sum(part.nbytes for part in self._waiting) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Keep what is waiting.

        Raises:
            UserError: the disk is full.
        """
        if not self._waiting:
            return
        shard = Shard.cat(self._waiting)
        self._waiting = []
        self.rows += len(shard)
        if self._folder is None:
            self._kept.append(shard)
            return
        path = self._folder / f"{self._kind}-{self._written:05d}.safetensors"
        self._written += 1
        _save(shard, path)

    def store(self) -> RowStore:
        """All rows."""
        self.flush()
        return RowStore(self._kept) if self._folder is None else open_store(self._folder, self._kind)


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
    """Inside, no other process that asks builds ``folder``; one that comes later waits.

    A lock of the operating system, so that it goes when its process does. Systems without such locks go unlocked.
    """
    try:
        import fcntl
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


# ----------------------------------------------------------------------------------------------------
# Rows of a feature bank for evaluation, read as they are needed; banks on disk without mapping them.
#
# Mapped pages count as this process's memory as long as the system has room, so that reading a whole bank through them
# would look, and on some clusters be counted, as if it were loaded.

ROWS_IN_MEMORY = 64  # gathered at a time from a bank that is in memory


def stream(store: RowStore, rows: Sequence[int], kind: type[F], masked: bool = False) -> StreamedFeatures[F]:
    """``store.gather(rows, kind).float()``, of which nothing is read before it is indexed.

    Args:
        masked: with a mask even where every token of every row is real.
    """
    picked = torch.tensor(rows, dtype=torch.long)
    lengths = torch.from_numpy(store.lengths)[picked]
    longest = max(1, int(lengths.max()))
    embeds = store.shards[0].embeds
    like = kind(
        torch.empty(0, longest, store.shards[0].tokens.shape[1]),
        embeds=None if embeds is None else torch.empty(0, *embeds.shape[1:]),
    )
    mask = torch.arange(longest) < lengths[:, None] if masked or store.masked else None
    source = _RowsInMemory(store, kind) if store.source is None else _RowsOnDisk(store, *store.source)
    return StreamedFeatures(like, source, picked, mask)


class _RowsInMemory:
    def __init__(self, store: RowStore, kind: type[Features]) -> None:
        self._store, self._kind = store, kind

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        for start in range(0, len(rows), ROWS_IN_MEMORY):
            here = slice(start, start + ROWS_IN_MEMORY)
            found = self._store.gather(rows[here], self._kind)
            length = found.tokens.shape[1]
            tokens[here, :length] = found.tokens
            tokens[here, length:] = 0
            if embeds is not None:
                embeds[here] = found.embeds


class _RowsOnDisk:
    def __init__(self, store: RowStore, folder: Path, kind: str) -> None:
        self._store = store
        self._files = [(path, _tokens_at(path)) for path in shard_files(folder, kind)]

    def read(self, rows: Tensor, tokens: Tensor, embeds: Tensor | None) -> None:
        picked = rows.numpy()
        shards = self._store.shard_of[picked]
        for shard in np.unique(shards):
            self._read_shard(int(shard), np.flatnonzero(shards == shard), picked, tokens)
        if embeds is not None:
            embeds.copy_(self._store.embeds(picked))

    def _read_shard(self, shard: int, places: np.ndarray, picked: np.ndarray, tokens: Tensor) -> None:
        (path, begin), kept = self._files[shard], self._store.shards[shard].tokens
        of_token = kept.shape[1] * kept.element_size()
        longest = max(1, int(self._store.lengths[picked[places]].max()))
        words = torch.empty(longest, kept.shape[1], dtype=kept.dtype)
        try:
            with path.open("rb", buffering=0) as handle:
                for place in places.tolist():
                    row = picked[place]
                    length = int(self._store.lengths[row])
                    read_at(handle, begin + int(self._store.start_of[row]) * of_token, words[:length])
                    tokens[place, :length] = words[:length]
                    tokens[place, length:] = 0
        except OSError as error:
            raise UserError(
                f"run.cache_features: {path} cannot be read any more ({error}); start again, or set "
                "run.cache_features=off"
            ) from error


def _tokens_at(path: Path) -> int:
    """Where the tokens begin in a safetensors file: the length of its header, the header, the tensors."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return 8 + length + json.loads(handle.read(length))["tokens"]["data_offsets"][0]
