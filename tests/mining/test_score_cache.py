import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lavis")
from omegaconf import OmegaConf

from lavis_dcd.banks.score_bank import BankTable, ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.rows import RetrievalRows
from lavis_dcd.mining.identity import identity_of
from lavis_dcd.mining.score_cache import KeptScores
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask

TEACHER = {"arch": "meter_retrieval", "model_type": "quickstart"}


class Drawn(RetrievalRows):
    """Four pictures of one colour each, one caption each."""

    def __init__(self) -> None:
        rows = [{"image": str(i), "caption": f"caption {i}", "image_id": str(i)} for i in range(4)]
        super().__init__(lambda picture: torch.tensor(picture.getpixel((0, 0))), str, "", rows)

    def picture(self, index: int):
        from PIL import Image

        return Image.new("RGB", (2, 2), (index, 0, 0))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.vis_processor(self.picture(index)), "text_input": str(index), "image_id": index}


def job(folder, run: dict | None = None, **candidates: Any) -> SimpleNamespace:
    model = {
        "arch": "dcd",
        "teacher": TEACHER,
        "student": {"arch": "dual_encoder", "model_type": "tiny"},
        "candidates": {"source": "bank", "bank": {"path": str(folder)}, **candidates},
        "selection": {"hard_negatives": 1},
    }
    parts = {"model_cfg": model, "datasets_cfg": {}, "run_cfg": run or {}}
    return SimpleNamespace(**{name: OmegaConf.create(part) for name, part in parts.items()})


@pytest.fixture
def left(tmp_path):
    """A folder with a bank of `Drawn`, mined with other settings than the default."""
    data = {"train": Drawn()}
    config = DcdConfig(teacher=TEACHER, student={"arch": "dual_encoder"})
    tables = {
        direction: BankTable(torch.tensor([[1], [2], [3], [0]], dtype=torch.int32), torch.ones(4, 2))
        for direction in ("image_to_text", "text_to_image")
    }
    ScoreBank(identity_of(config, data), {"keep": 1, "by": "joint"}, tables).save(tmp_path)
    return tmp_path


def test_jobs_without_a_bank_have_none(tmp_path):
    assert KeptScores.of_job(job(tmp_path, source="in_batch")) is None
    assert KeptScores.of_job(job(tmp_path, run={"evaluate": True})) is None
    other = SimpleNamespace(
        model_cfg=OmegaConf.create({"arch": "meter_retrieval"}), run_cfg=OmegaConf.create({}), datasets_cfg={}
    )
    assert KeptScores.of_job(other) is None
    with pytest.raises(UserError, match="no score bank"):
        KeptScores.of_job(job(tmp_path))


def test_a_checked_bank_wraps_the_training_set(left, caplog):
    scores = KeptScores.of_job(job(left))
    with pytest.raises(UserError, match="not checked"):
        scores.around(Drawn(), seed=0)
    with caplog.at_level(logging.WARNING):
        scores.check({"train": Drawn()})
    assert "bank.keep: 63, but the bank was mined with 1" in caplog.text and "bank.by" not in caplog.text
    sample = scores.around(Drawn(), seed=0)[2]
    assert sample["candidate_text"] == ["caption 3"] and sample["candidate_picture_id"].tolist() == [3]
    one_way = KeptScores.of_job(job(left, text_to_image=None))
    one_way.check({"train": Drawn()})
    assert "candidate_image" not in one_way.around(Drawn(), seed=0)[2]


def test_a_bank_of_other_data_is_refused(left):
    class Brighter(Drawn):
        def picture(self, index: int):
            return super().picture(index + 1)

    with pytest.raises(UserError, match=r"stale.*the transforms \(.*the pictures of train \("):
        KeptScores.of_job(job(left)).check({"train": Brighter()})


def test_contents_of_all_pictures_need_a_bank_that_has_them(left):
    with pytest.raises(UserError, match=r"run.picture_content: all, but the score bank .* --overwrite"):
        KeptScores.of_job(job(left, run={"picture_content": "all"}))
    with pytest.raises(UserError, match=r"run.picture_content: 'none' is not one of"):
        KeptScores.of_job(job(left, run={"picture_content": "none"}))
    data, bank = {"train": Drawn()}, ScoreBank.load(left)
    identity = identity_of(DcdConfig(teacher=TEACHER, student={"arch": "dual_encoder"}), data, "all")
    ScoreBank(identity, bank.settings, bank.tables, "all").save(left)
    for content in ("all", "sample"):  # compared as the bank has them
        KeptScores.of_job(job(left, run={"picture_content": content})).check(data)


def test_a_model_of_another_task_is_not_wrapped(left):
    model = SimpleNamespace(needs_score_bank=True)
    with pytest.raises(UserError, match="build the model with this task"):
        DcdRetrievalTask({}).wrap_training_set(Drawn(), model)


def test_batches_by_a_bank_load_it_whatever_the_candidates_are(left):
    in_batch = job(left, source="in_batch")
    assert KeptScores.of_job(in_batch) is None
    by_key, by_bank = ({"batches": {"by": by}} for by in ("family", "bank"))
    assert KeptScores.of_job(job(left, by_key, source="in_batch")) is None
    assert len(KeptScores.of_job(job(left, by_bank, source="in_batch")).bank) == 4
    assert KeptScores.of_job(job(left, {**by_bank, "evaluate": True}, source="in_batch")) is None
