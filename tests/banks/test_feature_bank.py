"""Features from the bank against features made on the spot."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stubs import LetterMatcher
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lavis_dcd.banks import feature_bank, shards
from lavis_dcd.banks.bank_records import FORMAT, KIND, UNFINISHED, UNFINISHED_KIND
from lavis_dcd.banks.encoding import encode_dataset
from lavis_dcd.banks.feature_bank import FeatureBank, build_feature_bank, weights_fingerprint
from lavis_dcd.banks.feature_sets import BankedEvaluationSet, BankedTrainingSet
from lavis_dcd.common import locks
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import MANIFEST, Manifest
from lavis_dcd.datasets.tree import plain_sets
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class Toy(LetterMatcher):
    """Named in a message."""


def picture(name: str) -> Tensor:
    return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(sum(map(ord, name))))


class Training(Dataset):
    """LAVIS's retrieval training shape: a row per caption."""

    vis_root = None

    def __init__(self, names: str = "aab") -> None:
        self.annotation = [
            {"image": n, "image_id": f"id {n}", "caption": f"{n.upper()} No {i % 3}", "instance_id": str(i)}
            for i, n in enumerate(names)
        ]
        self.img_ids = {f"id {n}": i for i, n in enumerate(sorted(set(names)))}
        self.text_processor = str.lower

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {
            "image": picture(row["image"]),
            "text_input": self.text_processor(row["caption"]),
            "image_id": self.img_ids[row["image_id"]],
            "instance_id": row["instance_id"],
        }

    def collater(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return default_collate(items)


class Evaluation(Dataset):
    vis_root = None

    def __init__(self) -> None:
        self.annotation = [{"image": "c"}, {"image": "d"}]
        self.image = ["c", "d"]
        self.text = ["a no 0", "a longer caption", "d"]
        self.txt2img = {0: 0, 1: 0, 2: 1}
        self.img2txt = {0: [0, 1], 1: [2]}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": picture(self.image[index]), "index": index}


class Drawing(Dataset):
    """A wrapper that adds two captions of the set to every row."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.epoch = dataset, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "candidate_text": ["b no 2", "a no 0"], "candidate_image_id": [1, 0]}

    def collater(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        plain = [{k: v for k, v in item.items() if not k.startswith("candidate")} for item in items]
        return {
            **self.dataset.collater(plain),
            "candidate_text": [text for item in items for text in item["candidate_text"]],
            "candidate_image_id": torch.tensor([item["candidate_image_id"] for item in items]),
        }

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def bank_of(matcher: Toy, **options: Any) -> FeatureBank:
    sets = {"train": Training(), "val": Evaluation()}
    return build_feature_bank(matcher, sets, 2, torch.float32, **options)


def test_every_distinct_picture_and_caption_is_encoded_once() -> None:
    matcher = Toy()
    bank = bank_of(matcher)
    assert matcher.pictures == 4  # a, b of the training set; c, d
    assert sorted(matcher.encoded) == ["a longer caption", "a no 0", "a no 1", "b no 2", "d"]
    assert len(bank.text_store.shards[0].tokens) == len("".join(matcher.encoded))  # no padding is kept
    assert not bank.image_store.shards[0].tokens.requires_grad
    assert bank.picture_rows == {"train": [0, 0, 1], "val": [2, 3]}


def assert_same(got: ImageFeatures | TextFeatures, expected: ImageFeatures | TextFeatures) -> None:
    mask = expected.mask
    if mask is None:
        assert got.mask is None and torch.allclose(got.tokens, expected.tokens)
    else:
        assert torch.equal(got.mask, mask)
        assert torch.allclose(got.tokens[mask], expected.tokens[mask]) and not got.tokens[~mask].any()
    assert (got.embeds is None) == (expected.embeds is None)
    if got.embeds is not None:
        assert torch.allclose(got.embeds, expected.embeds)


def test_a_batch_carries_what_the_encoders_would_make_of_it() -> None:
    matcher, plain = Toy(), Training()
    banked = BankedTrainingSet(plain, bank_of(matcher))
    batch = banked.collater([banked[i] for i in (2, 0)])
    expected = plain.collater([plain[i] for i in (2, 0)])
    assert_same(batch["image"], matcher.encode_images(expected["image"]))
    assert_same(batch["text_features"], matcher.encode_texts(expected["text_input"]))
    assert batch["text_input"] == expected["text_input"] and batch["instance_id"] == ["2", "0"]
    assert torch.equal(batch["image_id"], expected["image_id"])


@pytest.mark.parametrize("order", ["bank around wrapper", "wrapper put in afterwards"])
def test_drawn_captions_get_features_too(order: str) -> None:
    matcher = Toy()
    bank = bank_of(matcher)
    if order == "bank around wrapper":
        banked = BankedTrainingSet(Drawing(Training()), bank)
    else:
        banked = BankedTrainingSet(Training(), bank).wrapped(Drawing)
    batch = banked.collater([banked[i] for i in range(3)])
    texts = [*batch["text_input"], *batch["candidate_text"]]
    assert len(texts) == 3 + 6
    assert_same(batch["text_features"], matcher.encode_texts(texts))
    banked.set_epoch(4)
    assert banked.dataset.epoch == 4


def test_an_evaluation_set_answers_from_the_bank_for_matchers_with_the_same_encoders() -> None:
    matcher, plain = Toy(), Evaluation()
    banked = BankedEvaluationSet(plain, bank_of(matcher), "val")
    direct = encode_dataset(matcher, plain)
    matcher.pictures = 0
    from_bank = encode_dataset(matcher, banked)
    assert matcher.pictures == 0
    assert_same(from_bank[0], direct[0])
    assert_same(from_bank[1], direct[1])
    assert banked.txt2img == plain.txt2img and len(banked) == 2
    stranger = Toy()
    assert banked.banked_rows(stranger) is None
    encode_dataset(stranger, banked)
    assert stranger.pictures == 2


def test_float32_keeps_what_the_encoders_gave_to_the_bit(tmp_path) -> None:
    matcher = Toy()
    with torch.no_grad():
        for parameter in matcher.parameters():
            parameter.mul_(1 / 3)
    sets = {"train": Training("abcdef")}
    kept = build_feature_bank(matcher, sets, 6, torch.float32, tmp_path)
    pictures = matcher.encode_images(torch.stack([picture(name) for name in "abcdef"]))
    got = kept.images(range(6))
    assert torch.equal(got.tokens, pictures.tokens) and torch.equal(got.embeds, pictures.embeds)
    texts = sorted(kept.caption_rows, key=len)
    fresh, kept_texts = matcher.encode_texts(texts), kept.texts(texts)
    assert torch.equal(kept_texts.tokens[fresh.mask], fresh.tokens[fresh.mask])
    half = build_feature_bank(matcher, sets, 6, torch.float16, tmp_path).images(range(6))
    assert torch.equal(half.tokens, pictures.tokens.half())  # rounded, and nothing else


def test_half_precision_is_kept_and_float32_is_evaluated() -> None:
    matcher = Toy()
    bank = build_feature_bank(matcher, {"train": Training()})
    images = bank.images([0])
    assert images.tokens.dtype == images.embeds.dtype == bank.texts(["a no 0"]).tokens.dtype == torch.float16
    assert torch.allclose(images.tokens.float(), matcher.encode_images(picture("a")[None]).tokens, atol=2e-3)
    bank = build_feature_bank(matcher, {"val": Evaluation()})
    assert BankedEvaluationSet(Evaluation(), bank, "val").banked_rows(matcher)[0][:].tokens.dtype == torch.float32


def same_bank(one: FeatureBank, other: FeatureBank) -> bool:
    for mine, yours in ((one.image_store, other.image_store), (one.text_store, other.text_store)):
        rows = range(len(mine))
        a, b = mine.gather(rows, ImageFeatures), yours.gather(rows, ImageFeatures)
        same = torch.equal(a.tokens, b.tokens) and torch.equal(a.full_mask(), b.full_mask())
        if not same or len(mine) != len(yours):
            return False
    return one.picture_rows == other.picture_rows and one.caption_rows == other.caption_rows


def test_a_bank_on_disk_serves_the_next_run_and_no_other(tmp_path, caplog) -> None:
    matcher = Toy()
    key = weights_fingerprint(matcher.encoder_modules())
    with caplog.at_level(logging.INFO):
        first = bank_of(matcher, folder=tmp_path, fingerprint=key)
    said = "features of 4 pictures and 5 captions: 0.0 MB as float32 (pictures 0.0 MB, captions 0.0 MB) to be written"
    assert said in caplog.text
    made, read = matcher.pictures, len(matcher.encoded)
    again = bank_of(matcher, folder=tmp_path, fingerprint=key)
    assert (matcher.pictures, len(matcher.encoded)) == (made, read) and len(list(tmp_path.iterdir())) == 1
    assert same_bank(first, again) and same_bank(first, bank_of(matcher))
    with torch.no_grad():
        matcher.vision.bias += 1
    changed = weights_fingerprint(matcher.encoder_modules())
    assert changed != key
    bank_of(matcher, folder=tmp_path, fingerprint=changed)
    assert matcher.pictures > made and len(list(tmp_path.iterdir())) == 2
    build_feature_bank(matcher, {"train": Training(), "val": Evaluation()}, 2, folder=tmp_path, fingerprint=changed)
    assert len(list(tmp_path.iterdir())) == 3  # half precision is another bank


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(("after_pictures", "after_texts"), [(5, 99), (99, 9)])
def test_an_interrupted_build_goes_on_where_it_was(tmp_path, monkeypatch, after_pictures, after_texts) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)  # every batch is a shard
    sets = {"train": Training("abcdefg"), "val": Evaluation()}

    class Stopping(Toy):
        stopped = False

        def encode_images(self, images: Tensor) -> ImageFeatures:
            if self.pictures >= after_pictures and not self.stopped:
                raise StoppedError
            return super().encode_images(images)

        def encode_texts(self, texts: list[str]) -> TextFeatures:
            if len(self.encoded) >= after_texts - 1 and not self.stopped:
                raise StoppedError
            return super().encode_texts(texts)

    matcher = Stopping()
    with pytest.raises(StoppedError):
        build_feature_bank(matcher, sets, 2, torch.float32, tmp_path)
    matcher.stopped = True
    kept, read = matcher.pictures, len(matcher.encoded)
    bank = build_feature_bank(matcher, sets, 2, torch.float32, tmp_path)
    assert matcher.pictures == 9  # a to g of the training set, c and d of the other; none twice
    # the first captions were read for the announcement, before any was written
    assert len(matcher.encoded) == len(bank.caption_rows) + (8 if after_pictures == 5 else 0)
    assert kept == (6 if after_pictures == 5 else 9) and read == 8
    plain = Toy()
    plain.load_state_dict(matcher.state_dict())
    assert same_bank(bank, build_feature_bank(plain, sets, 2, torch.float32))
    assert [p.name for p in tmp_path.iterdir()] == [bank.image_store.source[0].name]  # neither lock nor part of a file


def test_processes_that_want_the_same_bank_build_it_once(tmp_path, monkeypatch) -> None:
    pytest.importorskip("fcntl")
    told, banks = threading.Event(), []
    inform = locks.log.info
    monkeypatch.setattr(locks.log, "info", lambda *words: (told.set(), inform(*words)))

    class Slow(Toy):
        def encode_images(self, images: Tensor) -> ImageFeatures:
            assert told.wait(30)  # until the other one waits
            return super().encode_images(images)

    matcher = Slow()
    threads = [threading.Thread(target=lambda: banks.append(bank_of(matcher, folder=tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert matcher.pictures == 4 and same_bank(*banks) and len(list(tmp_path.iterdir())) == 1


def test_a_shard_that_is_damaged_is_written_again(tmp_path, caplog) -> None:
    matcher = Toy()
    bank = bank_of(matcher, folder=tmp_path)
    expected = same_bank(bank, bank_of(matcher))
    shard = next(tmp_path.glob("*/images-00000.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    made = matcher.pictures
    again = bank_of(matcher, folder=tmp_path)
    assert matcher.pictures == made + 4 and "images-00000.safetensors is cut short" in caplog.text
    assert expected and same_bank(again, bank_of(matcher))


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def bank_of_shards(folder: Path | None, monkeypatch, matcher: Toy) -> FeatureBank:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    sets = {"train": Training("abcdefg"), "val": Evaluation()}
    return build_feature_bank(matcher, sets, 2, torch.float32, folder)


@pytest.mark.parametrize("unfinished", [False, True])
def test_changed_bytes_are_noticed_and_made_again(tmp_path, monkeypatch, caplog, unfinished) -> None:
    """One bit, under the same size and time; the shards before it are kept."""
    matcher = Toy()
    expected = bank_of_shards(None, monkeypatch, matcher)  # in memory: a mapped one changes with its files
    folder, made = bank_of_shards(tmp_path, monkeypatch, matcher).image_store.source[0], matcher.pictures
    whole = shard_bytes(folder)
    if unfinished:  # as a build leaves it that is killed before its end
        manifest = Manifest.read(folder, KIND, FORMAT)
        replace(manifest, kind=UNFINISHED_KIND).write(folder, UNFINISHED)
        (folder / MANIFEST).unlink()
    flip(folder / "images-00002.safetensors", -3)
    again = bank_of_shards(tmp_path, monkeypatch, matcher)
    assert matcher.pictures == made + 9 - 4  # rows 4 to 8
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == f"{folder}: the checksum of images-00002.safetensors does not fit it; it is made again, and what " \
                   "follows it"  # fmt: skip
    assert same_bank(expected, again) and shard_bytes(folder) == whole


def flip(path: Path, at: int, bit: int = 0) -> None:
    content, facts = bytearray(path.read_bytes()), path.stat()
    content[at] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_a_foreign_bank_under_this_ones_name_is_not_taken(tmp_path, monkeypatch, caplog) -> None:
    mine, other = Toy(), Toy()
    expected = bank_of_shards(tmp_path / "mine", monkeypatch, mine)
    folder = expected.image_store.source[0]
    foreign = build_feature_bank(
        other, {"train": Training("abcdefg"), "val": Evaluation()}, 2, torch.float32, tmp_path / "other",
        fingerprint="another's",
    )  # fmt: skip
    shutil.rmtree(folder)
    shutil.copytree(foreign.image_store.source[0], folder)
    assert same_bank(bank_of_shards(tmp_path / "mine", monkeypatch, mine), expected)
    assert "manifest.json is of another bank: the encoders differ" in caplog.text


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_to_a_file_the_bank_is_the_same(tmp_path, monkeypatch, seed) -> None:
    draw, matcher = random.Random(seed), Toy()
    expected = bank_of_shards(None, monkeypatch, matcher)  # in memory: a mapped one changes with its files
    folder = bank_of_shards(tmp_path, monkeypatch, matcher).image_store.source[0]
    whole = shard_bytes(folder)
    for _ in range(4):
        for path in draw.sample(sorted(folder.iterdir()), draw.choice([1, 1, 2])):
            spoil(path, draw)
        again = bank_of_shards(tmp_path, monkeypatch, matcher)
        assert same_bank(again, expected) and same_bank(bank_of_shards(tmp_path, monkeypatch, matcher), expected)
        files = shard_bytes(folder)
        assert {n: c for n, c in files.items() if n != MANIFEST} == {n: c for n, c in whole.items() if n != MANIFEST}
        Manifest.read(folder, KIND, FORMAT).check_files(folder)


def spoil(path: Path, draw: random.Random) -> None:
    size = path.stat().st_size
    how = draw.choice(["flip", "flip", "cut", "empty", "longer", "gone", "a folder", "a link", "another's"])
    if how == "flip":
        flip(path, draw.randrange(size), draw.randrange(8))
    elif how == "cut":
        os.truncate(path, draw.randrange(size))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(path.read_bytes() + draw.randbytes(8))
    elif how == "another's":
        path.write_bytes(draw.choice(sorted(path.parent.glob("*-*"))).read_bytes())
    else:
        content = path.read_bytes()
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a link":
            (path.parent.parent / f"elsewhere-{path.name}").write_bytes(content)
            path.symlink_to(path.parent.parent / f"elsewhere-{path.name}")


def test_a_disk_that_is_full_is_one_line_and_the_rest_serves(tmp_path, monkeypatch) -> None:
    matcher = Toy()
    for name in ("images-00001.safetensors", UNFINISHED, MANIFEST):
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            full_for(patch, name)
            with pytest.raises(UserError, match=rf"{name} cannot be written to .*No space left.*LAVIS_CACHE"):
                bank_of_shards(folder, patch, matcher)
        assert not list(folder.rglob("*.tmp"))
        mended = bank_of_shards(folder, monkeypatch, matcher)
        assert same_bank(mended, bank_of_shards(tmp_path / "whole", monkeypatch, matcher))


def full_for(patch: pytest.MonkeyPatch, name: str) -> None:
    real = os.replace

    def replace_or_not(source, target) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    patch.setattr(os, "replace", replace_or_not)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(UserError, match=r"kept.* cannot be written to"):
        bank_of(Toy(), folder=tmp_path / "kept")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch) -> None:
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=200)

    monkeypatch.setattr(feature_bank.shutil, "disk_usage", usage)
    folder = tmp_path / "cache" / "dcd_features"
    with pytest.raises(UserError) as caught:
        bank_of(Toy(), folder=folder)
    # 4 pictures of 4 tokens x 4 floats, their embeds and counts; the captions likewise
    (line,) = caught.value.faults
    assert "features of 4 pictures and 5 captions need about 0.0 MB of disk" in line and "0.0 MB free" in line
    for way_out in ("LAVIS_CACHE", "run.cache_dtype=float16", "run.cache_features=off"):
        assert way_out in line
    assert not list(folder.iterdir()) and asked[0] in (tmp_path, folder)
    monkeypatch.setattr(feature_bank.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert len(bank_of(Toy(), folder=folder).image_store) == 4


def test_the_announced_size_is_that_of_the_files(tmp_path, monkeypatch) -> None:
    matcher, sets = Toy(), {"train": Training("abcdefgh"), "val": Evaluation()}
    free = {}

    def needs(size: int) -> bool:
        monkeypatch.setattr(feature_bank.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
        try:
            free["bank"] = build_feature_bank(matcher, sets, 16, torch.float32, tmp_path / str(size))
        except UserError:
            return True
        return False

    needs(10**6)
    exact = free["bank"].nbytes  # one batch each, so that the sample is everything
    assert needs(exact - 32) and not needs(exact + 32)


def test_loader_processes_get_neither_the_encoders_nor_the_rows(tmp_path) -> None:
    matcher = Toy()
    bank = bank_of(matcher, folder=tmp_path)
    sent = pickle.loads(pickle.dumps(bank))
    assert sent.matcher is None and not sent.serves(matcher) and bank.serves(matcher)
    assert same_bank(bank, sent)
    banked = BankedTrainingSet(Training(), bank)
    loader = torch.utils.data.DataLoader(banked, 2, num_workers=1, collate_fn=banked.collater)
    batches = list(loader)
    assert torch.equal(batches[0]["image"].tokens, bank.images([0, 0]).tokens)


def test_candidate_pictures_follow_those_of_the_samples() -> None:
    matcher = Toy()
    bank = bank_of(matcher)
    banked = BankedTrainingSet(Training(), bank)
    rows = torch.tensor([3, 1, 2, 2])
    banked = banked.wrapped(lambda plain: WithCandidates(plain, rows))
    batch = banked.collater([banked[i] for i in (2, 0)])
    assert "candidate_image" not in batch
    expected = matcher.encode_images(torch.stack([picture(name) for name in "badbcc"]))
    assert_same(batch["image"], expected)


class WithCandidates(Dataset):
    def __init__(self, dataset: Any, rows: Tensor) -> None:
        self.dataset, self.rows = dataset, rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def collater(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {**default_collate(items), "candidate_image": self.rows}


class Scaled:
    """A processor: a letter's picture, times a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, name: str) -> Tensor:
        return self.factor * picture(name)


class Files(Training):
    """A set of files: the same picture has the same key in every set."""

    def __init__(self, names: str, root: Any, factor: float) -> None:
        super().__init__(names)
        self.vis_root, self.vis_processor = str(root), Scaled(factor)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "image": self.vis_processor(self.annotation[index]["image"])}


def test_a_picture_under_two_processors_has_two_rows(tmp_path) -> None:
    matcher = Toy()
    sets = {"train": Files("abb", tmp_path, 1), "same": Files("bc", tmp_path, 1), "other": Files("ab", tmp_path, 2)}
    bank = build_feature_bank(matcher, sets, 2, torch.float32)
    assert bank.picture_rows == {"train": [0, 1, 1], "same": [1, 2], "other": [3, 4]}
    assert_same(bank.images([0, 3]), matcher.encode_images(torch.stack([picture("a"), 2 * picture("a")])))


def test_processors_are_part_of_a_banks_name(tmp_path) -> None:
    for factor in (1, 2, 1):
        build_feature_bank(Toy(), {"train": Files("abb", tmp_path, factor)}, folder=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_same_names_in_two_sets_without_files_are_different_pictures() -> None:
    bank = build_feature_bank(Toy(), {"train": Training(), "other": Training()})
    assert bank.picture_rows == {"train": [0, 0, 1], "other": [2, 2, 3]}


def test_a_concatenation_answers_from_the_bank_of_its_sets() -> None:
    both = torch.utils.data.ConcatDataset([Training(), Training("cd")])
    banked = BankedTrainingSet(both, build_feature_bank(Toy(), plain_sets(both, "train")))
    assert len(banked) == 5 and banked[3]["text_input"] == "c no 0"


def test_encoders_that_learn_and_foreign_sets_are_refused() -> None:
    matcher = Toy()
    with pytest.raises(UserError, match="'train' \\(TensorDataset\\)"):
        build_feature_bank(matcher, {"train": torch.utils.data.TensorDataset(torch.zeros(2))})
    matcher.vision.requires_grad_(True)
    with pytest.raises(UserError, match="cache_features: the encoders of Toy learn"):
        bank_of(matcher)


def test_features_too_large_for_half_precision_are_refused() -> None:
    matcher = Toy()
    with torch.no_grad():
        matcher.vision.bias += 1e6
    with pytest.raises(UserError, match=r"do not fit torch.float16; set run.cache_dtype=bfloat16 or float32"):
        build_feature_bank(matcher, {"train": Training()})
    kept = build_feature_bank(matcher, {"train": Training()}, dtype=torch.bfloat16).images([0])
    assert kept.tokens.dtype == torch.bfloat16
    assert torch.allclose(kept.tokens.float(), matcher.encode_images(picture("a")[None]).tokens, rtol=2**-8)


class Sized(Toy):
    """Reads as many tokens of a picture as its first value says, so that batches differ in their longest."""

    def encode_images(self, images: Tensor) -> ImageFeatures:
        features = super().encode_images(images)
        counts = 1 + images[:, 0, 0, 0].gt(0) * 3
        mask = torch.arange(4) < counts[:, None]
        return ImageFeatures(features.tokens * mask[..., None], mask).trimmed()


def test_pictures_of_other_sizes_are_kept_with_their_masks() -> None:
    torch.manual_seed(0)
    matcher = Sized()
    bank = build_feature_bank(matcher, {"train": Training("abcdef")}, batch_size=1, dtype=torch.float32)
    counts = set()
    for name in "abcdef":
        expected = matcher.encode_images(picture(name)[None])
        assert_same(bank.images(["abcdef".index(name)]), expected)
        counts.add(expected.tokens.shape[1])
    assert counts == {1, 4}
