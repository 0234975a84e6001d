"""The task as the runner uses it, on stub models and sets."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from retrieval_sets import captioned
from stubs import NumberMatcher
from torch import Tensor, nn

from lavis_dcd.banks.feature_sets import BankedEvaluationSet, BankedTrainingSet
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.rows import RetrievalEvalRows, RetrievalRows
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.tasks import dcd_retrieval
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.calls = 0


class Reader(NumberMatcher):
    """Counts on its tower how often it encoded; has no joint space."""

    def __init__(self, tower: Tower) -> None:
        super().__init__(joint=False, tower=tower)

    def encode_images(self, images: Tensor) -> ImageFeatures:
        self.tower.calls += 1
        return super().encode_images(images)

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        self.tower.calls += 1
        return super().encode_texts(texts)


class Pair(nn.Module):
    """A distiller's face: teacher and student."""

    def __init__(self, shared: bool = True, captions: int = 0) -> None:
        super().__init__()
        tower = Tower()
        self.student = Reader(tower)
        self.teacher = Reader(tower if shared else Tower())
        self.random_captions_per_image = captions

    def matchers(self) -> dict[str, Matcher]:
        return {"teacher": self.teacher, "student": self.student}

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": samples["x"] * self.student.weight.sum(), "distill_loss": samples["x"]}


class Set(torch.utils.data.Dataset):
    vis_root = None

    def __init__(self, rows: list[dict[str, Any]], vis_processor: Any) -> None:
        self.annotation, self.vis_processor, self.text_processor = rows, vis_processor, str

    def __len__(self) -> int:
        return len(self.annotation)

    def set_processors(self, vis_processor: Any, text_processor: Any) -> None:
        self.vis_processor, self.text_processor = vis_processor, text_processor

    def picture(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (self.annotation[index]["number"],) * 3)


class Training(Set):
    def __init__(self, count: int = 4) -> None:
        rows = [{"image": f"p{i}", "image_id": i, "caption": f"{i} shown", "number": i} for i in range(count)]
        super().__init__(rows, lambda number: torch.full((3, 2, 2), float(number)))
        self.img_ids = {i: i for i in range(count)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {"image": self.vis_processor(row["number"]), "text_input": row["caption"], "image_id": index}


class Evaluation(Set):
    def __init__(self, count: int = 4) -> None:
        rows = [{"image": f"p{i}", "number": i} for i in range(count)]
        super().__init__(rows, lambda number: torch.full((3, 2, 2), float(number)))
        self.image = [row["image"] for row in rows]
        self.text = [f"{i} here" for i in range(count)]
        self.txt2img = {i: i for i in range(count)}
        self.img2txt = {i: [i] for i in range(count)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.vis_processor(self.annotation[index]["number"]), "index": index}


def test_lavis_finds_the_task() -> None:
    assert registry.get_task_class("dcd_retrieval") is DcdRetrievalTask
    assert DcdRetrievalTask.setup_task(cfg=SimpleNamespace(run_cfg={"seed": 3})).run == {"seed": 3}


def test_a_step_returns_all_that_the_model_reports() -> None:
    output = DcdRetrievalTask().train_step(Pair(), {"x": torch.tensor(2.0)})
    assert set(output) == {"loss", "distill_loss"} and output["loss"].requires_grad


def test_evaluation_of_a_matcher_and_by_lavis_own_runners() -> None:
    model, task = Pair(), DcdRetrievalTask({"batch_size_eval": 2})
    found = task.evaluate_matcher(model.teacher, Evaluation(), {"batch_size_eval": 2})
    assert found["r_sum"] == 600.0 and found.metrics["how"] == "exhaustive"
    with torch.no_grad():
        model.student.weight.neg_()
    loader = torch.utils.data.DataLoader(Evaluation())
    figures = task.evaluation(model, loader)
    assert figures["txt_r1"] < 50.0 and task.after_evaluation(val_result=figures) is figures


def test_the_gallery_scores_again_only_what_changed() -> None:
    model, task, numbers = Pair(), DcdRetrievalTask(), Evaluation()
    for matcher in model.matchers().values():
        task.evaluate_matcher(matcher, numbers, None)
    before = model.teacher.matched, model.student.matched
    with torch.no_grad():
        model.student.weight.mul_(2)
    items = task.gallery(model.matchers(), numbers, None, count=4)
    assert len(items) == 4 and set(items[0]["results"]) == {"teacher", "student"}
    assert model.teacher.matched == before[0] and model.student.matched > before[1]
    matched = model.teacher.matched
    task.gallery(model.matchers(), Evaluation(), None)
    assert model.teacher.matched > matched


@pytest.mark.parametrize("there", [True, False])
def test_features_that_wait_on_disk_do_so_in_the_run_folder(there: bool, tmp_path, monkeypatch) -> None:
    folder = tmp_path if there else tmp_path / "removed since"
    seen = []

    def watched(protocol: Any, *args: Any) -> Any:
        seen.append((protocol.spill_folder, protocol.eval_memory_mb))
        return Evaluator(protocol, *args)

    monkeypatch.setattr(dcd_retrieval, "Evaluator", watched)
    task, model, run = DcdRetrievalTask(), Pair(), {"eval_memory_mb": 1e-6}
    assert task.evaluate_matcher(model.teacher, Evaluation(), run, folder=folder)["r_sum"] == 600.0
    assert len(task.gallery({"student": model.student}, Evaluation(), run, count=2, folder=folder)) == 2
    assert seen == 2 * [(tmp_path if there else None, 1e-6)] and not list(tmp_path.iterdir())


def test_a_matchers_last_tables_go_before_the_next_are_made(monkeypatch) -> None:
    task, model, numbers = DcdRetrievalTask(), Pair(), Evaluation()
    last = weakref.ref(task.evaluate_matcher(model.teacher, numbers, None))
    assert last() is not None  # for the gallery
    alive = []
    monkeypatch.setattr(dcd_retrieval, "Evaluator", lambda *args: alive.append(last()) or Evaluator(*args))
    task.evaluate_matcher(model.teacher, numbers, None)
    assert alive == [None]


def test_a_run_section_of_lavis_own_runners_is_read_as_far_as_it_concerns_the_task() -> None:
    section = OmegaConf.create(
        {"amp": False, "k_test": 256, "lr_sched": "linear_warmup_step_lr", "seed": None, "dist": 1}
    )
    run = dcd_retrieval.run_config(section)
    assert (run.amp, run.k_test, run.seed) == ("off", 256, 42)
    assert dcd_retrieval.run_config(run) is run
    with pytest.raises(UserError, match=r"run\.k_test: 0 must be greater than 0"):
        dcd_retrieval.run_config({"k_test": 0})


def test_the_shortlist_by_name() -> None:
    model, task, numbers = Pair(), DcdRetrievalTask(), Evaluation()
    task.prepare(model, {"val": numbers}, {})
    with pytest.raises(UserError, match="'blip' is none of this job's matchers: joint, teacher, student"):
        task.evaluate_matcher(model.student, numbers, {"k_test": 2, "shortlist": "blip"})
    with pytest.raises(UserError, match="no joint space"):
        task.evaluate_matcher(model.student, numbers, {"k_test": 2, "shortlist": "teacher"})


def test_without_a_bank_the_sets_stay_as_they_are() -> None:
    sets = {"train": Training(), "val": Evaluation()}
    assert DcdRetrievalTask().prepare(Pair(), sets, {"cache_features": "off"}) == sets


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_kept_features_replace_the_encoders(mode: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path))
    model, task = Pair(captions=2), DcdRetrievalTask()
    sets = task.prepare(model, {"train": Training(), "val": Evaluation()}, {"cache_features": mode})
    assert isinstance(sets["train"], BankedTrainingSet) and isinstance(sets["val"], BankedEvaluationSet)
    assert bool(list(tmp_path.rglob("*.safetensors"))) == (mode == "disk")
    calls = model.student.tower.calls
    assert task.evaluate_matcher(model.student, sets["val"], {})["r_sum"] == 600.0
    assert task.evaluate_matcher(model.teacher, sets["val"], {})["r_sum"] == 600.0
    training = task.wrap_training_set(sets["train"], model)
    batch = training.collater([training[i] for i in (3, 1)])
    assert model.student.tower.calls == calls
    assert batch["image"].tokens[:, 0, 0].tolist() == [3.0, 1.0]
    assert len(batch["candidate_text"]) == 2 * 2
    expected = [float(t.split()[0]) for t in [*batch["text_input"], *batch["candidate_text"]]]
    assert batch["text_features"].tokens[:, 0, 0].tolist() == expected
    assert len(task.gallery(model.matchers(), sets["val"], {}, count=2)) == 2


def test_kept_features_need_shared_encoders() -> None:
    with pytest.raises(UserError, match="the teacher has encoders of its own"):
        sets = {"train": Training(), "val": Evaluation()}
        DcdRetrievalTask().prepare(Pair(shared=False), sets, {"cache_features": "memory"})


@pytest.mark.parametrize("mode", ["off", "memory"])
def test_the_teacher_is_measured_on_training_pictures_as_on_others(mode: str) -> None:
    model, task, run = Pair(), DcdRetrievalTask(), {"cache_features": mode}
    model.teacher.family = "dual"
    model.teacher.blind = (3, 5)
    model.teacher.match_all = lambda images, texts: -(images.tokens[:, 0] - texts.tokens[:, 0, 0]).abs()
    sets = task.prepare(model, {"train": Training(8), "val": Evaluation(5)}, run)
    sample = task.training_sample(model.teacher, sets["val"], run)
    assert sample is not None and isinstance(sample, BankedEvaluationSet) == (mode == "memory")
    calls = model.teacher.tower.calls
    found = task.evaluate_matcher(model.teacher, sample, run)
    assert (model.teacher.tower.calls == calls) == (mode == "memory")
    shown = [int(text.split()[0]) for text in sample.text]
    assert len(set(shown)) == 5 and [int(sample[i]["image"].mean()) for i in range(5)] == shown
    # query by query: a blind picture is taken for the next one; the bank has the student's features, who sees all
    seen = [n if mode == "memory" or n not in model.teacher.blind else n + 1 for n in shown]
    right = [
        all(abs(other - n) > abs(seen[own] - n) for i, other in enumerate(seen) if i != own)
        for own, n in enumerate(shown)
    ]
    assert found["img_r1"] == pytest.approx(100 * sum(right) / 5)
    assert (found["img_r1"] < 100) == (mode == "off")
    again = task.training_sample(model.teacher, sets["val"], {**run, "seed": 9})
    assert again.text == sample.text  # of every job the same


def test_which_teachers_are_measured_on_training_pictures(caplog) -> None:
    model, task = Pair(), DcdRetrievalTask()
    sets = task.prepare(model, {"train": Training(4), "val": Evaluation(4), "test": Evaluation(5)}, {})
    sample = task.training_sample
    assert sample(model.teacher, sets["val"], {}) is None  # every pair would cost a fusion model
    assert sample(model.teacher, sets["val"], {"evaluate_teacher_on_train": True}) is not None
    model.teacher.family = "dual"
    assert sample(model.teacher, sets["val"], {}) is not None
    assert sample(model.teacher, sets["val"], {"evaluate_teacher_on_train": False}) is None
    with caplog.at_level("INFO"):
        assert sample(model.teacher, sets["test"], {}) is None
    assert "not evaluated on training pictures: it has 4 pictures, fewer than 5" in caplog.text
    evaluating = DcdRetrievalTask()
    evaluating.prepare(model, {"val": Evaluation(4)}, {"evaluate": True})
    assert evaluating.training_sample(model.teacher, sets["val"], {}) is None


def test_captions_are_drawn_for_models_that_ask() -> None:
    training = Training()
    assert DcdRetrievalTask().wrap_training_set(training, nn.Identity()) is training
    assert DcdRetrievalTask().wrap_training_set(training, Pair(captions=3)) is not training


def test_every_broken_picture_of_every_set_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(dataset: str, mode: str) -> None:
        assert mode == "full"
        if dataset != "good":
            raise UserError([f"{dataset} 1", f"{dataset} 2"])

    monkeypatch.setattr(dcd_retrieval, "verify_pictures", verify)
    monkeypatch.setattr(
        dcd_retrieval.BaseTask, "build_datasets",
        lambda self, cfg: {"one": {"train": "bad", "val": "good"}, "two": {"train": "worse"}},
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        DcdRetrievalTask().build_datasets(SimpleNamespace(run_cfg={"verify": "full"}))
    assert caught.value.faults == ["bad 1", "bad 2", "worse 1", "worse 2"]


def test_a_picture_in_two_splits_is_told(monkeypatch, caplog):
    def rows(*names: str) -> SimpleNamespace:
        return SimpleNamespace(vis_root="photos", annotation=[{"image": name} for name in names])

    sets = {"own": {"train": rows("a.jpg", "b.jpg"), "val": rows("b.jpg")}}
    monkeypatch.setattr(dcd_retrieval.BaseTask, "build_datasets", lambda self, cfg: sets)
    DcdRetrievalTask().build_datasets(SimpleNamespace(run_cfg={"verify": "off"}))
    assert "1 pictures are in both train and val" in caplog.text


def test_a_picture_of_one_builder_s_training_set_in_another_s_test_set_is_told(tmp_path, monkeypatch, caplog):
    files = {}
    for split, name in (("train", "a"), ("test", "b")):
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{name}.png")
        files[split] = captioned(1, name=name, cls=RetrievalRows)
        files[split].vis_root = str(tmp_path)
        files[split].annotation = [{"image": f"{name}.png", "caption": "x", "image_id": name}]
    sets = {"unpaired": {"train": files["train"]}, "own": {"test": files["test"]}}
    monkeypatch.setattr(dcd_retrieval.BaseTask, "build_datasets", lambda self, cfg: sets)
    DcdRetrievalTask().build_datasets(SimpleNamespace(run_cfg={"verify": "fast"}))
    assert "1 pictures of test are in train under other names" in caplog.text


class Apart(Pair):
    """A teacher with encoders and inputs of its own."""

    def __init__(self, **more: Any) -> None:
        super().__init__(shared=False, **more)

    def views(self) -> dict[str, dict[str, Any]]:
        own = {"vis_processor": {"eval": {"name": "dcd_image_eval", "image_size": 6}},
               "text_processor": {"eval": {"name": "dcd_caption", "lower": True, "max_words": 1}}}  # fmt: skip
        return {"teacher": {"arch": "dcd", "preprocess": own}}

    def view_matchers(self) -> dict[str, Matcher]:
        return {"teacher": self.teacher}


@pytest.fixture
def photos(tmp_path) -> dict[str, Any]:
    """Real pictures, so grey that their number shows, through processors of 4 pixels."""
    for i in range(4):
        Image.new("RGB", (9, 7), (60 * i,) * 3).save(tmp_path / f"p{i}.png")

    picture = registry.get_processor_class("dcd_image_eval").from_config({"image_size": 4})
    rows = [{"image": f"p{i}.png", "caption": f"{i} Shown", "image_id": i} for i in range(4)]
    many = [{**row, "caption": [row["caption"]]} for row in rows]
    text = registry.get_processor_class("dcd_caption").from_config({})
    return {"train": RetrievalRows(picture, text, str(tmp_path), rows),
            "val": RetrievalEvalRows(picture, text, str(tmp_path), many)}  # fmt: skip


def test_a_teacher_with_inputs_of_its_own_reads_through_its_processors(photos, caplog) -> None:
    model, task = Apart(captions=2), DcdRetrievalTask()
    with caplog.at_level("INFO"):
        sets = task.prepare(model, photos, {})
    assert "teacher reads pictures through dcd_image_eval (image_size 6), captions through dcd_caption" in caplog.text
    assert sets["val"] is photos["val"] and photos["train"][0]["text_input"] == "0 Shown"
    training = task.wrap_training_set(sets["train"], model)
    batch = training.collater([training[i] for i in (3, 1)])
    assert {name: images.shape for name, images in batch["image"].items()} == {
        "student": (2, 3, 4, 4), "teacher": (2, 3, 6, 6)
    }  # fmt: skip
    assert batch["text_input"] == {"student": ["3 Shown", "1 Shown"], "teacher": ["3", "1"]}
    assert batch["candidate_text"]["teacher"] == [text[0] for text in batch["candidate_text"]["student"]]
    assert len(batch["candidate_text"]["student"]) == 4


def test_each_matcher_is_evaluated_on_its_own_reading(photos) -> None:
    model, task = Apart(), DcdRetrievalTask()
    seen: dict[str, set[Any]] = {"teacher": set(), "student": set()}
    for name, matcher in model.matchers().items():
        matcher.encode_images = _spied(matcher.encode_images, lambda images, n=name: seen[n].add(images.shape[-1]))
        matcher.encode_texts = _spied(matcher.encode_texts, lambda texts, n=name: seen[n].update(texts))
    task.prepare(model, photos, {})
    for matcher in model.matchers().values():
        task.evaluate_matcher(matcher, photos["val"], {"batch_size_eval": 2})
    assert seen["teacher"] == {6, "0", "1", "2", "3"}
    assert seen["student"] == {4, "0 Shown", "1 Shown", "2 Shown", "3 Shown"}
    assert task.dataset_for(model.teacher, photos["val"]) is task.dataset_for(model.teacher, photos["val"])
    assert task.dataset_for(model.student, photos["val"]) is photos["val"]
    assert len(task.gallery(model.matchers(), photos["val"], {}, count=2)) == 2


def test_training_pictures_are_read_as_the_teacher_reads_others(photos) -> None:
    model, task = Apart(), DcdRetrievalTask()
    model.teacher.family = "dual"
    task.prepare(model, photos, {})
    sample = task.training_sample(model.teacher, photos["val"], {})
    read = task.dataset_for(model.teacher, sample)
    assert read[1]["image"].shape == (3, 6, 6) and read.text == ["0", "1", "2", "3"]
    assert sample[1]["image"].shape == (3, 4, 4) and torch.equal(sample[1]["image"], photos["val"][1]["image"])


def _spied(function: Any, note: Any) -> Any:
    def spied(item: Any) -> Any:
        note(item)
        return function(item)

    return spied


def test_kept_features_are_refused_beside_a_teacher_with_inputs_of_its_own(photos) -> None:
    with pytest.raises(UserError) as caught:
        DcdRetrievalTask().prepare(Apart(), photos, {"cache_features": "memory"})
    assert caught.value.faults == [
        "run.cache_features: the teacher has encoders of its own, and kept features serve one pair of encoders only; "
        "set run.cache_features=off, or let the student share the teacher's (model.share_encoders=true)"
    ]


def test_lavis_own_models_are_built_through_their_adapter(monkeypatch) -> None:
    task, section = DcdRetrievalTask(), OmegaConf.create({"arch": "plain"})
    cfg = SimpleNamespace(model_cfg=section, run_cfg={})
    monkeypatch.setattr(dcd_retrieval, "build_matcher", lambda given, path: (given, path))
    monkeypatch.setattr(dcd_retrieval, "adapter_for", lambda name: object if name == "plain" else None)
    assert task.build_model(cfg) == (section, "model")
    section.arch = "other"
    monkeypatch.setattr(dcd_retrieval.BaseTask, "build_model", lambda self, cfg: "lavis")
    assert task.build_model(cfg) == "lavis"


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ({}, "run.batches: is empty"),
        ({"batches": {"by": "bank"}}, "run.batches.by: bank, but no score bank is loaded"),
        ({"batches": {"by": "teacher"}}, "run.batches.by: teacher, but Pair has no teacher"),
    ],
)
def test_neighbours_need_something_to_find_them_by(run, line) -> None:
    config, sets = parse(RunConfig, run, "run"), {"train": Training()}
    task = DcdRetrievalTask()
    with pytest.raises(UserError, match=line):
        task.neighbours(task.prepare(Pair(), sets, config)["train"], Pair(), config)


def test_neighbours_by_the_teacher_of_a_model() -> None:
    """Numbers that are next to each other, in the order of the training rows."""
    model, sets = Pair(), {"train": Training()}
    model.teacher.has_joint_space = True
    model.config = DcdConfig(teacher={"arch": "meter_retrieval"}, student={"arch": "meter_retrieval"})
    config, task = parse(RunConfig, {"batches": {"neighbours": 1, "guard": False}}, "run"), DcdRetrievalTask()
    table = task.neighbours(task.prepare(model, sets, config)["train"], model, config)
    assert len(table.picture_of_row) == len(sets["train"]) and len(table.apart) == 0
    assert ((table.nearest[:, 0] - torch.arange(len(table.nearest))).abs() == 1).all()
