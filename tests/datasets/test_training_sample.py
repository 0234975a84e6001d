import pickle

import pytest
import torch
from lavis.datasets.datasets.base_dataset import ConcatDataset
from retrieval_sets import captioned

from lavis_dcd.datasets.splits import distinct_image_ids
from lavis_dcd.datasets.training_sample import TrainingSample
from lavis_dcd.datasets.tree import WrappedSet, is_evaluation_set
from lavis_dcd.datasets.views import View, evaluation_view


def numbers(sample):
    return [int(sample[i]["image"].flatten()[0]) for i in range(len(sample))]


def test_a_sample_is_an_evaluation_set_of_distinct_pictures_with_their_own_captions():
    training = captioned(*[3, 1, 5, 2, 4, 0, 2, 3])
    sample = TrainingSample(WrappedSet(training), pictures=5, captions=2, seed=3)
    assert is_evaluation_set(sample) and len(sample) == 5
    drawn = numbers(sample)
    assert drawn == sorted(set(drawn))
    # a picture without captions is in no row, so that its number is the next one's
    names = [row["image"].removesuffix(".jpg") for row in sample.annotation]
    for number, name in enumerate(names):
        count = sum(row["image"] == f"{name}.jpg" for row in training.annotation)
        assert [sample.text[row] for row in sample.img2txt[number]] == [
            f"{name} says {j}".upper() for j in range(min(2, count))
        ]
        assert all(sample.txt2img[row] == number for row in sample.img2txt[number])
    assert sorted(sample.txt2img) == list(range(len(sample.text)))
    assert sample[2]["index"] == 2


def test_the_draw_depends_on_the_seed_alone():
    training = captioned(*[1] * 40)
    drawn = [numbers(TrainingSample(training, 10, 1, seed)) for seed in (0, 0, 1)]
    torch.manual_seed(5)
    assert drawn[0] == drawn[1] == numbers(TrainingSample(training, 10, 1, 0)) != drawn[2]


def test_pictures_are_those_of_all_sets_of_a_concatenation_one_each():
    one, two = captioned(2, 1, 1), captioned(1, 1, name="q")
    distinct_image_ids([one, two])
    sample = TrainingSample(ConcatDataset([one, two]), 5, 5, 0)
    assert [row["image"] for row in sample.annotation] == ["p0.jpg", "p1.jpg", "p2.jpg", "q0.jpg", "q1.jpg"]
    assert len(sample.text) == 6
    twice = ConcatDataset([captioned(1, 1), captioned(2, 1)])  # the same files
    distinct_image_ids(twice.datasets)
    assert len(TrainingSample(twice, 2, 5, 0).text) == 5
    with pytest.raises(ValueError, match="2 pictures, fewer than 3"):
        TrainingSample(twice, 3, 5, 0)


def test_the_readers_may_be_others_than_the_training_sets():
    training = captioned(1, 1)
    training.__class__ = type(
        "Read", (type(training),), {"__getitem__": lambda self, row: {"image": self.vis_processor(row)}}
    )
    sample = TrainingSample(training, 2, 1, 0, vis_processor=lambda row: 10 * row, text_processor=str.title)
    assert [sample[i]["image"] for i in range(2)] == [0, 10] and sample.text == ["P0 Says 0", "P1 Says 0"]
    assert training[1]["image"] == 1  # as before
    seen = evaluation_view(sample, View(vis_eval=lambda row: -row, text_eval=str.upper))
    assert [seen[i]["image"] for i in range(2)] == [0, -1] and seen.text == ["P0 SAYS 0", "P1 SAYS 0"]


def test_a_sample_goes_to_other_processes():
    sample = TrainingSample(captioned(1, 2, text=str), 2, 2, 0)
    sample._plain["train"].vis_processor = None  # a lambda of the stub
    assert pickle.loads(pickle.dumps(sample)).text == sample.text


def test_a_set_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="train \\(list\\) has not LAVIS's shape"):
        TrainingSample([1, 2], 1, 1, 0)
