from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import RunConfig

registry = pytest.importorskip("lavis.common.registry").registry


@pytest.fixture(scope="module")
def runner_class():
    from lavis_dcd.runners.runner_dcd import RunnerDCD

    return RunnerDCD


def config(folder, **run):
    keys = {
        "output_dir": str(folder),
        "device": "cpu",
        "max_epoch": 1,
        "batch_size_train": 4,
        "report": False,
    }
    splits = {"valid_splits": ["val"], "test_splits": ["test"]}
    return SimpleNamespace(
        run_cfg=OmegaConf.create({**keys, **splits, **run}),
        model_cfg=OmegaConf.create({"arch": "stub"}),
        datasets_cfg=OmegaConf.create({"noise": {}}),
        args=SimpleNamespace(cfg_path="projects/dcd/tiny.yaml"),
    )


def sets(stubs, **more):
    return {"train": stubs.Pictures(), "val": stubs.Pictures(6), "test": stubs.Pictures(5), **more}


def test_registered(runner_class):
    assert registry.get_runner_class("runner_dcd") is runner_class


def test_two_runners_in_one_process(runner_class, stubs, tmp_path):
    runners = []
    for _ in range(2):
        cfg = config(tmp_path)
        runner = runner_class(cfg, stubs.Task(), stubs.Distiller(), {"noise": sets(stubs)}, "20300101-000000")
        runner.train()
        assert registry.get_path("output_dir") == str(runner.output_dir)
        runners.append(runner)
    first, second = (runner.output_dir for runner in runners)
    assert first == tmp_path / "tiny" / "20300101-000000" and second.name == "20300101-000000-2"
    for name, value in stubs.weights(first).items():
        assert torch.equal(value, stubs.weights(second)[name])


def test_the_report_is_written(runner_class, stubs, tmp_path):
    cfg = config(tmp_path, report=True)
    task = stubs.Task()
    task.gallery = lambda *_: []
    runner = runner_class(cfg, task, stubs.Distiller(), {"noise": sets(stubs)}, None)
    runner.train()
    page = (runner.output_dir / "report.html").read_text()
    assert "student before training" in page
    # LAVIS's door may evaluate after training; that repeats nothing.
    done = task.evaluated
    runner.evaluate()
    assert task.evaluated == done


def test_training_sets_are_concatenated(runner_class, stubs, tmp_path):
    del runner_class
    from lavis_dcd.runners.runner_dcd import by_split

    other = {"train": stubs.Pictures(3), "extra": stubs.Pictures(2)}
    found = by_split({"a": sets(stubs), "b": other}, RunConfig(train_splits=["train", "extra"], valid_splits=["val"]))
    assert len(found["train"]) == 22 + 3 + 2 and len(found["val"]) == 6


def test_two_sources_of_an_evaluation_split_are_refused(runner_class, stubs):
    del runner_class
    from lavis_dcd.runners.runner_dcd import by_split

    with pytest.raises(UserError, match="'val' comes from 2 data sets"):
        by_split({"a": sets(stubs), "b": sets(stubs)}, RunConfig(valid_splits=["val"]))


def test_no_name_of_lavis_own_config_leads_out_of_the_output_folder(runner_class, stubs, tmp_path):
    for keys in ({"project": "../../x"}, {"job_id": "../x"}, {"project": "x" * 300}):
        cfg = config(tmp_path / "out", **keys)
        with pytest.raises(UserError, match=f"run.{next(iter(keys))}: "):
            runner_class(cfg, stubs.Task(), stubs.Distiller(), {"noise": sets(stubs)}, "now")
    with pytest.raises(UserError, match=r"run\.job_id: "):
        runner_class(config(tmp_path / "out"), stubs.Task(), stubs.Distiller(), {"noise": sets(stubs)}, "../now")
    assert list(tmp_path.iterdir()) == []


def test_interpolations_are_stored_as_they_are_written(runner_class, stubs, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2-token")
    cfg = config(tmp_path, seed="${oc.env:MY_SEED,7}", job_id="x")
    cfg.model_cfg = OmegaConf.create({"arch": "stub", "list": [{"key": "${oc.env:MY_TOKEN}"}]})
    cfg.datasets_cfg = OmegaConf.create({"noise": {"root": "${oc.env:MY_TOKEN}/x", "again": "${.root}"}})
    try:
        runner = runner_class(cfg, stubs.Task(), stubs.Distiller(), {"noise": sets(stubs)}, None)
        runner.train()
    finally:
        secrets.forget()
    assert runner.run.seed == 7
    files = [path for path in runner.output_dir.rglob("*") if path.is_file()]
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    stored = OmegaConf.to_container(OmegaConf.load(runner.output_dir / "config.yaml"), resolve=False)
    assert stored["model"]["list"] == [{"key": "${oc.env:MY_TOKEN}"}]
    assert stored["datasets"]["noise"] == {"root": "${oc.env:MY_TOKEN}/x", "again": "${.root}"}
    assert stored["run"]["seed"] == "${oc.env:MY_SEED,7}" and stored["run"]["max_epoch"] == 1
