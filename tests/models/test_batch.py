"""A training batch parsed once: what each part comes from, and what is refused."""

import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.features import TextFeatures
from lavis_dcd.models.batch import Batch, distinct


def samples(**more):
    return {
        "image": torch.zeros(2, 3, 4, 4),
        "text_input": ["a red ring", "two stars"],
        "image_id": torch.tensor([5, 9]),
        **more,
    }


def test_a_plain_batch_has_neither_candidates_nor_a_place_in_a_job():
    batch = Batch.of(samples())
    assert (batch.size, batch.pictures, batch.owners) == (2, [5, 9], [5, 9])
    assert not batch.texts_drawn and not batch.pictures_drawn and not batch.bank_scores
    assert (batch.step, batch.progress) == (0, 1.0)
    assert batch.view().texts == ["a red ring", "two stars"] and not batch.has_view("teacher")


def test_candidates_stand_behind_the_samples():
    scores = torch.randn(2, 3)
    batch = Batch.of(
        samples(
            candidate_text=["b", "c", "d", "e"],
            candidate_image_id=torch.tensor([[1, 2], [3, 4]]),
            candidate_image=torch.ones(4, 3, 4, 4),
            candidate_picture_id=torch.tensor([[6, 7], [8, 10]]),
            image_to_text_scores=scores,
        )
    )
    assert batch.owners == [5, 9, 1, 2, 3, 4] and batch.pictures == [5, 9, 6, 7, 8, 10]
    assert batch.view().texts[2:] == ["b", "c", "d", "e"] and len(batch.view().candidate_images) == 4
    assert list(batch.bank_scores) == ["image_to_text"] and torch.equal(batch.bank_scores["image_to_text"], scores)


def test_the_step_is_counted_over_the_job():
    batch = Batch.of(samples(epoch=2, iters=3, num_iters_per_epoch=10, progress=0.25))
    assert (batch.step, batch.progress) == (23, 0.25)


def test_a_view_falls_back_on_the_main_one():
    batch = Batch.of(samples(text_input={"student": ["a", "b"], "teacher": ["A", "B"]}))
    assert batch.view().texts == ["a", "b"]
    assert batch.view("teacher").texts == ["A", "B"] and batch.has_view("teacher")
    assert batch.view("teacher.1").texts == ["a", "b"] and not batch.has_view("teacher.1")
    assert batch.for_lavis()["text_input"] == ["a", "b"]


def test_kept_features_serve_the_main_view_alone():
    batch = Batch.of(samples(text_features=TextFeatures(torch.zeros(2, 1, 4))))
    assert len(batch.view().text_features) == 2
    with pytest.raises(UserError, match=r"run.cache_features: the kept features serve the student's"):
        batch.view("teacher")


def test_rows_number_first_occurrences():
    assert distinct(["b", "a", "b", "c", "a"]) == ([0, 1, 3], [0, 1, 0, 2, 1])
