from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lavis.datasets.datasets.base_dataset import ConcatDataset
from retrieval_sets import captioned
from torch.utils.data import DataLoader

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.random_captions import RandomCaptions


def drawn(dataset: RandomCaptions) -> list[list[str]]:
    return [dataset[index]["candidate_text"] for index in range(len(dataset))]


def loaded(dataset: RandomCaptions, workers: int) -> list[dict[str, Any]]:
    return list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=dataset.collater))


def test_a_sample_keeps_its_own_and_gains_candidates():
    source = captioned(2, 3, 1, 4)
    dataset = RandomCaptions(source, count=5, seed=1)
    assert len(dataset) == 10
    for index in range(10):
        sample = dataset[index]
        assert all(torch.as_tensor(sample[key] == value).all() for key, value in source[index].items())
        assert len(sample["candidate_text"]) == 5
        assert sample["candidate_image_id"].shape == (5,)
        assert sample["candidate_image_id"].dtype == torch.int64


def test_candidates_are_distinct_rows_of_other_pictures_with_their_ids():
    source = captioned(2, 3, 1, 4, 5)
    ids = {row["caption"].upper(): source.img_ids[row["image_id"]] for row in source.annotation}
    dataset = RandomCaptions(source, count=10, seed=3)  # the fifth picture leaves exactly ten others
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            sample = dataset[index]
            texts = sample["candidate_text"]
            assert len(set(texts)) == 10
            assert sample["candidate_image_id"].tolist() == [ids[text] for text in texts]
            assert sample["image_id"] not in sample["candidate_image_id"].tolist()


def test_every_caption_of_another_picture_is_equally_likely():
    dataset = RandomCaptions(captioned(*[1] * 9), count=2, seed=0)
    counts: Counter[str] = Counter()
    for epoch in range(1000):
        dataset.set_epoch(epoch)
        counts.update(dataset[4]["candidate_text"])
    assert len(counts) == 8
    # 2000 draws over 8 captions: 250 each, standard deviation about 14
    assert all(190 < count < 310 for count in counts.values())


def test_the_draw_follows_seed_epoch_and_index_alone():
    one, two = RandomCaptions(captioned(*[2] * 40), 6, seed=5), RandomCaptions(captioned(*[2] * 40), 6, seed=5)
    assert drawn(one) == drawn(two)
    assert one[7]["candidate_text"] == drawn(one)[7]  # whatever was drawn before
    one.set_epoch(1)
    assert drawn(one) != drawn(two)
    two.set_epoch(1)
    assert drawn(one) == drawn(two)
    assert drawn(RandomCaptions(captioned(*[2] * 40), 6, seed=6)) != drawn(RandomCaptions(captioned(*[2] * 40), 6, 5))


def test_any_number_of_loader_workers_draws_the_same():
    dataset = RandomCaptions(captioned(*[2] * 6), 3, seed=2)
    dataset.set_epoch(4)
    alone, shared = loaded(dataset, 0), loaded(dataset, 2)
    assert [batch["candidate_text"] for batch in alone] == [batch["candidate_text"] for batch in shared]
    for one, two in zip(alone, shared, strict=True):
        assert torch.equal(one["candidate_image_id"], two["candidate_image_id"])


def test_a_batch_has_its_candidates_row_by_row():
    dataset = RandomCaptions(captioned(*[2] * 6), 3, seed=2)
    samples = [dataset[i] for i in (0, 3, 8, 11)]
    batch = dataset.collater(samples)
    assert batch["image"].shape == (4, 3, 1, 1)
    assert batch["text_input"] == [sample["text_input"] for sample in samples]
    assert batch["image_id"].tolist() == [sample["image_id"] for sample in samples]
    assert batch["candidate_text"] == [text for sample in samples for text in sample["candidate_text"]]
    assert batch["candidate_image_id"].shape == (4, 3)
    assert batch["candidate_image_id"].dtype == torch.int64
    assert torch.equal(batch["candidate_image_id"][2], samples[2]["candidate_image_id"])
    assert "candidate_text" in samples[0]  # the samples themselves stay whole


def test_captions_come_from_all_sets_of_a_concatenation():
    one, two = captioned(3, 3, name="p"), captioned(3, name="q")
    two.img_ids = {"q0": 2}
    dataset = RandomCaptions(ConcatDataset([one, two]), count=6, seed=0)
    assert len(dataset) == 9
    for index, own in enumerate(["P0"] * 3 + ["P1"] * 3 + ["Q0"] * 3):
        expected = {f"{name} SAYS {j}" for name in ("P0", "P1", "Q0") if name != own for j in range(3)}
        assert set(dataset[index]["candidate_text"]) == expected


def test_the_epoch_is_passed_to_the_set_inside():
    source = captioned(*[1] * 6)
    inner = RandomCaptions(source, 1, seed=0)
    RandomCaptions(inner, 2, seed=1).set_epoch(9)
    assert inner.epoch == 9


@pytest.mark.parametrize(("captions", "count"), [((2, 1, 1), 3), ((4, 2), 3), ((3,), 1)])
def test_too_few_captions_of_other_pictures_are_told(captions, count):
    with pytest.raises(UserError) as caught:
        RandomCaptions(captioned(*captions), count, seed=0)
    most, total = max(captions), sum(captions)
    assert caught.value.faults == [
        f"model.candidates.image_to_text.count: {count} captions of other pictures cannot be drawn from {total} "
        f"captions (one picture has {most} of them); lower it or add data"
    ]
    if total > most:
        RandomCaptions(captioned(*captions), total - most, seed=0)
