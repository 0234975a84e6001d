from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
from lavis.processors.base_processor import BaseProcessor
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor, BlipImageTrainProcessor
from lavis.processors.clip_processors import ClipImageEvalProcessor
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from lavis_dcd.banks.feature_sets import BankedEvaluationSet
from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets import rows
from lavis_dcd.datasets.random_captions import RandomCaptions
from lavis_dcd.datasets.rows import RetrievalEvalRows, RetrievalRows
from lavis_dcd.datasets.views import (
    MatcherViews,
    MultiImage,
    MultiText,
    View,
    alike,
    build_view,
    evaluation_view,
    preprocess_of,
    with_views,
)
from lavis_dcd.matching.contract import has_view, view_of
from lavis_dcd.processors.captions import DcdCaptionProcessor
from lavis_dcd.processors.images import DcdImageEvalProcessor, DcdImageTrainProcessor


def made(name: str, **keys: Any):
    return registry.get_processor_class(name).from_config(OmegaConf.create({"name": name, **keys}))


OWN_IMAGE, OWN_TEXT = made("dcd_image_eval", image_size=16), made("dcd_caption")
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
IMAGE, TEXT = made("dcd_image_eval", image_size=24, **HALF), made("dcd_caption", lower=True, prompt="seen: ")
TEACHER = View(vis_train=IMAGE, vis_eval=IMAGE, text_train=TEXT, text_eval=TEXT)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(6):
        Image.linear_gradient("L").resize((30 + i, 20)).rotate(15 * i).convert("RGB").save(tmp_path / f"p{i}.png")
    return tmp_path


def training(photos: Path, numbers: range = range(6)) -> RetrievalRows:
    found = [{"image": f"p{i}.png", "caption": f"Picture {i}, said {k}.", "image_id": f"p{i}"}
             for i in numbers for k in range(2)]  # fmt: skip
    return RetrievalRows(OWN_IMAGE, OWN_TEXT, str(photos), found)


def evaluation(photos: Path) -> RetrievalEvalRows:
    found = [{"image": f"p{i}.png", "caption": [f"Picture {i}.", f"Number {i}."], "image_id": i} for i in range(6)]
    return RetrievalEvalRows(OWN_IMAGE, OWN_TEXT, str(photos), found)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The items whose picture was decoded."""
    seen: list[int] = []
    real = rows.load_picture

    def load(dataset: Any, index: int) -> Image.Image:
        seen.append(index)
        return real(dataset, index)

    monkeypatch.setattr(rows, "load_picture", load)
    return seen


def test_each_matcher_gets_its_own_reading_of_a_picture_decoded_once(photos, opened):
    source = training(photos)
    viewed = with_views(source, {"teacher": TEACHER})
    item = viewed[5]
    assert opened == [5]
    with Image.open(photos / "p2.png") as picture:
        expected = {"student": OWN_IMAGE(picture.convert("RGB")), "teacher": IMAGE(picture.convert("RGB"))}
    assert set(item["image"]) == {"student", "teacher"}
    for name, tensor in item["image"].items():
        assert torch.equal(tensor, expected[name])
    assert item["image"]["student"].shape == (3, 16, 16) and item["image"]["teacher"].shape == (3, 24, 24)
    assert item["text_input"] == {"student": "Picture 2, said 1.", "teacher": "seen: picture 2, said 1."}
    assert (item["image_id"], item["instance_id"]) == (2, "5")


def test_the_original_set_stays_as_it_was(photos):
    source = training(photos)
    viewed = with_views(source, {"teacher": TEACHER})
    assert source.vis_processor is OWN_IMAGE and source.text_processor is OWN_TEXT
    assert source[0]["image"].shape == (3, 16, 16) and source[0]["text_input"] == "Picture 0, said 0."
    assert len(viewed) == len(source) == 12 and viewed.annotation is source.annotation


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_a_batch_per_view(photos, workers):
    viewed = with_views(training(photos), {"teacher": TEACHER})
    batches = list(DataLoader(viewed, batch_size=4, num_workers=workers, collate_fn=viewed.collater))
    assert len(batches) == 3
    for start, batch in zip((0, 4, 8), batches, strict=True):
        student, teacher = view_of(batch), view_of(batch, "teacher")
        assert student["image"].shape == (4, 3, 16, 16) and teacher["image"].shape == (4, 3, 24, 24)
        assert has_view(batch, "teacher") and not has_view(batch, "teacher.1")
        for k in range(4):
            item = viewed[start + k]
            assert torch.equal(student["image"][k], item["image"]["student"])
            assert torch.equal(teacher["image"][k], item["image"]["teacher"])
            assert student["text_input"][k] == item["text_input"]["student"]
            assert teacher["text_input"][k] == item["text_input"]["teacher"]
        assert torch.equal(student["image_id"], teacher["image_id"])


@pytest.mark.parametrize("workers", [0, 2])
def test_drawn_captions_are_read_by_every_matcher(photos, workers):
    viewed = RandomCaptions(with_views(training(photos), {"teacher": TEACHER}), count=3, seed=1)
    plain = RandomCaptions(training(photos), count=3, seed=1)
    loader = DataLoader(viewed, batch_size=4, num_workers=workers, collate_fn=viewed.collater)
    for start, batch in zip((0, 4, 8), loader, strict=True):
        expected = [text for i in range(start, start + 4) for text in plain[i]["candidate_text"]]
        assert batch["candidate_text"] == {
            "student": expected, "teacher": [f"seen: {text.lower()}" for text in expected]
        }  # fmt: skip
        assert batch["candidate_image_id"].shape == (4, 3)
        assert batch["image"]["teacher"].shape == (4, 3, 24, 24)


def test_drawn_captions_stay_plain_where_only_pictures_differ(photos):
    viewed = RandomCaptions(with_views(training(photos), {"teacher": View(vis_train=IMAGE)}), count=3, seed=1)
    batch = viewed.collater([viewed[0], viewed[3]])
    assert batch["candidate_text"] == [*viewed[0]["candidate_text"], *viewed[3]["candidate_text"]]
    assert batch["text_input"] == ["Picture 0, said 0.", "Picture 1, said 1."]
    assert set(batch["image"]) == {"student", "teacher"}


def test_concatenations_and_wrappers_keep_their_shape(photos):
    source = RandomCaptions(ConcatDataset([training(photos, range(3)), training(photos, range(3, 6))]), 2, seed=0)
    viewed = with_views(source, {"teacher": TEACHER})
    assert type(viewed) is RandomCaptions and type(viewed.dataset) is ConcatDataset
    assert source.dataset[0]["text_input"] == "Picture 0, said 0."
    batch = viewed.collater([viewed[i] for i in (0, 11)])
    assert view_of(batch, "teacher")["text_input"] == ["seen: picture 0, said 0.", "seen: picture 5, said 1."]
    assert batch["image"]["teacher"].shape == (2, 3, 24, 24)


def test_all_sets_of_a_concatenation_have_the_same_views(photos):
    one, two = training(photos, range(3)), training(photos, range(3, 6))
    two.set_processors(IMAGE, TEXT)  # the second set reads as the teacher does
    viewed = with_views(ConcatDataset([one, two]), {"teacher": TEACHER})
    found = [viewed[i] for i in (0, 11)]
    assert all(set(item["image"]) == set(item["text_input"]) == {"student", "teacher"} for item in found)
    assert found[1]["image"]["student"] is found[1]["image"]["teacher"]


def test_lavis_own_training_set(photos, monkeypatch):
    content = [{"image": f"p{i}.png", "caption": f"Picture {i}", "image_id": i} for i in range(6)]
    (photos / "ann.json").write_text(json.dumps(content))
    viewed = with_views(RetrievalDataset(OWN_IMAGE, OWN_TEXT, str(photos), [photos / "ann.json"]), {"teacher": TEACHER})
    seen, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: seen.append(str(path)) or real(path))
    batch = viewed.collater([viewed[1], viewed[4]])
    assert seen == [str(photos / "p1.png"), str(photos / "p4.png")]
    assert batch["image"]["teacher"].shape == (2, 3, 24, 24)
    assert batch["text_input"] == {"student": ["Picture 1", "Picture 4"],
                                   "teacher": ["seen: picture 1", "seen: picture 4"]}  # fmt: skip


class Counting:
    """A processor that counts its calls and adds a constant."""

    def __init__(self, add: int = 0) -> None:
        self.add, self.calls = add, 0

    def __call__(self, item: int) -> int:
        self.calls += 1
        return item + self.add

    def __getstate__(self) -> dict[str, int]:
        return {"add": self.add}


def test_processors_that_are_alike_run_once():
    main, same, other = Counting(1), Counting(1), Counting(2)
    several = MultiImage({"student": main, "teacher.0": other, "teacher.1": Counting(2), "teacher.2": same})
    assert several(5) == {"student": 6, "teacher.0": 7, "teacher.1": 7, "teacher.2": 6}
    assert (main.calls, other.calls, same.calls) == (1, 1, 0)


def test_what_is_alike():
    assert alike(IMAGE, made("dcd_image_eval", image_size=24, **HALF))
    assert not alike(IMAGE, made("dcd_image_eval", image_size=24))
    assert not alike(IMAGE, made("dcd_image_train", image_size=24, **HALF))
    assert alike(made("blip_caption"), made("blip_caption")) and not alike(made("blip_caption"), OWN_TEXT)
    assert alike(made("dcd_caption", lower=True), made("dcd_caption", lower=True)) and not alike(OWN_TEXT, TEXT)
    assert alike(BaseProcessor(), BaseProcessor()) and BaseProcessor()("as it is") == "as it is"
    assert alike(made("blip_image_eval", image_size=24), made("blip_image_eval", image_size=24))

    def local(item: str) -> str:
        return item

    assert alike(local, local) and not alike(local, lambda item: item)


def test_a_view_that_reads_like_the_set_changes_nothing(photos):
    same = View(vis_train=made("dcd_image_eval", image_size=16), text_train=made("dcd_caption"))
    viewed = with_views(training(photos), {"teacher": same, "teacher.1": View()})
    assert isinstance(viewed[0]["image"], torch.Tensor) and viewed[0]["text_input"] == "Picture 0, said 0."
    viewed = with_views(training(photos), {"teacher.0": same, "teacher.1": TEACHER})
    assert set(viewed[0]["image"]) == set(viewed[0]["text_input"]) == {"student", "teacher.1"}


def test_a_view_of_the_main_name_replaces_the_sets_own(photos):
    viewed = with_views(training(photos), {"student": TEACHER})
    assert viewed[0]["image"].shape == (3, 24, 24) and viewed[0]["text_input"] == "seen: picture 0, said 0."


def test_random_draws_of_two_views_are_independent(photos):
    random = {"image_size": 16, "augment": "flip"}
    own, theirs = made("dcd_image_train", **random), made("dcd_image_train", **random, **HALF)
    source = training(photos)
    source.set_processors(own, OWN_TEXT)
    viewed = with_views(source, {"teacher": View(vis_train=theirs)})
    with Image.open(photos / "p1.png") as picture:
        plain = OWN_IMAGE(picture.convert("RGB"))
        other = made("dcd_image_eval", image_size=16, **HALF)(picture.convert("RGB"))
    torch.manual_seed(0)
    pairs = set()
    for _ in range(40):
        image = viewed[2]["image"]
        pairs.add((torch.equal(image["student"], plain), torch.equal(image["teacher"], other)))
    assert pairs == {(True, True), (True, False), (False, True), (False, False)}


def test_sets_without_processors_are_refused():
    with pytest.raises(UserError) as caught:
        with_views(SimpleNamespace(annotation=[]), {"teacher": TEACHER})
    assert caught.value.faults == [
        "the data set SimpleNamespace has no vis_processor and text_processor, so that matchers with processors of "
        "their own (teacher) cannot read it; give all of them the same processors"
    ]


def test_an_evaluation_set_as_another_matcher_reads_it(photos):
    source = evaluation(photos)
    viewed = evaluation_view(source, TEACHER)
    assert viewed[3]["image"].shape == (3, 24, 24) and viewed[3]["index"] == 3
    assert viewed.text == [f"seen: {text.lower()}" for text in source.text]
    assert viewed.txt2img == source.txt2img and viewed.img2txt == source.img2txt and len(viewed) == 6
    assert source[3]["image"].shape == (3, 16, 16) and source.text[:2] == ["Picture 0.", "Number 0."]
    half = evaluation_view(source, View(vis_eval=IMAGE))
    assert half[0]["image"].shape == (3, 24, 24) and half.text is source.text


def test_lavis_own_evaluation_set(photos):
    content = [{"image": f"p{i}.png", "caption": [f"Picture {i}", f"Number {i}"]} for i in range(6)]
    (photos / "ann.json").write_text(json.dumps(content))
    source = RetrievalEvalDataset(OWN_IMAGE, OWN_TEXT, str(photos), [photos / "ann.json"])
    viewed = evaluation_view(source, TEACHER)
    assert viewed[5]["image"].shape == (3, 24, 24)
    assert viewed.text[-1] == "seen: number 5" and source.text[-1] == "Number 5"


def test_drawn_scenes():
    builder = registry.get_builder_class("shape_scenes")
    default = OmegaConf.load(builder.default_config_path()).datasets.shape_scenes
    info = {"image_size": 32, "scenes": {"train": 4, "val": 3, "test": 2}}
    splits = builder(OmegaConf.merge(default, {"build_info": info})).build_datasets()
    viewed = evaluation_view(splits["val"], TEACHER)
    assert viewed[2]["image"].shape == (3, 24, 24) and len(viewed.text) == 15
    assert viewed.text[4] == f"seen: {splits['val'].text[4].lower()}"
    item = with_views(splits["train"], {"teacher": TEACHER})[7]
    assert item["image"]["teacher"].shape == (3, 24, 24) and item["text_input"]["teacher"].startswith("seen: ")


def test_coco_captions(photos):
    images = [{"id": i, "file_name": f"p{i}.png"} for i in range(3)]
    captions = [{"id": i, "image_id": i, "caption": f"Picture  {i}"} for i in range(3)]
    (photos / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    builder = registry.get_builder_class("coco_captions")
    default = OmegaConf.load(builder.default_config_path()).datasets.coco_captions
    both = [dict.fromkeys(("train", "val"), value) for value in ("c.json", ".")]
    info = {"root": str(photos), "annotations": both[0], "images": both[1]}
    splits = builder(OmegaConf.merge(default, {"build_info": info})).build_datasets()
    viewed = evaluation_view(splits["val"], TEACHER)
    assert viewed.text == ["seen: picture 0", "seen: picture 1", "seen: picture 2"]
    assert viewed[1]["image"].shape == (3, 24, 24)
    assert with_views(splits["train"], {"teacher": TEACHER})[1]["text_input"]["teacher"] == "seen: picture 1"


def test_a_banked_set_is_read_from_its_pictures(photos):
    source = evaluation(photos)
    banked = BankedEvaluationSet(source, SimpleNamespace(serves=lambda matcher: True), "val")
    viewed = evaluation_view(banked, TEACHER)
    assert not hasattr(viewed, "banked_rows")
    assert viewed[2]["image"].shape == (3, 24, 24) and viewed.text[0] == "seen: picture 0."
    assert banked[2]["image"].shape == (3, 16, 16)


def test_captions_that_are_not_kept_as_written_are_told(photos):
    source = evaluation(photos)
    source.annotation = [{"image": row["image"]} for row in source.annotation]
    with pytest.raises(UserError) as caught:
        evaluation_view(source, TEACHER)
    assert caught.value.faults == [
        "the evaluation set RetrievalEvalRows has 12 captions, but 0 as written (annotation[i]['caption']), so that no "
        "matcher can read them through its own text processor; give all matchers the data set's "
        "(preprocess.text_processor: null)"
    ]
    assert evaluation_view(source, View(vis_eval=IMAGE)).text == source.text


def test_texts_of_views():
    several = MultiText({"student": OWN_TEXT, "teacher": TEXT})
    assert several(" A  dog ") == {"student": "A dog", "teacher": "seen: a dog"}


def test_a_view_in_words():
    words = {"vis_train": "flipped", "vis_eval": "squashed", "text_train": "lower", "text_eval": "lower"}
    view = View(vis_train=IMAGE, vis_eval=IMAGE, text_train=TEXT, text_eval=TEXT, words=words)
    assert str(view) == "pictures through squashed (in training flipped), captions through lower"
    assert str(View()) == "pictures through the data set's own processor, captions through the data set's own processor"


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
