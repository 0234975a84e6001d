import json
import logging
import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.training import logs
from lavis_dcd.training.devices import Process
from lavis_dcd.training.logs import DataClock, MetricsLog, ScalarMeans, log_file, scalars_of


def test_window_means_over_the_steps_that_had_a_value():
    window = ScalarMeans()
    window.add({"loss": torch.tensor(1.0), "rare": torch.tensor(4.0)})
    window.add({"loss": torch.tensor(2.0)})
    assert {name: float(value) for name, value in window.means().items()} == {"loss": 1.5, "rare": 4.0}
    other = ScalarMeans()
    other.load_state_dict(window.state_dict(), torch.device("cpu"))
    other.add({"loss": torch.tensor(6.0)})
    assert float(other.means()["loss"]) == 3.0
    other.clear()
    assert other.means() == {}


def test_means_of_a_window_come_loss_first_and_finite(tmp_path):
    window, place = ScalarMeans(), Process(torch.device("cpu"))
    assert window.finite_means(place, 3, tmp_path) == {}
    window.add({"a": torch.tensor(1.0), "loss": torch.tensor(2.0), "b": torch.tensor(float("nan"))})
    window.add({"a": torch.tensor(2.0), "loss": torch.tensor(4.0), "c": torch.tensor(5.0)})
    # b is NaN: JSON has no word for it
    assert list(window.finite_means(place, 3, tmp_path).items()) == [("loss", 3.0), ("a", 1.5), ("c", 5.0)]
    assert window.steps == 2
    window.add({"loss": torch.tensor(float("inf"))})
    with pytest.raises(UserError, match=r"the loss is inf by step 3; try a lower run\.init_lr"):
        window.finite_means(place, 3, tmp_path)


def test_the_share_of_waiting_is_of_the_steps_since_the_last_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    clock = DataClock()
    assert clock.share() == 0.0

    def loader():
        for batch in range(3):
            now[0] += 1.0  # it takes a second to make
            yield batch

    batches = clock.timed(loader())
    seen = []
    for computing in (3.0, 1.0):
        with clock.step():
            seen.append(next(batches))
            now[0] += computing
        now[0] += 100.0  # evaluations and checkpoints do not count
    assert clock.share() == pytest.approx(2 / 6, abs=1e-4)
    with clock.step():
        seen.append(next(batches))
    assert clock.share() == 1.0
    assert seen == [0, 1, 2] and next(batches, None) is None


def test_scalars_of_an_output():
    found = scalars_of({"loss": torch.ones(1, requires_grad=True), "n": 3, "flag": True, "x": torch.ones(2), "s": "a"})
    assert {name: float(value) for name, value in found.items()} == {"loss": 1.0, "n": 3.0}
    assert not found["loss"].requires_grad and found["loss"].shape == ()


def test_resume_cuts_the_log_back(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (2, 4, 6):
        log.write("train", step, step / 4, {"loss": float(step)})
        log.write("eval", step, step / 4, {"split": "val", "model": "student", "r_mean": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "st')
    MetricsLog(tmp_path, resume_step=4).close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in kept] == [("train", 2), ("eval", 2), ("train", 4)]


def test_foreign_lines_are_left_out_and_what_follows_them_is_kept(tmp_path, caplog):
    log = MetricsLog(tmp_path)
    log.write("train", 2, 0.5, {"loss": 2.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as handle:
        handle.write(b'{"kind": "train", "st\n[1]\n{"note": "\xff"}\n{"kind": "train", "step": "x", "epoch": 1}\n')
        handle.write(json.dumps({"kind": "train", "step": 3, "epoch": 0.75, "loss": 1.0}).encode() + b"\n")
    MetricsLog(tmp_path, resume_step=4).close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [2, 3]
    assert [record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage()] == [
        f"{tmp_path}/metrics.jsonl: 4 lines that no job of ours wrote whole are left out"
    ]


def test_evaluations_of_a_split_of_other_data_are_dropped_and_kept_ones_are_not_repeated(tmp_path):
    log = MetricsLog(tmp_path)
    evaluation = {"model": "student", "weights_of_step": 0, "r_mean": 1.0}
    for split in ("val", "test"):
        log.write("eval", 0, 0.0, {"split": split, **evaluation})
    log.close()
    again = MetricsLog(tmp_path, resume_step=4, without={"val"})
    for split in ("val", "test"):
        again.write("eval", 0, 0.0, {"split": split, **evaluation, "r_mean": 2.0})
    again.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["r_mean"]) for line in kept] == [("test", 1.0), ("val", 2.0)]


def test_a_folder_that_is_gone_is_a_line(tmp_path):
    (tmp_path / "job").mkdir()
    log = MetricsLog(tmp_path / "job")
    shutil.rmtree(tmp_path / "job")
    with pytest.raises(UserError, match=r"run\.output_dir: the run folder .*job is gone"):
        log.write("train", 1, 0.1, {"loss": 1.0})
    assert not (tmp_path / "job").exists()


def test_other_processes_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, active=False)
    log.write("train", 1, 0.1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path)
    log.write("train", 1, 0.1, {"loss": 1.0, "lr": 0.5})
    log.write("eval", 1, 0.1, {"split": "val", "model": "student", "weights_of_step": 1, "r_mean": 7.0})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/lr", "val/student/r_mean"]
    assert events.Scalars("val/student/r_mean")[0].value == 7.0


@pytest.fixture
def failing_log(tmp_path):
    def run(error, active=True):
        with log_file(tmp_path / "log.txt", active):
            raise error

    return run


@pytest.mark.parametrize("active", [True, False], ids=["main", "another process"])
@pytest.mark.parametrize("error", [UserError("a line"), OSError(28, "No space left on device"), ZeroDivisionError("x")])
def test_what_ends_a_job_has_its_traceback_in_the_log(failing_log, tmp_path, capsys, error, active):
    with pytest.raises(type(error)):
        failing_log(error, active)
    text = (tmp_path / "log.txt").read_text()
    assert "ERROR the job has failed" in text and "Traceback (most recent call last)" in text and str(error) in text
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger().handlers == [h for h in logging.getLogger().handlers if not isinstance(h, logs.RunLog)]


def test_ctrl_c_has_no_traceback(failing_log, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        failing_log(KeyboardInterrupt())
    assert (tmp_path / "log.txt").read_text() == ""


def test_a_processes_number_stands_beside_its_traceback(failing_log, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError):
        failing_log(UserError("a line"), active=False)
    assert "ERROR the job has failed (process 3)" in (tmp_path / "log.txt").read_text()


def test_the_log_hides_what_came_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2-token")
    secrets.remember(OmegaConf.create({"a": "${oc.env:MY_TOKEN}"}))
    try:
        with pytest.raises(ValueError), log_file(tmp_path / "log.txt"):
            logging.getLogger("lavis_dcd").info("reading %s", "hunter2-token/x")
            raise ValueError("hunter2-token")
    finally:
        secrets.forget()
    text = (tmp_path / "log.txt").read_text()
    assert "hunter2" not in text and text.count("${oc.env:MY_TOKEN}") == 3  # the line of code, too


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_costs_lines_of_the_log_and_one_on_the_terminal(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with log_file(tmp_path / "log.txt"):
        for _ in range(3):
            logging.getLogger("lavis_dcd").info("a line")
    assert capsys.readouterr().err.count("No space left on device; lines of the log are lost") == 1
    assert "Logging error" not in capsys.readouterr().err


def test_letters_that_no_file_takes(tmp_path):
    with log_file(tmp_path / "log.txt"):
        logging.getLogger("lavis_dcd").info("half a character: \ud800")
    assert "half a character: \\ud800" in (tmp_path / "log.txt").read_text()
