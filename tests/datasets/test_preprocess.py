from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor, BlipImageTrainProcessor
from lavis.processors.clip_processors import ClipImageEvalProcessor
from omegaconf import OmegaConf
from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.views import MatcherViews, View, build_view, preprocess_of
from lavis_dcd.processors.captions import DcdCaptionProcessor
from lavis_dcd.processors.images import DcdImageEvalProcessor, DcdImageTrainProcessor

ALBEF = {"arch": "albef_retrieval", "model_type": "coco"}
CLIP = {"arch": "clip", "model_type": "ViT-B-16"}
SMALL = {"vis_processor": {"eval": {"name": "dcd_image_eval", "image_size": 32}}}
PICTURE = Image.new("RGB", (40, 30), (10, 200, 30))


def test_the_processors_of_a_model_type():
    found = preprocess_of(ALBEF)
    assert found["vis_processor"]["eval"] == {"name": "blip_image_eval", "image_size": 384}
    assert found["text_processor"] == {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}}
    assert preprocess_of(CLIP) == {"vis_processor": {"eval": {"name": "clip_image_eval", "image_size": 224}}}
    assert preprocess_of(ALBEF, explicit_only=True) is None


def test_a_section_names_its_own_kind_by_kind():
    found = preprocess_of(OmegaConf.create({**ALBEF, "preprocess": SMALL}))
    assert found["vis_processor"] == SMALL["vis_processor"]
    assert found["text_processor"]["eval"] == {"name": "blip_caption"}
    assert preprocess_of({**ALBEF, "preprocess": SMALL}, explicit_only=True) == SMALL
    assert preprocess_of({**ALBEF, "preprocess": {"text_processor": None}})["text_processor"] is None


def test_a_model_without_either_has_none():
    assert preprocess_of({"arch": "dcd", "model_type": "default"}) is None
    assert preprocess_of({"arch": "albef_retrieval"}) is None  # several types, none named
    assert preprocess_of({"arch": "dcd", "preprocess": SMALL}) == SMALL


@pytest.mark.parametrize(
    ("section", "side"),
    [
        ({**ALBEF, "image_size": 96}, 96),
        ({**ALBEF, "sizes": {"image_size": 80}}, 80),
        ({"arch": "meter_retrieval", "model_type": "coco", "vision": {"image_size": 64}}, 64),
        ({**CLIP, "sizes": {"vision": {"image_size": 48}}}, 48),
    ],
)
def test_a_smaller_model_of_a_type_reads_smaller_pictures(section, side):
    assert preprocess_of(section)["vis_processor"]["eval"]["image_size"] == side
    assert build_view(section, "model.teacher").vis_eval(PICTURE).shape == (3, side, side)
    explicit = {**section, "preprocess": SMALL}
    assert preprocess_of(explicit)["vis_processor"]["eval"]["image_size"] == 32


def test_a_teacher_reads_training_pictures_without_random_changes():
    view = build_view(ALBEF, "model.teacher")
    assert type(view.vis_eval) is BlipImageEvalProcessor and view.vis_train is view.vis_eval
    assert type(view.text_eval) is BlipCaptionProcessor and view.text_train is view.text_eval
    assert str(view) == "pictures through blip_image_eval (image_size 384), captions through blip_caption"


def test_unless_its_section_says_so():
    own = {"vis_processor": {"train": {"name": "dcd_image_train", "image_size": 32, "augment": "flip"},
                             "eval": {"name": "dcd_image_eval", "image_size": 32}},
           "text_processor": {"eval": {"name": "dcd_caption", "max_words": 3}}}  # fmt: skip
    view = build_view({**ALBEF, "preprocess": own}, "model.teacher")
    assert type(view.vis_train) is DcdImageTrainProcessor and type(view.vis_eval) is DcdImageEvalProcessor
    assert type(view.text_eval) is DcdCaptionProcessor and view.text_train("one two three four") == "one two three"
    assert str(view) == (
        "pictures through dcd_image_eval (image_size 32) (in training dcd_image_train (image_size 32, augment flip)), "
        "captions through dcd_caption (max_words 3)"
    )


def test_a_learner_trains_through_the_types_own():
    view = build_view(ALBEF, "model.student", learner=True)
    assert type(view.vis_train) is BlipImageTrainProcessor and type(view.vis_eval) is BlipImageEvalProcessor


def test_what_a_type_leaves_open_is_the_data_sets():
    view = build_view(CLIP, "model.teacher")
    assert type(view.vis_eval) is ClipImageEvalProcessor and view.text_eval is None and view.text_train is None
    assert str(view).endswith("captions through the data set's own processor")
    assert build_view({"arch": "dcd"}, "model.teacher") == View()


@pytest.mark.parametrize(
    ("processor", "start"),
    [
        ({"name": "blip_image_evla"}, ".name: 'blip_image_evla' is not registered; registered: "),
        ({"image_size": 3}, ".name: None is not registered; registered: "),
        ("blip_image_eval", ".name: None is not registered; registered: "),
        ({"name": "dcd_image_eval", "image_siez": 3}, ".image_siez: unknown key; did you mean image_size or resize? "),
        ({"name": "dcd_image_eval", "image_size": 0}, ": image_size: 0 is not positive"),
        ({"name": "clip_image_eval", "image_size": "big"}, ": clip_image_eval cannot be built: "),
    ],
)
def test_processors_that_cannot_be_built_are_told_with_their_field(processor, start):
    section = {**ALBEF, "preprocess": {"vis_processor": {"eval": processor}}}
    with pytest.raises(UserError) as caught:
        build_view(section, "model.teachers.1")
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(f"model.teachers.1.preprocess.vis_processor.eval{start}")


class Several:
    """A distiller's face: two teachers, the second with inputs like everybody's."""

    def __init__(self) -> None:
        self.one, self.two, self.student = object(), object(), object()

    def views(self) -> dict:
        return {"teacher.0": {**ALBEF, "preprocess": SMALL}, "teacher.1": {"arch": "dcd"}}

    def view_matchers(self) -> dict:
        return {"teacher.0": self.one, "teacher.1": self.two}


def test_views_of_a_model_and_the_sets_they_see(caplog):
    model = Several()
    with caplog.at_level(logging.INFO):
        views = MatcherViews.of_model(model)
    assert list(views.by_name) == ["teacher.0"]
    assert [r.message for r in caplog.records] == [
        "teacher.0 reads pictures through dcd_image_eval (image_size 32), captions through blip_caption"
    ]
    rows = [{"caption": ["A dog!"]}]
    val, test = (SimpleNamespace(text=["A dog!"], annotation=rows, name=name) for name in ("val", "test"))
    seen = views.dataset_for(model.one, val)
    assert seen.text == ["a dog"] and seen.name == "val" and val.text == ["A dog!"]
    assert views.dataset_for(model.one, val) is seen and views.dataset_for(model.one, test).name == "test"
    assert views.dataset_for(model.two, val) is val and views.dataset_for(model.student, val) is val


def test_faults_in_a_list_of_teachers_name_their_place():
    model = Several()
    model.views = lambda: {"teacher.1": {**ALBEF, "preprocess": {"vis_processor": {"eval": {"name": "x"}}}}}
    with pytest.raises(UserError, match=r"^model\.teachers\.1\.preprocess\.vis_processor\.eval\.name: 'x'"):
        MatcherViews.of_model(model)


def test_other_models_have_no_views():
    assert MatcherViews.of_model(object()).by_name == {}
