import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("lavis")
from omegaconf import OmegaConf

from lavis_dcd.banks import score_bank
from lavis_dcd.banks.score_bank import META, SCORES, BankIdentity, BankTable, ScoreBank, bank_folder
from lavis_dcd.common.errors import UserError

IDENTITY = BankIdentity(teacher="t" * 64, data="d" * 64, transforms="p" * 64)


def table(rows: int = 5, kept: int = 3, seed: int = 0) -> BankTable:
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(-1, rows, (rows, kept), generator=generator, dtype=torch.int32)
    return BankTable(candidates, torch.randn(rows, 1 + kept, generator=generator))


def bank(**tables: BankTable) -> ScoreBank:
    tables = tables or {"image_to_text": table(), "text_to_image": table(kept=2, seed=1)}
    return ScoreBank(IDENTITY, {"by": "joint", "keep": 3}, tables)


def test_what_is_saved_comes_back(tmp_path):
    saved = bank()
    saved.save(tmp_path / "new" / "bank")
    loaded = ScoreBank.load(tmp_path / "new" / "bank")
    assert loaded.identity == IDENTITY and loaded.settings == saved.settings and len(loaded) == 5
    assert loaded.tables.keys() == saved.tables.keys()
    for direction, kept in saved.tables.items():
        torch.testing.assert_close(loaded.tables[direction].candidates, kept.candidates)
        torch.testing.assert_close(loaded.tables[direction].scores, kept.scores)
    assert sorted(file.name for file in (tmp_path / "new" / "bank").iterdir()) == [META, SCORES]


def test_a_bank_is_mapped_not_read(tmp_path):
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc")

    def resident_mb() -> float:
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    rows = 200_000
    big = BankTable(torch.zeros(rows, 63, dtype=torch.int32), torch.zeros(rows, 64))
    bank(image_to_text=big).save(tmp_path)
    del big
    before = resident_mb()
    loaded = ScoreBank.load(tmp_path)
    assert loaded.tables["image_to_text"].scores[[3, rows - 1]].sum() == 0
    assert resident_mb() - before < 25  # of 97 MB


@pytest.mark.parametrize(
    ("candidates", "scores"),
    [
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3)),
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(5, 4)),
        (torch.zeros(4, 3), torch.zeros(4, 4)),
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.float16)),
    ],
)
def test_tables_have_one_shape(candidates, scores):
    with pytest.raises(ValueError, match="must be"):
        BankTable(candidates, scores)


def test_tables_belong_together():
    with pytest.raises(ValueError, match="lengths"):
        bank(image_to_text=table(5), text_to_image=table(6))
    with pytest.raises(ValueError, match="sideways"):
        bank(sideways=table())


def test_absent(tmp_path):
    with pytest.raises(UserError, match=r"no score bank in .*nowhere; run: python -m lavis_dcd mine --cfg-path F"):
        ScoreBank.load(tmp_path / "nowhere")


@pytest.mark.parametrize("step", ["scores", "meta"])
@pytest.mark.parametrize("former", [False, True])
def test_a_write_cut_short_leaves_no_bank(tmp_path, monkeypatch, step, former):
    if former:
        bank(image_to_text=table(seed=7)).save(tmp_path)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "replace") if step == "scores" else (score_bank.json, "dump")), fail)
    with pytest.raises(KeyboardInterrupt):
        bank().save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no score bank"):
        ScoreBank.load(tmp_path)


@pytest.mark.parametrize("fault", ["shorter", "other", "no scores", "no json", "format", "columns"])
def test_broken(tmp_path, fault):
    bank().save(tmp_path)
    scores, meta = tmp_path / SCORES, tmp_path / META
    told = json.loads(meta.read_text())
    if fault == "shorter":
        scores.write_bytes(scores.read_bytes()[:-8])
    elif fault == "other":
        scores.write_bytes(b"x" * scores.stat().st_size)
    elif fault == "no scores":
        scores.unlink()
    elif fault == "no json":
        meta.write_text(meta.read_text()[:20])
    elif fault == "format":
        meta.write_text(json.dumps({**told, "format": 99}))
    else:
        meta.write_text(json.dumps({**told, "directions": ["image_to_text", "sideways"]}))
    with pytest.raises(UserError, match=r"the score bank in .* is broken .*; remove that folder and run: python -m"):
        ScoreBank.load(tmp_path)


@pytest.mark.parametrize("name", ["teacher", "data", "transforms"])
def test_stale_names_what_differs(tmp_path, name):
    kept = bank()
    kept.refuse_stale(IDENTITY, tmp_path)
    with pytest.raises(UserError) as caught:
        kept.refuse_stale(dataclasses.replace(IDENTITY, **{name: "other"}), tmp_path)
    (line,) = caught.value.faults
    assert str(tmp_path) in line and "python -m lavis_dcd mine --cfg-path F --overwrite" in line
    others = {"teacher", "data", "transforms"} - {name}
    assert f"the {name} (" in line and not any(f"the {other} (" in line for other in others)


def test_folder_of_a_job(tmp_path, cache):
    model = {"teacher": {"arch": "a", "finetuned": "f.pth"}, "student": {"arch": "b"}, "candidates": {"source": "bank"}}
    data = {"coco_retrieval": {"data_dir": "d"}}
    folder = bank_folder(model, data)
    assert folder.parent == cache / "dcd_scores" and len(folder.name) == 16
    assert bank_folder(OmegaConf.create(model), OmegaConf.create(data)) == folder
    assert bank_folder({**model, "student": {"arch": "c"}, "selection": {"hard_negatives": 3}}, data) == folder
    assert bank_folder({**model, "teacher": None, "teachers": [model["teacher"]]}, data) == folder
    assert bank_folder({**model, "teacher": {"arch": "a", "finetuned": "g.pth"}}, data) != folder
    assert bank_folder(model, {"coco_retrieval": {"data_dir": "e"}}) != folder
    own = {**model, "candidates": {"source": "bank", "bank": {"path": str(tmp_path / "mine")}}}
    assert bank_folder(own, data) == tmp_path / "mine"
