"""Comparisons of real, tiny runs: one that is killed ends as one that is not."""

from __future__ import annotations

import json

import pytest
import torch

SCENES = {"train": 30, "val": 6, "test": 6}
OPTIONS = [
    "run.device=cpu", "run.max_steps=2", "run.batch_size_train=10", "run.batch_size_eval=20", "run.k_test=3",
    "run.log_freq=1", "run.batch_by=null", "run.cache_features=off", "seeds=[0]", "model.selection.hard_negatives=3",
    *(f"datasets.shape_scenes.build_info.scenes.{split}={count}" for split, count in SCENES.items()),
]  # fmt: skip
FIRST = "student-seed0"


@pytest.fixture
def train(tmp_path, monkeypatch, cache):
    from lavis_dcd import train

    monkeypatch.chdir(tmp_path)
    path = "projects/dcd/quickstart_ablation.yaml"
    return lambda *options: train.main(["--cfg-path", path, "--options", *OPTIONS, *options])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["export_model", "write_report"])
def test_a_comparison_killed_between_results_and_student_ends_as_one_that_was_not(
    train, tmp_path, monkeypatch, capsys, moment
):
    from lavis_dcd.training import trainer

    assert train("run.job_id=whole") == 0
    whole, cut = (tmp_path / "output" / "quickstart_ablation" / name for name in ("whole", "cut"))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, moment, killed)
        assert train("run.job_id=cut") == 130
    assert (cut / FIRST / "results.json").is_file()
    assert (cut / FIRST / "student.pth").is_file() == (moment == "write_report")
    assert train("run.job_id=cut") == 2
    assert "it is not finished; run.resume=auto goes on with it" in capsys.readouterr().err
    assert train("run.job_id=cut", "run.resume=auto") == 0
    one, other = (json.loads((home / "results.json").read_text())["rows"] for home in (whole, cut))
    assert [row["name"] for row in one] == [row["name"] for row in other]
    for before, now in zip(one, other, strict=True):
        assert before["r_sum"] == now["r_sum"] and before["txt_r1"] == now["txt_r1"]
    for folder in cut.glob("*-seed0"):
        weights = [torch.load(at / folder.name / "student.pth", weights_only=True)["model"] for at in (whole, cut)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    # and nothing of it is trained again
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*.pth")}
    assert train("run.job_id=cut", "run.resume=auto") == 0
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*.pth")} == before
    assert train("run.job_id=cut", "run.init_lr=1e-3") == 2
    assert "it was trained with other settings (run.init_lr)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_training_is_continued_from_its_checkpoint(train, tmp_path, monkeypatch, caplog):
    from lavis_dcd.training.step import Stepper

    real, steps = Stepper.step, []

    def killed_at_the_second(self, *args, **more):
        steps.append(None)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", killed_at_the_second)
        assert train("run.job_id=c", "run.save_every=1") == 130
    assert train("run.job_id=c", "run.save_every=1", "run.resume=auto") == 0
    assert "resumed at step 1" in caplog.text
