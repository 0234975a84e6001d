"""A bank's rows read as they are needed against the rows that the bank gathers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavis_dcd.banks import shards
from lavis_dcd.banks.shards import ShardedRows, ShardWriter
from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import TextFeatures


def store_of(folder: Path | None, dtype: torch.dtype, embeds: bool, monkeypatch: pytest.MonkeyPatch) -> ShardedRows:
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)  # several files
    writer = ShardWriter(folder, "texts")
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
    writer = ShardWriter(None, "texts")
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
