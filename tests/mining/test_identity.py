import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lavis")
from lavis.datasets.datasets.base_dataset import ConcatDataset

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.common.schema import parse
from lavis_dcd.datasets import identity as data_identity
from lavis_dcd.datasets.identity import Content
from lavis_dcd.datasets.rows import RetrievalEvalRows, RetrievalRows
from lavis_dcd.datasets.views import View
from lavis_dcd.mining.identity import bank_identity, identity_of, teacher_views
from lavis_dcd.models.dcd.config import DcdConfig


class Scaled:
    """Pixels times a factor; with chance, plus a random number."""

    def __init__(self, factor: float = 1.0, chance: bool = False) -> None:
        self.factor, self.chance = factor, chance

    def __call__(self, picture) -> torch.Tensor:
        made = torch.from_numpy(np.asarray(picture, dtype=np.float32)) * self.factor
        return made + torch.rand(()) if self.chance else made


@pytest.fixture
def train_set(pictures: list[dict], tmp_path: Path):
    rows = [
        {"image": row["image"], "caption": caption, "image_id": row["image"]}
        for row in pictures for caption in row["caption"]
    ]  # fmt: skip

    def build(rows: list[dict] = rows, processor: Any = None, text: Any = str.lower) -> RetrievalRows:
        return RetrievalRows(processor or Scaled(), text, str(tmp_path / "photos"), [dict(row) for row in rows])

    build.rows = rows
    return build


@pytest.fixture
def section(tmp_path: Path) -> dict:
    weights = tmp_path / "teacher.pth"
    weights.write_bytes(b"weights")
    return {"arch": "dual_encoder", "model_type": "tiny", "load_finetuned": True, "finetuned": str(weights)}


def changed(before: Identity, after: Identity) -> set[str]:
    return {words.removeprefix("the ") for words in before.differences(after)}


def identity(
    section: dict, data: Any, *more: tuple[str, dict], view: Any = None, content: Content = "sample"
) -> Identity:
    return bank_identity([("model.teacher", section), *more], data, view, content)


def test_the_same_job_has_the_same_identity(section, train_set):
    found = identity(section, train_set())
    assert identity(dict(section), train_set()) == found
    parts = [*found.settings.values(), *found.rows.values(), *found.pictures.values()]
    assert len(parts) == 4 and all(len(part) == 64 for part in parts)


def test_weights_are_known_by_their_content(section, train_set, tmp_path):
    before, data = identity(section, train_set()), train_set()
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes(b"weights")
    assert changed(before, identity({**section, "finetuned": str(moved)}, data)) == set()
    Path(section["finetuned"]).write_bytes(b"Weights")
    assert changed(before, identity(section, data)) == {"teacher"}


def test_settings_that_change_scores_count_and_others_do_not(section, train_set):
    data = train_set()
    before = identity(section, data)
    for same in ({"match_memory_mb": 1.0}, {"loss": {"label_smoothing": 0.1}}, {"pretrained": "never_read.pth"},
                 {"preprocess": {"vis_processor": None}}, {"weight": 3.0}):  # fmt: skip
        assert changed(before, identity({**section, **same}, data)) == set(), same
    for other in ({"head": {"dim": 7}}, {"text": {"max_length": 9}}, {"vision": {"image_size": 33}}):
        assert changed(before, identity({**section, **other}, data)) == {"teacher"}, other
    unread = {**section, "load_finetuned": False, "pretrained": section["finetuned"]}
    assert changed(before, identity(unread, data)) == {"teacher"}


def test_files_of_a_folder_count(section, train_set, tmp_path):
    folder, data = tmp_path / "tokenizer", train_set()
    folder.mkdir()
    (folder / "vocab.txt").write_text("a\nb")
    named = {**section, "text": {"name": str(folder)}}
    before = identity(named, data)
    assert changed(before, identity(named, data)) == set()
    (folder / "vocab.txt").write_text("a\nc")
    assert changed(before, identity(named, data)) == {"teacher"}


def test_a_name_that_is_no_path_is_not_looked_up(section, train_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = train_set()
    before = identity(section, data)
    Path("dual_encoder").mkdir()
    Path("dual_encoder", "file").write_text("x")
    assert identity(section, data) == before


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300, "a\0b/c"])
def test_a_name_that_no_file_can_have_is_a_name(section, train_set, name):
    named = {**section, "text": {"name": name}}
    assert identity(named, train_set()) == identity(named, train_set()) != identity(section, train_set())


def test_several_teachers_and_their_weights(section, train_set):
    data, second = train_set(), ("model.teachers.1", section)
    one, two = identity(section, data), identity(section, data, second)
    assert changed(one, two) == {"teacher"}
    heavier = identity(section, data, ("model.teachers.1", {**section, "weight": 2.0}))
    assert changed(two, heavier) == {"teacher"}


def test_a_teacher_without_weights_is_refused(section, train_set):
    bare = {**section, "finetuned": None, "vision": {"weights": None}}
    with pytest.raises(UserError, match=r"model\.teacher\.finetuned: names no file of weights.*FILE"):
        identity(bare, train_set())


def test_captions_pictures_and_their_order_count(section, train_set, tmp_path):
    rows = train_set.rows
    before = identity(section, train_set())
    renamed = [{**rows[0], "caption": "another"}, *rows[1:]]
    assert "rows of train" in changed(before, identity(section, train_set(renamed)))
    inner = [*rows[:1], rows[2], rows[1], *rows[3:]]
    assert changed(before, identity(section, train_set(inner))) == {"rows of train"}
    assert "rows of train" in changed(before, identity(section, train_set(rows[:-1])))
    halves = ConcatDataset([train_set(rows[:6]), train_set(rows[6:])])
    assert "rows of train.0" in changed(before, identity(section, halves))
    file = tmp_path / "photos" / rows[5]["image"]
    os.utime(file, ns=(1, 1))
    assert changed(before, identity(section, train_set())) == {"pictures of train"}


@pytest.mark.parametrize("content", ["sample", "all"])
def test_a_picture_of_the_same_size_and_time_is_another(section, train_set, tmp_path, content, monkeypatch):
    """One that is none of those that show how the teacher reads; in a sample of 2 there is the first and the last."""
    monkeypatch.setattr(data_identity, "SAMPLE", 2)
    names = list(dict.fromkeys(row["image"] for row in train_set.rows))
    rows = [row for row in train_set.rows if row["image"] in names[1:]]
    shown = {round(i * (len(rows) - 1) / 3) for i in range(4)}
    file = next(r["image"] for r in rows if r["image"] not in {rows[i]["image"] for i in shown} | {names[1], names[-1]})
    before = identity(section, train_set(rows), content=content)
    path = tmp_path / "photos" / file
    bytes_, facts = bytearray(path.read_bytes()), path.stat()
    bytes_[len(bytes_) // 2] ^= 1
    path.write_bytes(bytes_)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    expected = {"pictures of train"} if content == "all" else set()
    assert changed(before, identity(section, train_set(rows), content=content)) == expected
    monkeypatch.undo()
    assert changed(before, identity(section, train_set(rows), content=content)) == {"pictures of train"}


def test_the_middle_of_a_large_file_in_a_folder_counts(section, train_set, tmp_path):
    folder, data = tmp_path / "tokenizer", train_set()
    folder.mkdir()
    with (folder / "model.bin").open("wb") as file:
        file.truncate(80 << 20)  # a file with holes: it takes no room
    named = {**section, "text": {"name": str(folder)}}
    before = identity(named, data)
    with (folder / "model.bin").open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"x")
    assert changed(before, identity(named, data)) == {"teacher"}


def test_pictures_in_memory_are_hashed(section, train_set):
    from PIL import Image

    def drawn(shade: int):
        data = train_set()
        data.vis_root = ""
        data.picture = lambda index: Image.new("RGB", (4, 4), (index, shade, 0))
        return identity(section, data, view=View(vis_eval=lambda _: torch.zeros(1)))

    assert drawn(1) == drawn(1)
    assert changed(drawn(1), drawn(2)) == {"pictures of train"}


def test_reading_counts(section, train_set):
    data = train_set()
    before = identity(section, data)
    assert changed(before, identity(section, train_set(processor=Scaled(2.0)))) == {"transforms"}
    assert changed(before, identity(section, train_set(text=str.upper))) == {"transforms"}
    own = View(vis_eval=Scaled(2.0), text_eval=str.lower)
    assert identity(section, data, view=own) == identity(section, train_set(processor=Scaled(2.0)))


def test_a_reading_with_chance_is_refused(section, train_set):
    with pytest.raises(UserError, match="something else of a picture each time"):
        identity(section, train_set(processor=Scaled(chance=True)))


def test_evaluation_sets_are_refused(section, train_set):
    with pytest.raises(UserError, match="retrieval shape"):
        identity(section, RetrievalEvalRows(Scaled(), str, "", [{"image": "i", "caption": ["c"], "image_id": "i"}]))


def config(section: dict, **more: Any) -> DcdConfig:
    return parse(DcdConfig, {"teacher": section, "student": {"arch": "dual_encoder", "model_type": "tiny"}, **more})


def test_who_reads_through_what(section, train_set, pictures, tmp_path):
    def processor(size: int) -> dict:
        return {"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": size}}}

    evaluation = RetrievalEvalRows(Scaled(3.0), str.upper, str(tmp_path / "photos"), [])
    data = {"train": train_set(processor=Scaled(chance=True)), "val": evaluation}
    start = {"arch": "dual_encoder", "init_from_teacher": {"towers": True}}

    shared = teacher_views(config(section, student=start), data)[0]
    assert shared.vis_eval is evaluation.vis_processor and shared.text_eval is str.upper
    as_student = teacher_views(config(section, student={**start, "preprocess": processor(20)}), data)[0]
    assert as_student.vis_eval(_picture()).shape[-1] == 20 and as_student.text_eval is str.upper
    own = teacher_views(config({**section, "preprocess": processor(24)}, student=start), data)[0]
    assert own.vis_eval(_picture()).shape[-1] == 24
    meter = {"arch": "meter_retrieval", "model_type": "quickstart"}
    of_its_type = teacher_views(config(meter), data)[0]
    assert of_its_type.vis_eval is not evaluation.vis_processor
    # without an evaluation split the training set's own
    alone = teacher_views(config(section, student=start), {"train": data["train"]})[0]
    assert alone.vis_eval is data["train"].vis_processor
    found = identity_of(config(section, student=start), data)
    assert found == bank_identity([("model.teacher", section)], data["train"], shared)


def _picture():
    from PIL import Image

    return Image.new("RGB", (40, 40))
