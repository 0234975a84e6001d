"""A dual teacher's vectors out of a feature bank: the losses and gradients of the slow way, and nothing paid twice."""

import pytest
import torch
from stubs import DualColourMatcher
from torch import nn
from torch.utils.data import Dataset, default_collate

from lavis_dcd.banks.feature_bank import build_feature_bank
from lavis_dcd.banks.feature_sets import BankedTrainingSet
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.dcd import DynamicContrastiveDistillation, kept_vectors
from lavis_dcd.models.dcd.config import DcdConfig, SelectionConfig
from lavis_dcd.models.dcd.teachers import Teachers

PICTURES = 7


class Vectors(DualColourMatcher):
    """Counts the items that it embeds, by vectors of its own."""

    scores_by_embeds = True

    def __init__(self, seed, tower=None):
        super().__init__(seed)
        self.tower = tower or self.tower
        self.head = nn.Linear(self.width(), 4, bias=False)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(seed))
        self.embedded = 0

    def width(self):
        return self.encode_images(torch.zeros(1, 3, 2, 2)).tokens.shape[2]

    def embed_images(self, images):
        self.embedded += len(images)
        return nn.functional.normalize(self.head(images.tokens[:, 0]), dim=-1)

    def embed_texts(self, texts):
        return self.embed_images(texts)

    def match_embeds(self, image_embeds, text_embeds):
        return 7 * image_embeds @ text_embeds.T

    def match_all(self, images, texts):
        return self.match_embeds(self.embed_images(images), self.embed_texts(texts))


class Scenes(Dataset):
    """Two captions of each picture, in LAVIS's training shape."""

    vis_root = None
    text_processor = staticmethod(str.lower)

    def __init__(self):
        numbers = [n for n in range(PICTURES) for _ in range(2)]
        self.annotation = [
            {"image": f"{n}.png", "image_id": f"id {n}", "caption": f"caption {n}{'x' * (i % 5)}"}
            for i, n in enumerate(numbers)
        ]
        self.img_ids = {f"id {n}": n for n in range(PICTURES)}

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, index):
        row, picture = self.annotation[index], index // 2
        image = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(picture))
        return {"image": image, "text_input": row["caption"], "image_id": picture}

    def collater(self, items):
        return default_collate(items)


def job(keep: float, teachers=2):
    student = Vectors(9)
    student.tower.requires_grad_(False)
    of_job = Teachers([Vectors(seed, student.tower) for seed in range(teachers)])
    config = DcdConfig(selection=SelectionConfig(hard_negatives=3, strategy="stratified"), teacher_vectors_mb=keep)
    model = DynamicContrastiveDistillation(of_job, student, config).train()
    scenes = Scenes()
    bank = build_feature_bank(student, {"train": scenes}, 4, torch.float32)
    model.use_feature_bank(bank)
    return model, BankedTrainingSet(scenes, bank)


def batches(dataset):
    """Several batches, one of them with one picture twice."""
    for step, rows in enumerate(([0, 3, 5, 8, 12], [1, 0, 6, 11, 9], [13, 2, 4, 7, 0])):
        position = {"epoch": 0, "iters": step, "num_iters_per_epoch": 3, "draw_seed": step}
        yield dataset.collater([dataset[row] for row in rows]) | position


def test_losses_and_gradients_are_those_of_vectors_computed_anew():
    (kept, of_kept), (anew, of_anew) = job(1.0), job(0.0)
    for first, second in zip(batches(of_kept), batches(of_anew), strict=True):
        outputs = kept(first), anew(second)
        assert outputs[0].keys() == outputs[1].keys()
        for key, value in outputs[1].items():
            torch.testing.assert_close(outputs[0][key], value, msg=lambda m, key=key: f"{key}: {m}")
        for output in outputs:
            output["loss"].backward()
    for mine, theirs in zip(kept.student.parameters(), anew.student.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
    assert kept.student.head.weight.grad.abs().sum() > 0


def test_every_item_is_embedded_once(monkeypatch):
    monkeypatch.setattr(kept_vectors, "_BATCH", 4)
    model, dataset = job(1.0)
    for teacher in model.teachers.matchers:
        teacher.embedded = 0
    for batch in batches(dataset):
        model(batch)
    items = PICTURES + len({row["caption"] for row in dataset.dataset.annotation})
    assert [teacher.embedded for teacher in model.teachers.matchers] == [items, items]


def test_vectors_that_would_be_too_large_are_not_kept(caplog):
    with caplog.at_level("INFO"):
        model, dataset = job(1e-5)
    assert "more than model.teacher_vectors_mb" in caplog.text
    for teacher in model.teachers.matchers:
        teacher.embedded = 0
    for batch in batches(dataset):
        model(batch)
    sizes = [len(set(b["image_id"].tolist())) + len(b["image_id"]) for b in batches(dataset)]
    assert [teacher.embedded for teacher in model.teachers.matchers] == [sum(sizes)] * 2


def test_features_of_no_bank_have_no_vectors():
    model, dataset = job(1.0)
    batch = next(batches(dataset))
    assert batch["image"].rows.tolist() == [dataset.bank.picture_rows["train"][row] for row in (0, 3, 5, 8, 12)]
    vectors = kept_vectors.KeptVectors(model.teachers.matchers[0], dataset.bank)
    with pytest.raises(ValueError, match="out of no bank"):
        vectors.scores(model.student.encode_images(torch.zeros(1, 3, 2, 2)), batch["text_features"])


def test_a_matcher_that_needs_more_than_vectors_says_so():
    with pytest.raises(NotImplementedError, match="DualColourMatcher does not score by vectors"):
        Matcher.match_embeds(DualColourMatcher(), torch.zeros(1, 2), torch.zeros(1, 2))
