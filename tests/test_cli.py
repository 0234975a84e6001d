from __future__ import annotations

import errno
import getpass
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_dcd import cli, evaluate, job, train
from lavis_dcd.cli import guarded
from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import cache_root

JOB = {
    "model": {
        "arch": "meter_retrieval",
        "model_type": "student_coco",
        "text": {"name": "asset:quickstart/vocab.txt"},
    },
    "datasets": {"shape_scenes": {"build_info": {"scenes": {"train": 30, "val": 6, "test": 6}}}},
    "run": {"task": "stub_task", "runner": "stub_runner", "device": "cpu"},
}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A job of a task and a runner that only write down how they are called."""
    import lavis  # noqa: F401
    from lavis.common.registry import registry

    calls = []

    class Task:
        @classmethod
        def setup_task(cls, cfg):
            calls.append(("setup", cfg.run_cfg.task))
            return cls()

        def build_datasets(self, cfg):
            calls.append(("datasets", list(cfg.datasets_cfg)))
            return {"shape_scenes": {}}

        def build_model(self, cfg):
            calls.append(("model", cfg.model_cfg.arch))

    class Runner:
        def __init__(self, cfg, task, model, datasets, job_id):
            calls.append(("runner", list(datasets)))
            assert job_id

        def train(self):
            calls.append(("train",))

        def evaluate(self):
            calls.append(("evaluate",))

    monkeypatch.setitem(registry.mapping["task_name_mapping"], "stub_task", Task)
    monkeypatch.setitem(registry.mapping["runner_name_mapping"], "stub_runner", Runner)
    monkeypatch.chdir(tmp_path)
    OmegaConf.save(OmegaConf.create(JOB), tmp_path / "job.yaml")
    return calls


def test_train_builds_in_order_and_trains(calls):
    assert train.main(["--cfg-path", "job.yaml"]) == 0
    assert [call[0] for call in calls] == ["setup", "datasets", "model", "runner", "train"]


def test_evaluate_only_evaluates(calls):
    assert evaluate.main(["--cfg-path", "job.yaml", "--options", "run.seed=3"]) == 0
    assert calls[-1] == ("evaluate",)


def test_faults_are_lines_and_status_2_and_nothing_is_written(calls, capsys):
    status = train.main(["--cfg-path", "job.yaml", "--options", "run.max_epochs=3", "--options", "model.fusoin=1"])
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert [line.split(":")[1].strip() for line in errors] == ["run.max_epochs", "model.fusoin"]
    assert "Traceback" not in "".join(lines)
    assert calls == []
    assert list(Path().iterdir()) == [Path("job.yaml")]


def test_plugins_come_first(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train.main(["--cfg-path", "job.yaml", "--plugins", "not_a_plugin"]) == 2
    assert "error: --plugins: cannot import not_a_plugin" in capsys.readouterr().err


def test_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "python -m lavis.evaluate" in out and "--options" in out and "--plugins" in out


def test_statuses(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run_job", stop)
    assert train.main(["--cfg-path", "x"]) == 130

    def terminated():
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert guarded(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 129
    assert guarded(terminated) == 143
    assert signal.getsignal(signal.SIGTERM) is before

    def fail():
        raise UserError(["first", "second"])

    assert guarded(fail) == 2
    assert capsys.readouterr().err == "error: first\nerror: second\n"
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free some space; what was written before stays"),
        (errno.EROFS, "name another place"),
        (errno.EACCES, "name another place"),
    ],
)
def test_a_disk_that_takes_nothing_is_a_line(number, words, capsys):
    def fail():
        raise OSError(number, os.strerror(number), "out/log.txt")

    assert guarded(fail) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: out/log.txt: {os.strerror(number)}; ") and words in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["EIO", "ENAMETOOLONG", "EMFILE", "ENFILE", "ESTALE", "EROFS", "EDQUOT", "ENOMEM", "ENOENT", "EBUSY", "EINVAL"],
)
def test_whatever_the_system_refuses_is_one_line(name, capsys):
    def fail():
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "out/x")

    assert guarded(fail) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: out/x: {os.strerror(getattr(errno, name))}; ") and line.count("\n") == 1


@pytest.mark.parametrize("stream", [None, "broken"])
def test_an_error_that_nobody_reads_has_its_status(stream, monkeypatch):
    if stream is not None:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", stream)

    def fail():
        raise UserError("nobody reads this")

    assert guarded(fail) == 2
    assert guarded(lambda: None) == 0


def test_a_plug_in_that_calls_sys_exit_is_an_error(calls, tmp_path, monkeypatch, capsys):
    """At import, in what it registers, and whatever status it asks for."""
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("quits_at_import.py").write_text("import sys\nsys.exit(0)\n")
    assert train.main(["--cfg-path", "job.yaml", "--plugins", "quits_at_import"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --plugins: cannot import quits_at_import: SystemExit: it called sys.exit(0)")
    Path("quits_later.py").write_text(
        "import sys\nfrom lavis.common.registry import registry\n"
        "registry.get_task_class('stub_task').build_datasets = lambda self, cfg: sys.exit()\n"
    )
    assert train.main(["--cfg-path", "job.yaml", "--plugins", "quits_later"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: plug-in quits_later: ") and "called sys.exit()" in line


def test_a_setting_from_the_environment_is_not_echoed(calls, monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "hunter2-token")
    options = ["run.max_epoch=${oc.env:MY_TOKEN}", "run.verify=${oc.env:MY_TOKEN}"]
    assert train.main(["--cfg-path", "job.yaml", "--options", *options]) == 2
    text = capsys.readouterr().err
    assert text.count("${oc.env:MY_TOKEN}") == 2 and "hunter2" not in text


def test_a_bug_keeps_its_traceback_without_values_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "hunter2-token")
    secrets.remember(OmegaConf.create({"a": "${oc.env:MY_TOKEN}"}))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)

    def fail():
        raise KeyError("hunter2-token")

    with pytest.raises(KeyError) as caught:
        guarded(fail)
    sys.excepthook(KeyError, caught.value, caught.value.__traceback__)
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text and "KeyError: '${oc.env:MY_TOKEN}'" in text
    secrets.forget()


def test_a_door_catches_ctrl_c_before_anything_heavy_is_imported():
    heavy = "[name for name in ('torch', 'lavis', 'numpy') if name in sys.modules]"
    code = f"import sys, lavis_dcd.train, lavis_dcd.mine; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_a_name_and_a_home_imports_pass(monkeypatch, tmp_path):
    """As under `docker run --user 12345`: torch wants the name, transformers makes a folder for the home."""
    for name in (
        "HOME",
        "USER",
        "LOGNAME",
        "LNAME",
        "USERNAME",
        "LAVIS_CACHE",
        "XDG_CACHE_HOME",
        "HF_HOME",
        "TORCH_HOME",
    ):
        monkeypatch.delenv(name, raising=False)

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    cli._make_up_for_a_user()
    assert getpass.getuser().startswith("user-")
    assert "~" not in os.environ["HF_HOME"]

    def work():
        cache_root()

    assert guarded(work) == 2
    for name in ("LOGNAME", "HF_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name)
