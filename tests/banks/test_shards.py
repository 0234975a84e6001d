"""Rows in shards against the features they were made of."""

from __future__ import annotations

import errno
import json
import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch

from lavis_dcd.banks import shards
from lavis_dcd.banks.shards import (
    Shard,
    ShardedRows,
    ShardWriter,
    finish,
    is_finished,
    one_writer,
    open_store,
    shard_files,
)
from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


def ragged(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> ImageFeatures:
    """Rows of so many tokens, in a batch with masked rubbish behind them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), max(lengths) + 2, 3, generator=generator).to(dtype)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return ImageFeatures(tokens, mask, torch.randn(len(lengths), 2, 5, generator=generator).to(dtype))


def written(folder: Path | None, *batches: ImageFeatures) -> ShardedRows:
    writer = ShardWriter(folder, "images")
    for batch in batches:
        writer.add(batch)
        writer.flush()
    return writer.store()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_any_length_come_back_in_any_order(tmp_path, on_disk, dtype):
    batches = [ragged([2, 5, 1], 0, dtype), ragged([3], 1, dtype), ragged([4, 4], 2, dtype)]
    store = written(tmp_path if on_disk else None, *batches)
    singles = [batch[[i]] for batch in batches for i in range(len(batch))]
    rows = [5, 0, 3, 3, 1, 2]
    got = store.gather(torch.tensor(rows), ImageFeatures)
    assert isinstance(got, ImageFeatures) and got.tokens.shape == (6, 5, 3) and got.tokens.dtype == dtype
    for place, row in enumerate(rows):
        one = singles[row].trimmed()
        length = one.tokens.shape[1]
        assert got.mask[place].tolist() == [i < length for i in range(5)]
        assert torch.equal(got.tokens[place, :length], one.tokens[0]) and not got.tokens[place, length:].any()
        assert torch.equal(got.embeds[place], one.embeds[0])
    assert store.gather([2], TextFeatures).tokens.shape == (1, 1, 3)  # padded to the longest that is asked for
    assert len(store) == 6 and len(list(tmp_path.glob("images-*"))) == (3 if on_disk else 0)


def test_rows_of_one_length_have_no_mask_unless_the_encoder_gave_one():
    plain = ImageFeatures(torch.randn(2, 4, 3))
    assert written(None, plain).gather([1, 0], ImageFeatures).mask is None
    full = ImageFeatures(plain.tokens, torch.ones(2, 4, dtype=torch.bool))
    assert written(None, full).gather([1], ImageFeatures).mask.all()
    shorter = ImageFeatures(torch.randn(1, 3, 3))
    assert written(None, plain, shorter).gather([0, 2], ImageFeatures).mask.sum(1).tolist() == [4, 3]


@pytest.mark.parametrize("mask", [[[False, True]], [[True, False, True]]])
def test_padding_in_front_or_between_is_refused(mask):
    features = TextFeatures(torch.zeros(1, len(mask[0]), 2), torch.tensor(mask))
    with pytest.raises(UserError, match="padding in front of or between the tokens"):
        Shard.of(features)


def test_shards_are_cut_by_size(tmp_path, monkeypatch):
    one = Shard.of(ragged([4])).nbytes
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * one)
    writer = ShardWriter(tmp_path, "images")
    for seed in range(8):
        writer.add(ragged([4], seed))
    assert len(shard_files(tmp_path, "images")) == 2  # the rest waits
    store = writer.store()
    assert [len(shard) for shard in store.shards] == [3, 3, 2]
    assert store.nbytes == sum(shard.nbytes for shard in store.shards)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_mapped_and_other_processes_map_them_themselves(tmp_path):
    written(tmp_path, *(ragged([100] * 50, seed) for seed in range(4)))
    store = open_store(tmp_path, "images")
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert "images-00003.safetensors" in Path("/proc/self/maps").read_text()
    again = pickle.loads(sent).gather([199, 0], ImageFeatures)
    assert torch.equal(again.tokens, store.gather([199, 0], ImageFeatures).tokens)
    in_memory = written(None, ragged([2, 1]))
    assert torch.equal(pickle.loads(pickle.dumps(in_memory)).shards[0].tokens, in_memory.shards[0].tokens)


def test_a_folder_is_finished_when_every_file_is_as_long_as_it_says(tmp_path):
    written(tmp_path, ragged([2]), ragged([3]))
    assert not is_finished(tmp_path)
    finish(tmp_path, {"pictures": 2})
    assert is_finished(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["pictures"] == 2 and list(meta["files"]) == ["images-00000.safetensors", "images-00001.safetensors"]
    (tmp_path / "images-00001.safetensors").unlink()
    assert not is_finished(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    assert not is_finished(tmp_path)


def test_a_writer_goes_on_behind_whole_shards_and_forgets_the_rest(tmp_path):
    written(tmp_path, *(ragged([4], seed) for seed in range(3)))
    second = tmp_path / "images-00001.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    (tmp_path / ".images-00003.safetensors.x.tmp").write_bytes(b"half")
    writer = ShardWriter(tmp_path, "images")
    assert writer.rows == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images-00000.safetensors"]
    writer.add(ragged([2], 7))
    store = writer.store()
    assert len(store) == 2 and torch.equal(store.gather([1], ImageFeatures).tokens, ragged([2], 7).tokens[:, :2])


def test_a_full_disk_leaves_what_was_whole(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path / "bank", "images")
    writer.add(ragged([4]))
    writer.flush()

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    writer.add(ragged([4]))
    with pytest.raises(UserError, match=r"images-00001.safetensors cannot be written to .*No space left.*LAVIS_CACHE"):
        writer.flush()
    assert [path.name for path in (tmp_path / "bank").iterdir()] == ["images-00000.safetensors"]


def test_one_process_writes_and_the_others_wait(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    told, inside, order = threading.Event(), threading.Event(), []
    monkeypatch.setattr(shards.log, "info", lambda *words: told.set())

    def second() -> None:
        with one_writer(tmp_path / "bank"):
            order.append("second")
            inside.set()

    other = threading.Thread(target=second, daemon=True)
    with one_writer(tmp_path / "bank"):
        other.start()
        assert told.wait(30)
        order.append("first")
        assert not inside.is_set()
    other.join(30)
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), one_writer(tmp_path / "bank"):
        raise ZeroDivisionError
    with one_writer(tmp_path / "bank"):  # free again
        pass
