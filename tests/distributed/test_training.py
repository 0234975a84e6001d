"""Two processes train as one does at the same global batch: losses, gradients and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

TWO = ("--nproc_per_node=2",)


def of_one_and_two(write_job, finished, metrics, tmp_path: Path, model: dict, **run):
    """Train steps and final weights with one process and with two of half the batch each."""
    found = []
    for name, size, flags in (("one", 8, ()), ("two", 4, TWO)):
        finished(write_job(name, model, batch_size_train=size, **run), *flags)
        folder = tmp_path / "output" / "job" / name
        file = next(path for path in (folder / "student.pth", folder / "model.pth") if path.is_file())
        found.append((metrics(name, "train"), torch.load(file, weights_only=True)["model"]))
    return found


def assert_same(one, two) -> None:
    (steps_one, weights_one), (steps_two, weights_two) = one, two
    assert len(steps_one) == len(steps_two) == 4
    for line_one, line_two in zip(steps_one, steps_two, strict=True):
        assert line_one.keys() == line_two.keys()
        for key, value in line_one.items():
            if isinstance(value, float):
                assert line_two[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (key, line_one["step"])
    assert len({line["loss"] for line in steps_one}) == 4
    for name, value in weights_one.items():
        torch.testing.assert_close(weights_two[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def joined_with_unpaired(write_job, tmp_path: Path):
    """``write_job`` whose jobs train on further samples: the same pictures, and texts of a file."""

    def write(name: str, model: dict, **run) -> Path:
        file = write_job(name, model, **run)
        (tmp_path / "texts.txt").write_text("\n".join(f"red {'green ' * i}blue" for i in range(11)))
        sections = json.loads(file.read_text())
        readers = {k: v for k, v in sections["datasets"]["coco_retrieval"].items() if k != "build_info"}
        info = {"pictures": str(tmp_path / "photos"), "texts": str(tmp_path / "texts.txt")}
        sections["datasets"]["unpaired"] = {**readers, "build_info": info}
        file.write_text(json.dumps(sections))
        return file

    return write


def distilled(teacher: dict, student: dict, **more) -> dict:
    return {"arch": "dcd", "teacher": teacher, "student": student, "selection": {"hard_negatives": 3}, **more}


@pytest.mark.parametrize(
    "case",
    ["learning encoders", "entropy share", "bank of captions", "dual", "own loss", "recomputed"]
    + [
        "random",
        "mixed",
        "stratified",
        "reweighted",
        "prescreened",
        "budget",
        "kept vectors",
        "match by teacher",
        "joined with unpaired",
    ],
)
def test_two_processes_equal_one(case, write_job, finished, metrics, tmp_path, meter, teacher, dual, dual_teacher):
    """AdamW's eps is 1e-4 here: a gradient that is zero but for rounding would otherwise step by its sign."""
    run = {"eps": 1e-4}
    if case == "learning encoders":  # both sides encode for themselves; gradients cross the processes
        model = distilled(teacher, meter, share_encoders=False)
    elif case == "entropy share":
        model = distilled(teacher, {"init_from_teacher": {"layers": [1]}}, loss={"weighting": "entropy_share"})
        run |= {"cache_features": "memory", "accum_grad_iters": 1}
    elif case == "bank of captions":
        candidates = {"image_to_text": {"source": "random", "count": 5}, "text_to_image": None}
        model = distilled(teacher, {"init_from_teacher": {"layers": [1]}}, candidates=candidates)
    elif case == "dual":
        model = distilled(teacher, dual, share_encoders=False, loss={"in_batch_weight": 1.0})
    elif case == "reweighted":
        selection = {"hard_negatives": 3, "strategy": "stratified", "reweight": True}
        model = distilled(teacher, dual, share_encoders=False) | {"selection": selection}
    elif case in ("random", "mixed", "stratified"):  # a query draws the same in whichever process it is
        selection = {"hard_negatives": 3, "strategy": case}
        model = distilled(teacher, dual, share_encoders=False) | {"selection": selection}
    elif case == "prescreened":  # at random: what reaches the teacher is drawn for each query, too
        prescreen = {"by": "random", "keep": 4, "check_every": 2}
        selection = {"hard_negatives": 3, "strategy": "stratified", "prescreen": prescreen}
        model = distilled(teacher, dual, share_encoders=False) | {"selection": selection}
    elif case == "budget":
        candidates = {"teacher_budget": 20}
        model = distilled(teacher, {"init_from_teacher": {"layers": [1]}}, candidates=candidates)
        run |= {"cache_features": "memory"}
    elif case == "kept vectors":  # of a dual teacher, for features that cross the processes
        model = distilled(dual_teacher, {**dual_teacher, "head": {**dual["head"], "temperature": 0.2}})
        run |= {"cache_features": "memory"}
    elif case in ("match by teacher", "joined with unpaired"):
        selection = {"hard_negatives": 3, "strategy": "stratified"}
        model = distilled(teacher, dual, share_encoders=False, candidates={"match": "teacher"})
        model |= {"selection": selection, "loss": {"alpha": 1.0}}
        if case == "joined with unpaired":
            write_job = joined_with_unpaired(write_job, tmp_path)
    elif case == "recomputed":  # in one process by fairscale; a layer runs several times in a step
        student = {"init_from_teacher": {"layers": [0, 1]}, "fusion": {"layers": 2, "grad_checkpoint": True}}
        model = distilled(teacher, student, student_chunk_pairs=5)
    else:  # every negative of the batch is taken, so that nothing is left to chance
        loss = {"negatives": 16, "sharpness": 0.0, "sharpness_start": 0.0}
        model = {**meter, "loss": loss}
    assert_same(*of_one_and_two(write_job, finished, metrics, tmp_path, model, **run))
