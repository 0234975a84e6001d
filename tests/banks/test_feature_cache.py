"""When a job's features may be kept, and what it reads then."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from stubs import StubMatcher
from torch import Tensor, nn
from torchvision import transforms

from lavis_dcd.banks.feature_cache import draws_at_random, encoders_fingerprint, with_kept_features
from lavis_dcd.banks.feature_sets import BankedEvaluationSet, BankedTrainingSet
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import main_process_first
from lavis_dcd.common.seeding import rng_state
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets import identity
from lavis_dcd.datasets.rows import RetrievalEvalRows, RetrievalRows
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.processors.captions import DcdCaptionProcessor
from lavis_dcd.processors.images import DcdImageEvalProcessor, DcdImageTrainProcessor


class Reader(StubMatcher):
    """Tokens are a picture's columns and a caption's letters."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1).requires_grad_(False))
        self.pictures = 0

    def encode_images(self, images: Tensor) -> ImageFeatures:
        self.pictures += len(images)
        return ImageFeatures(images.mean(2).transpose(1, 2) / 3)

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        ids = torch.tensor([[ord(letter) / 7 for letter in text[:3]] for text in texts])
        return TextFeatures(ids[..., None])


class Telling(Reader):
    def encoder_signature(self) -> str | None:
        return "s" * 64


@pytest.fixture
def photos(tmp_path):
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
        file = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(file)
        file.write_bytes(file.read_bytes() + b"behind the picture")
    return tmp_path


def training(root, processor: Any, words: Any = None, pictures: Sequence[int] = (0, 1, 1, 2)) -> RetrievalRows:
    rows = [{"image": f"{n}.png", "caption": f"abc {n}", "image_id": n} for n in pictures]
    return RetrievalRows(processor, words or DcdCaptionProcessor(), str(root), rows)


def evaluation(root, processor: Any) -> RetrievalEvalRows:
    rows = [{"image": f"{n}.png", "caption": [f"bcd {n}"], "image_id": n} for n in (2, 3, 4)]
    return RetrievalEvalRows(processor, DcdCaptionProcessor(), str(root), rows)


def train_processor(**keys: Any) -> DcdImageTrainProcessor:
    return DcdImageTrainProcessor.from_config({"image_size": 16, **keys})


EVAL = DcdImageEvalProcessor.from_config({"image_size": 16})
MODES = ("memory", "disk")


def kept(datasets: dict[str, Any], mode: str = "memory", matcher: Reader | None = None, **run: Any) -> dict[str, Any]:
    return with_kept_features(datasets, {"student": matcher or Reader()}, (), RunConfig(cache_features=mode, **run))


@pytest.mark.parametrize("mode", MODES)
def test_training_and_evaluation_read_their_own_processors(photos, monkeypatch, mode):
    monkeypatch.setenv("LAVIS_CACHE", str(photos / "cache"))
    cropped = train_processor(resize="crop")
    matcher, plain = Reader(), {"train": training(photos, cropped), "val": evaluation(photos, EVAL)}
    sets = kept(plain, mode, matcher=matcher, cache_dtype="float32")
    assert isinstance(sets["train"], BankedTrainingSet) and isinstance(sets["val"], BankedEvaluationSet)
    shown = 2 if mode == "disk" else 0  # a matcher without a signature shows what it is
    assert matcher.pictures == 3 + 3 + shown  # picture 2 is read in two ways
    batch = sets["train"].collater([sets["train"][row] for row in range(4)])
    fresh = matcher.encode_images(torch.stack([plain["train"][row]["image"] for row in range(4)]))
    assert torch.equal(batch["image"].tokens, fresh.tokens)
    assert torch.equal(batch["text_features"].tokens, matcher.encode_texts(batch["text_input"]).tokens)
    images, texts = (rows[:] for rows in sets["val"].banked_rows(matcher))
    fresh = matcher.encode_images(torch.stack([plain["val"][row]["image"] for row in range(3)]))
    assert torch.equal(images.tokens, fresh.tokens) and len(texts) == 3


def test_pictures_replaced_with_the_same_size_and_time_are_noticed(photos, monkeypatch):
    monkeypatch.setenv("LAVIS_CACHE", str(photos / "cache"))
    sets = {"train": training(photos, EVAL, pictures=(0, 1, 2, 2, 2, 2, 2, 2, 3))}
    for replaced, banks in ((False, 1), (False, 1), (True, 2)):
        if replaced:
            replace_unnoticed(photos / "1.png")
        kept(sets, "disk", Telling())
        assert len(list((photos / "cache" / "dcd_features").iterdir())) == banks


def test_contents_of_all_pictures_count_when_that_is_wanted(photos, monkeypatch):
    """A picture beyond the sample, replaced with the same size and time."""
    monkeypatch.setenv("LAVIS_CACHE", str(photos / "cache"))
    monkeypatch.setattr(identity, "SAMPLE", 2)  # the first and the last
    file = photos / "1.png"
    before = file.read_bytes()
    for content, banks in (("sample", 1), ("all", 3)):
        # picture 1 is neither in the sample nor among those that show the processor
        sets = {"train": training(photos, EVAL, pictures=(0, 1, 2, 2, 2, 2, 2, 2, 3))}
        file.write_bytes(before)
        os.utime(file, ns=(5, 5))
        kept(sets, "disk", Telling(), picture_content=content)
        replace_unnoticed(file)
        kept(sets, "disk", Telling(), picture_content=content)
        assert len(list((photos / "cache" / "dcd_features").iterdir())) == banks


def replace_unnoticed(file: Path) -> None:
    """Another byte in a file of the same size and time."""
    content, facts = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


class Cutting(Reader):
    """The same weights, another setting: texts are cut after two letters."""

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return super().encode_texts([text[:2] for text in texts])


def test_encoders_are_more_than_their_weights(photos):
    sets = {"train": training(photos, EVAL)}
    plain, other = Reader(), Cutting()
    other.load_state_dict(plain.state_dict())
    told = encoders_fingerprint(plain, sets, "off")
    assert encoders_fingerprint(plain, sets, "off") == told != encoders_fingerprint(other, sets, "off")
    assert encoders_fingerprint(Reader(), sets, "off") != told
    assert encoders_fingerprint(Telling(), sets, "off") == "s" * 64


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_precision_is_as_asked(photos, name):
    sets = kept({"train": training(photos, EVAL)}, cache_dtype=name)
    batch = sets["train"].collater([sets["train"][0]])
    assert batch["image"].tokens.dtype == getattr(torch, name)
    default = kept({"train": training(photos, EVAL)})["train"]
    assert default.collater([default[0]])["image"].tokens.dtype == torch.float16


def test_an_unknown_precision_is_told(photos):
    with pytest.raises(UserError, match=r"run\.cache_dtype: 'int8' is none of float16, bfloat16, float32"):
        kept({"train": training(photos, EVAL)}, cache_dtype="int8")


def test_the_processor_of_evaluation_is_shared_when_it_is_the_same(photos):
    matcher = Reader()
    twin = DcdImageEvalProcessor.from_config({"image_size": 16})
    kept({"train": training(photos, twin), "val": evaluation(photos, EVAL)}, matcher=matcher)
    assert matcher.pictures == 5


def shuffled(caption: str) -> str:
    words = caption.split()
    random.shuffle(words)
    return " ".join(words)


class Shuffling:
    def __call__(self, caption: str) -> str:
        return shuffled(caption)


@pytest.mark.parametrize("augment", ["flip", "randaugment"])
def test_random_augmentation_is_refused(photos, augment):
    matcher = Reader()
    sets = {"train": training(photos, train_processor(augment=augment), Shuffling()), "val": evaluation(photos, EVAL)}
    with pytest.raises(UserError) as caught:
        kept(sets, matcher=matcher)
    pictures, captions = caught.value.faults
    assert pictures.startswith(
        "run.cache_features: the vis_processor of train (DcdImageTrainProcessor) draws at random"
    )
    assert "datasets.*.vis_processor.train" in pictures and "run.cache_features=off" in pictures
    assert captions.startswith("run.cache_features: the text_processor of train (Shuffling) draws at random")
    assert matcher.pictures == 0
    assert set(kept(sets, evaluate=True)) == {"val"}  # nothing is trained on, so nothing is drawn


def test_a_training_processor_that_augments_nothing_passes(photos):
    assert len(kept({"train": training(photos, train_processor())})["train"]) == 4


class Own:
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, picture: Any) -> float:
        return float(self.random.random())


def processors():
    still = transforms.Lambda(lambda picture: 1.0)
    yield "flip", transforms.RandomHorizontalFlip(), True
    yield "never", transforms.RandomHorizontalFlip(0.0), False
    yield "seldom", transforms.RandomApply([transforms.Grayscale(3)], p=0.08), True
    yield "python", lambda picture: random.random(), True
    yield "numpy", lambda picture: np.random.rand(), True
    yield "own", Own(), True
    yield "still", still, False


@pytest.mark.parametrize(("processor", "expected"), [pytest.param(p, e, id=n) for n, p, e in processors()])
def test_randomness_is_found_by_trying(photos, processor, expected):
    pictures = [Image.open(photos / f"{number}.png").convert("RGB") for number in range(5)]
    assert draws_at_random(lambda row: processor(pictures[row]), 5) is expected


def test_looking_for_randomness_leaves_the_generators_alone():
    before = rng_state()
    assert draws_at_random(lambda row: (random.random(), np.random.rand(), torch.rand(1).item()), 3)
    after = rng_state()
    assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1]) and before["numpy"][2:] == after["numpy"][2:]


@pytest.mark.parametrize("fails", [False, True])
def test_under_torchrun_the_main_process_works_first(monkeypatch, fails):
    """Two threads stand for two processes."""
    rank, meet, order, errors = threading.local(), threading.Barrier(2, timeout=30), [], []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank.value)
    monkeypatch.setattr(dist, "new_group", lambda **_: "both")
    monkeypatch.setattr(dist, "barrier", lambda group: meet.wait())

    def work() -> None:
        order.append(rank.value)
        if fails:
            raise UserError("no room")

    def process(value: int) -> None:
        rank.value = value
        try:
            main_process_first(work)
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=process, args=(value,)) for value in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order == [0, 1] and errors == (["no room"] * 2 if fails else [])


def test_alone_there_is_nobody_to_wait_for():
    assert main_process_first(lambda: 3) == 3


def test_other_encoders_and_other_readings_are_refused(photos):
    sets = {"train": training(photos, EVAL)}
    run = RunConfig(cache_features="memory")
    with pytest.raises(UserError, match="the teacher has encoders of its own"):
        with_kept_features(sets, {"teacher": Reader(), "student": Reader()}, (), run)
    with pytest.raises(UserError, match="the teacher would read kept features of pictures that went through"):
        with_kept_features(sets, {"student": Reader()}, ["teacher"], run)
