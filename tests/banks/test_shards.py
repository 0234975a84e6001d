"""Rows in shards against the features they were made of."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from lavis_dcd.banks import shards
from lavis_dcd.banks.bank_records import UNFINISHED, BankRecords, read_finished
from lavis_dcd.banks.shards import Shard, ShardedRows, ShardWriter, open_shard, open_store, shard_files
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import AbsentError, DamagedError, Identity
from lavis_dcd.matching.features import ImageFeatures, TextFeatures

IDENTITY = Identity({"the encoders": "e"}, {"train": "r"}, {"train": "p"})
MANY = 10**6


def ragged(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> ImageFeatures:
    """Rows of so many tokens, in a batch with masked rubbish behind them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), max(lengths) + 2, 3, generator=generator).to(dtype)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return ImageFeatures(tokens, mask, torch.randn(len(lengths), 2, 5, generator=generator).to(dtype))


def writer_to(folder: Path | None) -> ShardWriter:
    return ShardWriter(None if folder is None else BankRecords(folder, IDENTITY), "images", MANY)


def written(folder: Path | None, *batches: ImageFeatures) -> ShardedRows:
    writer = writer_to(folder)
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
    writer = writer_to(tmp_path)
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


def test_a_folder_is_finished_when_its_manifest_is_there(tmp_path):
    written(tmp_path, ragged([2]), ragged([3]))
    with pytest.raises(AbsentError):
        read_finished(tmp_path, IDENTITY)
    assert (tmp_path / UNFINISHED).is_file()
    BankRecords(tmp_path, IDENTITY).finish({"pictures": 2})
    manifest = read_finished(tmp_path, IDENTITY)
    assert manifest.facts == {"pictures": 2}
    assert list(manifest.files) == ["images-00000.safetensors", "images-00001.safetensors"]
    assert not (tmp_path / UNFINISHED).exists()
    manifest.check_files(tmp_path)
    with pytest.raises(DamagedError, match=r"manifest.json is of another bank: the rows of train, the pictures of val"):
        read_finished(tmp_path, Identity(IDENTITY.settings, {"train": "R"}, {**IDENTITY.pictures, "val": "p"}))
    BankRecords(tmp_path, IDENTITY)  # whoever mends it begins by taking its mark away
    with pytest.raises(AbsentError):
        read_finished(tmp_path, IDENTITY)


def flip(path: Path, at: int = -5) -> None:
    """Another byte, under the same size and time."""
    content, facts = bytearray(path.read_bytes()), path.stat()
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("fault", ["cut", "changed", "gone", "a folder", "not recorded", "of another bank"])
def test_a_writer_goes_on_behind_whole_shards_and_forgets_the_rest(tmp_path, caplog, fault):
    caplog.set_level(logging.INFO)
    written(tmp_path, *(ragged([4], seed) for seed in range(3)))
    second = tmp_path / "images-00001.safetensors"
    if fault == "cut":
        second.write_bytes(second.read_bytes()[:-1])
    elif fault == "changed":
        flip(second)
    elif fault in ("gone", "a folder"):
        second.unlink()
        if fault == "a folder":
            second.mkdir()
    elif fault == "not recorded":  # killed between a file and its record
        records = BankRecords(tmp_path, IDENTITY)
        for number in (1, 2):
            records._files.pop(f"images-{number:05d}.safetensors")
        records._write()
    else:
        written(tmp_path / "other", *(ragged([4], seed) for seed in range(5, 8)))
        (tmp_path / "other" / second.name).replace(second)
    (tmp_path / ".images-00003.safetensors.x.tmp").write_bytes(b"half")
    writer = writer_to(tmp_path)
    assert writer.rows == 1
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["images-00000.safetensors", UNFINISHED]
    (said,) = [record.message for record in caplog.records]
    assert "images-00001.safetensors" in said and "made again, and what follows it" in said
    writer.add(ragged([2], 7))
    store = writer.store()
    assert len(store) == 2 and torch.equal(store.gather([1], ImageFeatures).tokens, ragged([2], 7).tokens[:, :2])


def test_more_rows_than_will_come_are_not_taken(tmp_path):
    written(tmp_path, ragged([4, 4]), ragged([4]))
    assert ShardWriter(BankRecords(tmp_path, IDENTITY), "images", 2).rows == 2


def test_records_that_were_changed_stand_for_nothing(tmp_path, caplog):
    written(tmp_path, ragged([4]))
    flip(tmp_path / UNFINISHED)
    assert writer_to(tmp_path).rows == 0
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert UNFINISHED in record.message and "what it stands for is made again" in record.message


@pytest.mark.parametrize(
    "tensors",
    [
        {"tokens": torch.zeros(4, 3)},
        {"tokens": torch.zeros(4, 3), "lengths": torch.tensor([4]), "masked": torch.tensor([0]), "more": torch.ones(1)},
        {"tokens": torch.zeros(4, 3), "lengths": torch.tensor([5]), "masked": torch.tensor([0])},
        {"tokens": torch.zeros(4, 3), "lengths": torch.tensor([5, -1]), "masked": torch.tensor([0])},
        {"tokens": torch.zeros(0, 3), "lengths": torch.tensor([2**62] * 4), "masked": torch.tensor([0])},
        {"tokens": torch.zeros(4, 3), "lengths": torch.tensor([4.0]), "masked": torch.tensor([0])},
        {"tokens": torch.zeros(4, 3, dtype=torch.int8), "lengths": torch.tensor([4]), "masked": torch.tensor([0])},
        {"tokens": torch.zeros(4), "lengths": torch.tensor([4]), "masked": torch.tensor([0])},
        {"tokens": torch.zeros(4, 3), "lengths": torch.tensor([4]), "masked": torch.tensor([0, 1])},
        {
            "tokens": torch.zeros(4, 3),
            "lengths": torch.tensor([4]),
            "masked": torch.tensor([0]),
            "embeds": torch.ones(2, 3),
        },
    ],
)
def test_tensors_that_are_no_rows_are_refused(tmp_path, tensors):
    shards.save_file(tensors, str(tmp_path / "images-00000.safetensors"))
    with pytest.raises(DamagedError, match=r"images-00000.safetensors is not of the form that this version writes"):
        open_shard(tmp_path / "images-00000.safetensors")
    with pytest.raises(UserError, match=r"cannot be read any more \(images-00000.* start again"):
        open_store(tmp_path, "images")


def test_a_shard_that_changes_while_it_is_read_plainly_is_told(tmp_path):
    store = written(tmp_path, ragged([4, 4]))
    rows = store.streamed([0, 1], ImageFeatures)
    assert torch.equal(rows[:].tokens, store.gather([0, 1], ImageFeatures).tokens)
    path = tmp_path / "images-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"images-00000.safetensors cannot be read any more \(it has changed"):
        rows[:]
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        rows[:]
    with pytest.raises(UserError, match=r"\(0 of 1 files are there\)"):
        store.streamed([0], ImageFeatures)


def test_a_full_disk_leaves_what_was_whole(tmp_path, monkeypatch):
    writer = writer_to(tmp_path / "bank")
    writer.add(ragged([4]))
    writer.flush()

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    writer.add(ragged([4]))
    with pytest.raises(UserError, match=r"images-00001.safetensors cannot be written to .*No space left.*LAVIS_CACHE"):
        writer.flush()
    assert sorted(p.name for p in (tmp_path / "bank").iterdir()) == ["images-00000.safetensors", UNFINISHED]
    assert writer_to(tmp_path / "bank").rows == 1


def test_a_disk_that_really_takes_no_more(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the write itself fails, and safetensors wraps the system's error."""
    resource = pytest.importorskip("resource")
    written(tmp_path, ragged([4]))
    writer = writer_to(tmp_path)
    writer.add(ragged([4000] * 10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"images-00001.safetensors cannot be written to .*LAVIS_CACHE"):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images-00000.safetensors", UNFINISHED]
    assert writer_to(tmp_path).rows == 1
