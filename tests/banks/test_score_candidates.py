from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lavis")
from lavis.datasets.datasets.base_dataset import ConcatDataset
from retrieval_sets import NumberedRows, captioned

from lavis_dcd.banks.score_bank import BankTable, ScoreBank
from lavis_dcd.banks.score_candidates import BankCandidates, Choice
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity

BOTH = ("image_to_text", "text_to_image")


def table(rows: dict[int, list[tuple[int, float]]], length: int, kept: int) -> BankTable:
    """Candidates and scores of some rows; every row's own score is 1."""
    candidates = torch.full((length, kept), -1, dtype=torch.int32)
    scores = torch.zeros(length, 1 + kept)
    scores[:, 0] = 1
    for row, found in rows.items():
        for column, (candidate, score) in enumerate(found):
            candidates[row, column], scores[row, 1 + column] = candidate, score
    return BankTable(candidates, scores)


def bank(**tables: BankTable) -> ScoreBank:
    return ScoreBank(Identity(), {}, tables)


def full(length: int, seed: int = 0) -> BankTable:
    """Every row's candidates are all rows in a random order, with descending scores."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.stack([torch.randperm(length, generator=generator) for _ in range(length)]).int()
    scores = torch.randn(length, length, generator=generator).sort(dim=1, descending=True).values
    return BankTable(candidates, torch.cat([torch.zeros(length, 1), scores], dim=1))


def around(dataset: Any, kept: ScoreBank, directions=BOTH, seed: int = 3, **choice: Any) -> BankCandidates:
    return BankCandidates(dataset, kept, directions, Choice(**choice), seed)


# rows: 0 and 1 of picture 0, 2 of picture 1, 3 and 4 of picture 2
FOUND = {0: [(3, 5.0), (1, 4.0), (2, 0.5), (4, 0.1)]}


def test_the_hardest_come_with_their_scores_and_ids():
    data = captioned(2, 1, 2)
    sample = around(
        data, bank(image_to_text=table(FOUND, 5, 4), text_to_image=table({0: [(2, 3.0), (3, 2.0)]}, 5, 2)),
        hard_negatives=2,
    )[0]  # fmt: skip
    # row 1 shows the same picture
    assert sample["candidate_text"] == ["P2 SAYS 0", "P1 SAYS 0"]
    assert sample["candidate_image_id"].tolist() == [2, 1]
    assert sample["image_to_text_scores"].tolist() == [1.0, 5.0, 0.5]
    assert [picture[0].item() for picture in sample["candidate_image"]] == [1.0, 2.0]
    assert sample["candidate_picture_id"].tolist() == [1, 2]
    assert sample["text_to_image_scores"].tolist() == [1.0, 3.0, 2.0]
    assert sample["image_to_text_scores"].dtype == torch.float32
    own = data[0]
    assert all(sample[key] is own[key] or torch.equal(sample[key], own[key]) if key == "image" else
               sample[key] == own[key] for key in own)  # fmt: skip


def test_the_margin_drops_likely_matches():
    kept = bank(image_to_text=table(FOUND, 5, 4))
    sample = around(captioned(2, 1, 2), kept, BOTH[:1], hard_negatives=2, margin=1.0)[0]
    assert sample["candidate_text"] == ["P1 SAYS 0", "P2 SAYS 1"]
    assert sample["image_to_text_scores"].tolist() == pytest.approx([1.0, 0.5, 0.1])


def test_what_is_missing_is_filled_with_ones_own_and_not_decoded():
    data = captioned(2, 1, 2)
    found = around(data, bank(text_to_image=table({0: [(3, 2.0)]}, 5, 4)), BOTH[1:], hard_negatives=3)
    sample = found[0]
    assert sample["candidate_picture_id"].tolist() == [2, 0, 0]
    assert data.decoded == [0, 3]
    assert "candidate_text" not in sample and "image_to_text_scores" not in sample
    data.decoded = []
    assert found[4]["candidate_picture_id"].tolist() == [2, 2, 2] and data.decoded == [4]


def test_pictures_of_a_direction_that_is_not_trained_are_not_decoded():
    data = captioned(2, 1, 2)
    kept = bank(image_to_text=table(FOUND, 5, 4), text_to_image=full(5))
    sample = around(data, kept, BOTH[:1])[0]
    assert data.decoded == [0] and "candidate_image" not in sample and "text_to_image_scores" not in sample


def test_null_keeps_all_in_order():
    sample = around(captioned(2, 1, 2), bank(image_to_text=table(FOUND, 5, 4)), BOTH[:1], hard_negatives=None)[0]
    assert sample["candidate_image_id"].tolist() == [2, 0, 1, 2]
    assert sample["image_to_text_scores"].tolist() == pytest.approx([1.0, 5.0, 1.0, 0.5, 0.1])


def test_random_draws_depend_on_seed_epoch_and_row_alone():
    data, kept = captioned(*[1] * 30), bank(image_to_text=full(30), text_to_image=full(30, 1))

    def drawn(seed: int = 3, epoch: int = 0) -> list[list[int]]:
        found = around(data, kept, seed=seed, hard_negatives=4, strategy="random")
        found.set_epoch(epoch)
        samples = [found[row] for row in range(30)]
        return [[*s["candidate_image_id"].tolist(), *s["candidate_picture_id"].tolist()] for s in samples]

    assert drawn() == drawn() and drawn() != drawn(seed=4) and drawn() != drawn(epoch=1)
    assert len({tuple(row) for row in drawn()}) == 30


def test_random_keeps_scores_aligned():
    kept = full(30)
    found = around(captioned(*[1] * 30), bank(image_to_text=kept), BOTH[:1], hard_negatives=4, strategy="random")
    for row in range(30):
        sample = found[row]
        score_of = dict(zip(kept.candidates[row].tolist(), kept.scores[row, 1:].tolist(), strict=True))
        expected = [score_of[i] for i in sample["candidate_image_id"].tolist()]
        assert sample["image_to_text_scores"][1:].tolist() == expected
        assert row not in sample["candidate_image_id"]


def loaded(dataset: BankCandidates, workers: int) -> list[dict[str, Any]]:
    return list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=dataset.collater))


def test_batches_are_flat_and_the_same_for_any_workers():
    kept = bank(image_to_text=full(8), text_to_image=full(8, 1))
    found = around(captioned(*[1] * 8), kept, hard_negatives=3, strategy="random")
    first = loaded(found, 0)
    batch, samples = first[1], [found[i] for i in range(4, 8)]
    assert batch["candidate_text"] == [text for s in samples for text in s["candidate_text"]]
    assert batch["candidate_image"].shape == (12, 3, 1, 1)
    assert batch["candidate_image"][:, 0, 0, 0].tolist() == batch["candidate_picture_id"].flatten().tolist()
    assert batch["candidate_image_id"].shape == (4, 3) and batch["text_to_image_scores"].shape == (4, 4)
    assert batch["image"].shape == (4, 3, 1, 1) and batch["text_input"] == [s["text_input"] for s in samples]
    for one, other in zip(first, loaded(found, 2), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key]) if isinstance(value, torch.Tensor) else None
            assert isinstance(value, torch.Tensor) or value == other[key]


def test_rows_of_a_feature_bank_stay_rows():
    class Rows(NumberedRows):
        def picture(self, number: int) -> int:
            return 100 + number

    found = around(captioned(*[1] * 4, cls=Rows), bank(text_to_image=full(4)), BOTH[1:], hard_negatives=2)
    batch = found.collater([found[0], found[1]])
    assert batch["candidate_image"].dtype == torch.int64 and batch["candidate_image"].shape == (4,)
    assert torch.equal(batch["candidate_image"] - 100, batch["candidate_picture_id"].flatten())


def test_views_stay_apart():
    class Viewed(NumberedRows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            return {**item, "image": {"student": item["image"], "teacher": -item["image"].expand(3, 2, 1)}}

    def both(caption: str) -> dict[str, str]:
        return {"student": caption, "teacher": caption.upper()}

    kept = bank(image_to_text=full(4), text_to_image=full(4))
    found = around(captioned(*[1] * 4, cls=Viewed, text=both), kept, hard_negatives=2)
    batch = found.collater([found[0], found[1]])
    assert {view: pictures.shape for view, pictures in batch["candidate_image"].items()} == {
        "student": (4, 3, 1, 1), "teacher": (4, 3, 2, 1),
    }  # fmt: skip
    assert [text.upper() for text in batch["candidate_text"]["student"]] == batch["candidate_text"]["teacher"]
    assert len(batch["candidate_text"]["student"]) == 4


def test_concatenations_count_rows_through():
    one, two = captioned(1, 2), captioned(2, name="q")
    two.img_ids = {name: number + 2 for name, number in two.img_ids.items()}
    kept = bank(image_to_text=table({0: [(4, 2.0)]}, 5, 1), text_to_image=table({0: [(3, 2.0)]}, 5, 1))
    sample = around(ConcatDataset([one, two]), kept, hard_negatives=1)[0]
    assert sample["candidate_text"] == ["Q0 SAYS 1"] and sample["candidate_image_id"].tolist() == [2]
    assert sample["candidate_image"][0][0].item() == 2.0


def test_a_bank_of_other_rows_or_directions_is_refused():
    data = captioned(2, 1, 2)
    with pytest.raises(UserError, match=r"has 6 rows for image_to_text, the job needs 5 .*lavis_dcd mine"):
        around(data, bank(image_to_text=full(6)), BOTH[:1])
    with pytest.raises(UserError, match="text_to_image"):
        around(data, bank(image_to_text=full(5)))
