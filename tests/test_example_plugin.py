"""The example of a third party's package: installed into a fresh environment, it trains and is distilled there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from lavis_dcd import train

pytestmark = pytest.mark.install

_HOST = Path(sysconfig.get_paths()["purelib"])
_FOLDER = Path("projects/example_plugin")
_OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
_SMALL = (
    "--options", "run.device=cpu", "run.max_steps=6", "run.batch_size_train=16", "run.job_id=small", "run.log_freq=1",
    "datasets.shape_scenes.build_info.scenes.train=60", "datasets.shape_scenes.build_info.scenes.val=12",
    "datasets.shape_scenes.build_info.scenes.test=12",
)  # fmt: skip
_TEACHER = "output/train_ringnet/small/model.pth"


class Process:
    """A folder with a copy of the example, and an environment where nothing is installed.

    The environment reads LAVIS-DCD and all that it needs from the running interpreter's.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        left_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "output")
        shutil.copytree(root / _FOLDER, folder / _FOLDER, ignore=left_out)
        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.python = str(folder / "env" / "bin" / "python")
        site = next((folder / "env").glob("lib/python*/site-packages"))
        # addsitedir, unlike a bare path, also reads the host's own .pth files: LAVIS-DCD may be installed editable
        (site / "host.pth").write_text(f"{root}\nimport site; site.addsitedir({str(_HOST)!r})\n")

    def commands(self) -> list[list[str]]:
        """What the example's README says to type."""
        text = (self.folder / _FOLDER / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        return [line.split() for block in blocks for line in block.splitlines()]

    def run(self, words: list[str], **variables: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        inherited |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "LAVIS_CACHE": str(self.folder / "cache")}
        done = subprocess.run(
            words, cwd=self.folder, env=inherited | variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def rows(self, job: str) -> dict[str, dict]:
        """The table of a finished job by the rows' names."""
        results = json.loads((self.folder / job / "small" / "results.json").read_text())
        return {row["name"]: row for row in results["rows"]}


def recalls(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith(("txt_", "img_"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory, repo_root) -> Process:
    """The example, installed and trained for a few steps, as its README says."""
    place = Process(tmp_path_factory.mktemp("third_party"), repo_root)
    (_, *install), (_, *teach), *_ = place.commands()
    place.run([place.python, *install, *_OFFLINE])
    place.run([place.python, *teach, *_SMALL])
    return place


def test_the_installed_package_passes_its_own_test(place):
    own = str(place.folder / _FOLDER / "test_ringnet.py")
    assert "4 passed" in place.run([place.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", own])


def test_it_is_trained_and_distilled_into_a_dual_encoder(place):
    (_, *distil) = place.commands()[2]
    place.run([place.python, *distil, *_SMALL, f"model.teacher.finetuned={_TEACHER}"])
    alone, rows = place.rows("output/train_ringnet"), place.rows("output/distil_ringnet")
    assert list(rows) == ["teacher", "student before training", "student"]
    # with its trained weights, and through its own processors, not the student's
    assert recalls(rows["teacher"]) == recalls(alone["model"]) != recalls(alone["model before training"])
    assert rows["teacher"]["fusion_parameters"] > 0 == rows["student"]["fusion_parameters"]
    saved = torch.load(place.folder / "output/distil_ringnet/small/student.pth", weights_only=True)
    assert saved["arch"] == "dual_encoder"
    steps = (place.folder / "output/distil_ringnet/small/metrics.jsonl").read_text().splitlines()
    losses = [line["distill_loss"] for line in map(json.loads, steps) if line["kind"] == "train"]
    assert len(losses) == 6 and all(loss > 0 for loss in losses)


def test_named_with_plugins_it_need_not_be_installed(place, repo_root):
    *_, (path, _, *teach) = place.commands()
    assert path == f"PYTHONPATH={_FOLDER}" and "lavis.train" in teach
    evaluate = [word.replace("lavis.train", "lavis.evaluate") for word in teach]
    words = [sys.executable, *evaluate, *_SMALL, "run.output_dir=again", f"model.finetuned={_TEACHER}"]
    # the checkout's copy: beside the installed one, setuptools has left an entry point that would be found
    place.run(words, PYTHONPATH=str(repo_root / _FOLDER), PYTHONDONTWRITEBYTECODE="1")
    again, trained = place.rows("again/train_ringnet"), place.rows("output/train_ringnet")["model"]
    assert [recalls(row) for row in again.values()] == [recalls(trained)]


@pytest.mark.parametrize(("job", "field"), [("train_ringnet", "model.arch"), ("distil_ringnet", "model.teacher.arch")])
def test_without_it_the_jobs_end_with_a_line(job, field, repo_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--cfg-path", str(repo_root / _FOLDER / f"{job}.yaml")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {field}: 'ringnet_retrieval' is not registered; ")
    assert list(tmp_path.iterdir()) == []
