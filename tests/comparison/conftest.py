"""Comparisons whose data sets, checks and files are real, and whose training is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

FIGURES = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")
SPLITS = ["train"] * 8 + ["val"] * 2 + ["test"] * 2  # of the twelve pictures


def row(name: str, recall: float) -> dict[str, Any]:
    figures = dict.fromkeys(FIGURES, recall)
    return {"name": name, **figures, "r_sum": 6 * recall, "fusion_parameters": 5, "how": "exhaustive"}


@dataclass
class Training:
    """Stands for the training of one run: leaves the files that a run leaves, in their order.

    ``ran``: the folders of the runs that were trained. ``stop_after``: the run that is killed, and the file that is
    its last. ``results``: may change what a run writes, by its folder's name. ``after``: called at a run's end.
    """

    ran: list[str] = field(default_factory=list)
    stop_after: tuple[str, str] | None = None
    results: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda name, content: content
    after: Callable[[str], None] = lambda name: None

    def __call__(self, job: Any) -> None:
        from lavis_dcd.common.manifest import Identity
        from lavis_dcd.common.schema import plain
        from lavis_dcd.job import _DataIdentities
        from lavis_dcd.training.run_folder import settings_digests, write_run_manifest

        folder = Path(job.run.output_dir) / job.run.project / job.run.job_id
        folder.mkdir(parents=True, exist_ok=True)
        self.ran.append(folder.name)
        rows = [row("student", 50.0 + job.run.seed)]
        if job.run.evaluate_teacher:
            rows = [row("teacher", 80.0), row("student before training", 1.0), *rows]
        results = {"title": "t", "split": job.run.table_splits[0], "rows": rows, "gallery": [], "machine": {}}
        results = json.dumps(self.results(folder.name, results))
        for name, text in (("config.yaml", "model: {}"), ("results.json", results), ("student.pth", "s")):
            (folder / name).write_text(text)
            if self.stop_after == (folder.name, name):
                raise KeyboardInterrupt
        config = {"model": plain(job.model_cfg), "datasets": plain(job.datasets_cfg), "run": job.run.to_dict()}
        data = _DataIdentities().of(job)
        write_run_manifest(folder, Identity(settings_digests(config), data.rows, data.pictures))
        self.after(folder.name)


class Comparison:
    """The job ``job.yaml`` of two variants, in the current folder; ``home`` is its folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self._folder, self._capsys = folder / "output" / "job" / "c", folder, capsys
        self.training: Any = Training()
        self.sections: dict[str, Any] = {
            "model": {"arch": "meter_retrieval", "model_type": "student_coco",
                      "text": {"name": "asset:quickstart/vocab.txt"}},
            "datasets": {"image_text_retrieval": {"build_info": {"root": "photos", "csv": "captions.csv"}}},
            "run": {"device": "cpu", "job_id": "c", "valid_splits": ["val"], "test_splits": ["test"]},
            "variants": {"student": {}, "low": {"run": {"init_lr": 1e-6}}},
        }  # fmt: skip

    def train(self, *options: str) -> tuple[int, list[str]]:
        """Run the command; return its status and the lines of its errors."""
        from lavis_dcd import train

        OmegaConf.save(OmegaConf.create(self.sections), self._folder / "job.yaml")
        self._capsys.readouterr()
        arguments = ["--options", *options] if options else []
        status = train.main(["--cfg-path", "job.yaml", *arguments])
        err = self._capsys.readouterr().err
        assert "Traceback" not in err
        return status, [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]

    def refused(self, *options: str) -> str:
        """Run the command, which must refuse with one line and train nothing; return the line."""
        before, ran = self.files(), list(self.training.ran)
        status, lines = self.train(*options)
        assert status == 2 and len(lines) == 1, lines
        assert self.training.ran == ran and self.files() == before
        return lines[0]

    def files(self) -> dict[str, bytes]:
        """The comparison's files."""
        return {str(p.relative_to(self.home)): p.read_bytes() for p in self.home.rglob("*") if p.is_file()}

    def table(self) -> dict[str, dict[str, Any]]:
        """The rows of the comparison's table by name."""
        return {row["name"]: row for row in json.loads((self.home / "results.json").read_text())["rows"]}


@pytest.fixture
def comparison(tmp_path, monkeypatch, capsys, cache, pictures) -> Comparison:
    lines = [
        f"{item['image']},{caption},{split}"
        for item, split in zip(pictures, SPLITS, strict=True)
        for caption in item["caption"]
    ]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption,split", *lines]))
    monkeypatch.chdir(tmp_path)
    made = Comparison(tmp_path, capsys)
    monkeypatch.setattr("lavis_dcd.job._run", lambda job: made.training(job))
    return made
