"""The task as the runner uses it, on stub models and sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.banked import BankedEvaluationSet, BankedTrainingSet
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.tasks import dcd_retrieval
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.calls = 0


class Reader(nn.Module, Matcher):
    """Pictures show a number, captions name it."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.weight = nn.Parameter(torch.ones(1))
        self.matched = 0

    def encoder_modules(self) -> list[nn.Module]:
        return [self.tower]

    def encode_images(self, images: Tensor) -> ImageFeatures:
        self.tower.calls += 1
        return ImageFeatures(images[:, :1, 0, :1])

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        self.tower.calls += 1
        return TextFeatures(torch.tensor([float(t.split()[0]) for t in texts])[:, None, None])

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        self.matched += 1
        return -(images.tokens[pairs[:, 0], 0, 0] - texts.tokens[pairs[:, 1], 0, 0]).abs() * self.weight


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
        super().__init__(rows, lambda number: pytest.fail("the training processor ran"))
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
    from lavis.common.registry import registry

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


def test_kept_features_need_shared_encoders_and_an_evaluation_split() -> None:
    task, cached = DcdRetrievalTask(), {"cache_features": "memory"}
    with pytest.raises(UserError, match="the teacher has encoders of its own"):
        task.prepare(Pair(shared=False), {"train": Training(), "val": Evaluation()}, cached)
    with pytest.raises(UserError, match="needs an evaluation split"):
        task.prepare(Pair(), {"train": Training()}, cached)


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
