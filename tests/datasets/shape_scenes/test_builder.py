from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.pictures import load_picture

pytest.importorskip("lavis")

from lavis.common.registry import registry

SMALL = {"build_info": {"seed": 3, "image_size": 32, "scenes": {"train": 24, "val": 6, "test": 7}}}


def _config(**changes):
    builder = registry.get_builder_class("shape_scenes")
    default = OmegaConf.load(builder.default_config_path()).datasets.shape_scenes
    return OmegaConf.merge(default, SMALL, changes)


def _build(**changes):
    return registry.get_builder_class("shape_scenes")(_config(**changes)).build_datasets()


@pytest.fixture(scope="module")
def datasets():
    return _build()


def test_training_has_one_row_per_caption_and_captions_of_a_scene_share_the_id(datasets):
    train = datasets["train"]
    assert len(train) == 24 * 5
    first, fifth, sixth = train[0], train[4], train[5]
    assert first["image"].shape == (3, 64, 64) and first["image"].dtype == torch.float32
    assert isinstance(first["text_input"], str) and first["text_input"] != fifth["text_input"]
    assert first["image_id"] == fifth["image_id"] != sixth["image_id"]
    assert torch.equal(first["image"], fifth["image"])
    assert len(train.img_ids) == 24


def test_evaluation_has_the_shape_of_lavis(datasets):
    test = datasets["test"]
    assert len(test) == 7 and len(test.text) == 35 and len(test.image) == 7
    assert test.image[0] == "scene_000000"
    assert set(test[3]) == {"image", "index"} and test[3]["index"] == 3
    assert test.img2txt[1] == [5, 6, 7, 8, 9] and all(test.txt2img[t] == 1 for t in test.img2txt[1])


def test_the_same_seed_draws_the_same_pictures_and_another_does_not(datasets):
    again, other = _build(), _build(build_info={"seed": 4})
    for split, dataset in datasets.items():
        assert np.array_equal(again[split].pictures, dataset.pictures)
        assert again[split].annotation == dataset.annotation
        assert not np.array_equal(other[split].pictures, dataset.pictures)


def test_a_test_scene_looks_the_same_whatever_the_number_of_training_scenes(datasets):
    fewer = _build(build_info={"scenes": {"train": 6}})
    assert np.array_equal(fewer["test"].pictures, datasets["test"].pictures)
    assert fewer["test"].text == datasets["test"].text


def test_pictures_as_a_person_sees_them(datasets):
    for dataset in (datasets["train"], datasets["test"]):
        picture = load_picture(dataset, 6)
        assert picture.mode == "RGB" and picture.size == (32, 32)
    assert np.array_equal(np.asarray(load_picture(datasets["train"], 6)), datasets["train"].pictures[1])


def test_rows_name_their_family(datasets):
    families = [row["family"] for row in datasets["test"].annotation]
    assert len(set(families)) == 2


def test_batches_come_through_a_loader_with_workers(datasets):
    loader = torch.utils.data.DataLoader(
        datasets["train"], batch_size=8, num_workers=2, collate_fn=datasets["train"].collater
    )
    batches = list(loader)
    assert len(batches) == 15 and batches[0]["image"].shape == (8, 3, 64, 64)
    assert batches[0]["text_input"] == [row["caption"] for row in datasets["train"].annotation[:8]]


def test_all_faults_of_the_section_at_once():
    builder = registry.get_builder_class("shape_scenes")
    section = {"build_info": {"sed": 0, "image_size": "big", "scenes": {"train": 0}}}
    lines = builder.config_faults(section, "datasets.shape_scenes")
    assert any("datasets.shape_scenes.build_info.sed" in line and "seed" in line for line in lines)
    assert any("image_size" in line for line in lines)
    assert any("at least 1" in line for line in lines)
    assert builder.config_faults(_config(), "x") == []
    with pytest.raises(UserError, match="between 24 and 512"):
        _build(build_info={"image_size": 8})
    with pytest.raises(UserError, match="at most"):
        _build(build_info={"scenes": {"train": 10**6}})
    with pytest.raises(UserError, match="negative"):
        _build(build_info={"seed": -1})


def test_lavis_load_dataset_knows_it():
    from lavis.datasets.builders import dataset_zoo

    assert "shape_scenes" in dataset_zoo.get_names()
