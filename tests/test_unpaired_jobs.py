"""Whole jobs on pictures and texts that do not belong together, at a tiny size, and what such a job is refused for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import assert_finished

from lavis_dcd.common.errors import UserError
from lavis_dcd.job import load_config

pytest.importorskip("lavis")
from lavis_dcd.models.building import build_matcher

IMAGE = {"name": "dcd_image_eval", "image_size": 32}
READERS = {"vis_processor": {"train": IMAGE, "eval": IMAGE}}


@pytest.fixture
def sections(tmp_path: Path, pictures: list[dict], vocabulary: str) -> dict[str, Any]:
    """A job that distils a dual encoder on a folder of twelve pictures and a log of fifteen queries."""
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 24}  # fmt: skip
    teacher = {
        "arch": "dual_encoder",
        "load_finetuned": False,
        "vision": {"backbone": "clip_vit", "image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "heads": 2,
                   "weights": None, "freeze": True},
        "text": {"family": "bert", "name": vocabulary, "max_length": 16, "config": text, "load_weights": False,
                 "freeze": True},
        "head": {"dim": 16, "hidden": 0},
    }  # fmt: skip
    torch.manual_seed(0)
    torch.save(build_matcher(teacher, "model").checkpoint(), tmp_path / "teacher.pth")
    texts = [caption for row in pictures for caption in row["caption"]][:15]
    (tmp_path / "queries.txt").write_text("\n".join(texts))
    return {
        "model": {
            "arch": "dcd",
            "teacher": {**teacher, "load_finetuned": True, "finetuned": str(tmp_path / "teacher.pth")},
            "student": {"arch": "dual_encoder", "init_from_teacher": {"towers": True}, "head": {"dim": 8}},
            "candidates": {"match": "teacher"},
            "selection": {"hard_negatives": 2, "strategy": "stratified"},
            "loss": {"alpha": 1.0, "weighting": "uniform"},
        },
        "datasets": {
            "unpaired": {
                **READERS,
                "build_info": {"pictures": str(tmp_path / "photos"), "texts": str(tmp_path / "queries.txt")},
            }
        },
        "run": {"cache_features": "off"},
    }


def train_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("time", "data_wait")} for line in lines if line["kind"] == "train"
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "student.pth", weights_only=True)["model"]


@pytest.mark.slow
def test_without_a_paired_set_a_job_ends_and_says_what_is_not_known(job_file, sections):
    folder = job_file(sections)
    assert (folder / "manifest.json").is_file() and not (folder / "results.json").exists()
    assert "no recall is known" in (folder / "log.txt").read_text()
    lines = train_lines(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 <= line["student_top_misranked"] <= 1 and line["loss"] > 0 for line in lines)
    assert not {key for line in lines for key in line if "match" in key or "contrastive" in key or "in_batch" in key}
    assert weights(folder)


@pytest.mark.slow
def test_kept_features_change_nothing(job_file, sections):
    found = {}
    for mode in ("off", "memory", "disk"):
        run = {"cache_features": mode, "cache_dtype": "float32", "job_id": mode}
        found[mode] = train_lines(job_file({**sections, "run": run}).parent / mode)
    for mode in ("memory", "disk"):
        for line, plain in zip(found[mode], found["off"], strict=True):
            assert line.pop("kind") == plain["kind"]
            assert line == pytest.approx({k: v for k, v in plain.items() if k != "kind"}, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_job_that_is_continued_takes_the_same_steps(job_file, sections):
    run = {"max_epoch": 3, "max_steps": 7, "save_every": 1, "keep_last": 9}
    whole = job_file({**sections, "run": {**run, "job_id": "whole"}}).parent / "whole"
    for later in (5, 6, 7):  # the fourth step is in the second epoch
        shutil.rmtree(whole / "checkpoints" / f"step-{later:08d}")
    lines, last = train_lines(whole), weights(whole)
    (whole / "student.pth").unlink()
    job_file({**sections, "run": {**run, "job_id": "whole", "resume": str(whole)}})
    assert train_lines(whole) == lines
    assert all(torch.equal(value, last[name]) for name, value in weights(whole).items())
    assert "resumed" in (whole / "log.txt").read_text()


@pytest.mark.slow
def test_further_texts_beside_pairs_and_a_paired_validation(job_file, sections, tmp_path, pictures):
    """A joined training set: 16 pairs, and 15 samples of the same pictures and the queries."""
    for split, chosen in (("train", pictures[:8]), ("val", pictures[8:])):
        (tmp_path / f"{split}.json").write_text(json.dumps(chosen))
    info = {"root": str(tmp_path / "photos"), "annotations": {s: str(tmp_path / f"{s}.json") for s in ("train", "val")}}
    sections["datasets"]["image_text_retrieval"] = {**READERS, "build_info": info}
    sections["datasets"]["unpaired"]["build_info"] |= {"root": info["root"], "pictures": str(tmp_path / "train.json")}
    sections["run"] = {"valid_splits": ["val"], "cache_features": "memory", "batch_size_train": 8}
    found = assert_finished(job_file(sections))
    assert list(found) == ["teacher", "student before training", "student"]
    assert "31 training samples" in (tmp_path / "output/job/tiny/log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"model.candidates.match": "given"}, "model.candidates.match: given needs captions of the pictures"),
        ({"run.batch_by": "image"}, "run.batch_by: datasets.unpaired has pictures and texts that do not belong"),
        ({"model.loss.alpha": 0.5}, "model.loss.alpha: 0.5 leaves a share"),
        ({"datasets.unpaired.build_info.texts": "gone.txt"}, "datasets.unpaired.build_info.texts: "),
        ({"run.valid_splits": ["val"]}, None),
    ],
)
def test_settings_and_data_are_checked_together(sections, tmp_path, change, start):
    (tmp_path / "job.json").write_text(json.dumps(sections))
    options = [f"{key}={json.dumps(value)}" for key, value in change.items()]
    if start is None:  # told when the data sets are built, as for any data set
        load_config(str(tmp_path / "job.json"), options)
        return
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "job.json"), options)
    (line,) = caught.value.faults
    assert line.startswith(start)


def test_a_model_that_learns_from_pairs_is_refused(sections, tmp_path):
    teacher = sections["model"]["teacher"]
    (tmp_path / "job.json").write_text(json.dumps({**sections, "model": teacher}))
    with pytest.raises(UserError, match=r"model\.arch: dual_encoder learns from pairs, and datasets\.unpaired has"):
        load_config(str(tmp_path / "job.json"))
    load_config(str(tmp_path / "job.json"), evaluate=True)
