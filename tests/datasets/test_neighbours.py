"""Tables of neighbours: what they refuse, and the pictures that share a caption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lavis_dcd.datasets.neighbours import NeighbourTable, pictures_with_equal_captions


def test_pictures_with_equal_captions_are_kept_apart():
    of_row = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    captions = ["A dog runs.", "two cats", "a dog, runs", "a dog", "Two  Cats!", "a DOG runs", "..."]
    assert pictures_with_equal_captions(of_row, captions) == [[0, 1, 3], [0, 3]]
    assert pictures_with_equal_captions(torch.tensor([0, 1]), ["...", "!"]) == []  # no words to compare


def test_a_table_survives_its_file(tmp_path):
    table = NeighbourTable.of(
        torch.tensor([0, 0, 1, 2]), torch.tensor([[1, 2], [0, -1], [1, 0]], dtype=torch.int32), [[0, 2]]
    )
    table.save(tmp_path / "table.safetensors")
    again = NeighbourTable.load(tmp_path / "table.safetensors")
    assert again.digest() == table.digest() and torch.equal(again.nearest, table.nearest)
    other = replace(table, apart=torch.tensor([0, 1], dtype=torch.int32))
    assert other.digest() != table.digest()
    (tmp_path / "table.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no neighbours of pictures"):
        NeighbourTable.load(tmp_path / "table.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"picture_of_row": torch.tensor([0, 3])},
        {"picture_of_row": torch.tensor([0, 1], dtype=torch.int32)},
        {"nearest": torch.tensor([[1], [5]], dtype=torch.int32)},
        {"nearest": torch.tensor([[1], [-2]], dtype=torch.int32)},
        {"apart": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"apart_starts": torch.tensor([0, 3, 2])},
        {"apart_starts": torch.tensor([1, 2])},
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(change):
    table = NeighbourTable.of(torch.tensor([0, 1]), torch.tensor([[1], [0]], dtype=torch.int32), [[0, 1]])
    with pytest.raises(ValueError, match=r"neighbour|picture|groups"):
        replace(table, **change)
