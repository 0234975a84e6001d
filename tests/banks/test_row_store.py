"""Rows in memory, in temporary files and in shards: what is read, what is left behind, what is told without room."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lavis_dcd.banks import shards
from lavis_dcd.banks.bank_records import BankRecords
from lavis_dcd.banks.row_store import RowsInMemory, Spill
from lavis_dcd.banks.shards import ShardedRows, ShardWriter
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


def open_files() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_there(fd))


def _is_there(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def images(count: int = 3, embeds: bool = False) -> ImageFeatures:
    return ImageFeatures(torch.randn(count, 2, 4), embeds=torch.randn(count, 5) if embeds else None)


def put(spill: Spill) -> None:
    rows = spill.rows(3)
    rows.put(torch.arange(3), images())
    rows.all()[:]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("fails", [False, True])
def test_files_go_with_the_block_even_after_an_error(tmp_path: Path, fails: bool) -> None:
    held = []

    def use() -> None:
        with Spill(tmp_path) as spill:
            rows = spill.rows(3)
            rows.put(torch.arange(3), images())
            held.append(rows.all())  # somebody's traceback, say
            assert any(str(tmp_path) in name for name in open_files())
            if fails:
                raise RuntimeError("in the middle")

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            use()
    else:
        use()
    assert not any(str(tmp_path) in name for name in open_files()) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed file"):
        held[0][:1]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_a_file_goes_with_its_features(tmp_path: Path) -> None:
    with Spill(tmp_path) as spill:
        put(spill)
        assert not any(str(tmp_path) in name for name in open_files())


def full(count: int):
    """A file on a disk that is full after so many bytes."""
    written = 0

    def write(view: memoryview) -> int:
        nonlocal written
        room = min(len(view), count - written)
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += room
        return room

    return lambda **_: SimpleNamespace(write=write, seek=lambda place: place, close=lambda: None)


def test_a_full_disk_is_told_with_the_folder_and_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", full(40))
    with pytest.raises(UserError) as told, Spill(tmp_path) as spill:
        put(spill)
    (line,) = told.value.faults
    assert line.startswith("run.eval_memory_mb: ") and f"{tmp_path}: the disk is full; " in line
    monkeypatch.setattr(tempfile, "TemporaryFile", full(96))  # three rows fit to the byte
    with Spill(tmp_path) as spill:
        spill.rows(3).put(torch.arange(3), images())


def test_a_folder_that_cannot_serve_is_told(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "none")
    for use in (lambda: spill.rows(3), lambda: spill.require(1)):
        with pytest.raises(UserError, match=r"run\.eval_memory_mb: .*none: No such file or directory; make room"):
            use()


def test_room_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2_500_000_000))
    Spill(tmp_path).require(2.4e9)
    with pytest.raises(UserError, match=r"they need 9\.0 GB, 2\.5 GB are free; make room"):
        Spill(tmp_path).require(9e9)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_parts_with_and_without_embeds_do_not_mix(place: str, tmp_path: Path) -> None:
    with Spill(tmp_path) as spill:
        rows = RowsInMemory(6) if place == "memory" else spill.rows(6)
        rows.put(torch.arange(3), images(embeds=True))
        with pytest.raises(ValueError, match="some parts have embeds and some have none"):
            rows.put(torch.arange(3, 6), images())
        with pytest.raises(ValueError, match="3 of 6 rows have not come"):
            rows.all()


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    with Spill(tmp_path) as spill:
        rows = spill.rows(3)
        rows.put(torch.arange(3), images())
        found = rows.all()
        rows._file.handle.truncate(20)
        with pytest.raises(UserError, match="has become shorter"):
            found[:]


def store_of(folder: Path | None, dtype: torch.dtype, embeds: bool, monkeypatch: pytest.MonkeyPatch) -> ShardedRows:
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)  # several files
    writer = ShardWriter(None if folder is None else BankRecords(folder, Identity()), "texts", 100)
    generator = torch.Generator().manual_seed(0)
    for length in (5, 2, 3, 7):
        lengths = torch.tensor([length, 1 + length // 2])
        mask = torch.arange(length) < lengths[:, None]
        tokens = torch.randn(2, length, 4, generator=generator).to(dtype)
        vectors = torch.randn(2, 3, generator=generator).to(dtype) if embeds else None
        writer.add(TextFeatures(tokens, mask, vectors))
    return writer.store()


@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_rows_are_those_that_the_bank_gathers(place, dtype, embeds, tmp_path, monkeypatch) -> None:
    store = store_of(tmp_path if place == "disk" else None, dtype, embeds, monkeypatch)
    assert len(store.shards) > 1
    rows = [6, 0, 3, 3, 7, 1]
    expected = store.gather(rows, TextFeatures).float()
    found = store.streamed(rows, TextFeatures)
    assert found.nbytes == expected.nbytes
    for index in (slice(None), [4, 1, 1], torch.tensor([5]), slice(2, 4)):
        got, wanted = found[index], expected[index]
        assert got.tokens.dtype == torch.float32 and torch.equal(got.tokens, wanted.tokens)
        assert torch.equal(got.mask, wanted.mask)
        assert (got.embeds is None) == (not embeds)
        if embeds:
            assert torch.equal(got.embeds, wanted.embeds)


def test_a_mask_where_it_is_asked_for() -> None:
    writer = ShardWriter(None, "texts", 3)
    writer.add(TextFeatures(torch.randn(3, 2, 4)))
    store = writer.store()
    assert store.streamed([0, 2], TextFeatures)[:].mask is None
    assert torch.equal(store.streamed([0, 2], TextFeatures, masked=True)[:].mask, torch.ones(2, 2, dtype=torch.bool))


def test_a_bank_that_went_away_is_told(tmp_path, monkeypatch) -> None:
    found = store_of(tmp_path, torch.float16, False, monkeypatch).streamed([0, 5], TextFeatures)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"run\.cache_features: .*texts-0000.*cannot be read any more"):
        found[:]
