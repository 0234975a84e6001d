"""Runs of ``pairs_budget.py``: each is a job that is trained once, and its figures in a file of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pairs_jobs import Budget, make_job, teacher_of

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import digest_of
from lavis_dcd.reporting.results import RESULTS, Results

PROJECT = "pairs_budget"
Figures = dict[str, Any]


class Runs:
    """The runs below a folder: those that are done are read, the others are trained.

    Args:
        folder: gets ``jobs/``, ``rows/``, the run folders, and the teacher's kept scores.
        data: "scenes" or "flickr8k".
        options: ``a.b=c`` settings over those of every job.
        quick: jobs of a few steps.
    """

    def __init__(self, folder: Path, data: str, options: Sequence[str] = (), quick: bool = False) -> None:
        self.folder, self.data, self.options, self.quick = folder, data, list(options), quick

    def known(self, budget: Budget) -> Figures | None:
        """Return the figures of a run that is done; None of one that is not.

        Raises:
            UserError: it was trained with other settings.
        """
        file = self._file("rows", budget, "json")
        if not file.exists():
            return None
        figures = json.loads(file.read_text(encoding="utf-8"))
        if figures["settings"] != self._digest(budget):
            raise UserError(f"{file}: was measured with other settings; remove it, or give another --folder")
        return figures

    def measure(self, budget: Budget) -> Figures:
        """Train one run, or go on with one that was interrupted, and write its figures."""
        from kept_scores import scores_kept_in  # registers the distiller that the jobs name

        from lavis_dcd.job import run_job

        job = self._job(budget)
        teacher = teacher_of(self.data, budget.student)
        with_teacher = all(row["teacher"] != teacher or row["teacher_r_sum"] is None for row in self._rows())
        OmegaConf.update(job, "run.evaluate_teacher", with_teacher, force_add=True)
        path = self._file("jobs", budget, "yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(job, path)
        place = self.folder / PROJECT / f"{self.data}-{budget.name}"
        again = ["run.resume=auto"] if place.exists() else []
        started, used = time.perf_counter(), time.process_time()
        with scores_kept_in(self.folder / "scores"):
            run_job(str(path), again, (), evaluate=False)
        figures = {
            **{"data": self.data, "student": budget.student, "strategy": budget.strategy, "pairs": budget.pairs},
            **{"seed": budget.seed, "teacher": teacher, **_results(place), "settings": self._digest(budget)},
            **{"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used},
        }
        self._write(budget, figures)
        return figures

    def _rows(self) -> list[Figures]:
        files = sorted((self.folder / "rows").glob(f"{self.data}-*.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def _job(self, budget: Budget) -> Any:
        job = make_job(self.data, budget, self.quick, self.options)
        place = {"output_dir": str(self.folder), "project": PROJECT, "job_id": f"{self.data}-{budget.name}"}
        return OmegaConf.merge(job, {"run": place})

    def _digest(self, budget: Budget) -> str:
        content = OmegaConf.to_container(self._job(budget))
        content["run"].pop("output_dir")
        return digest_of(content)

    def _file(self, folder: str, budget: Budget, kind: str) -> Path:
        return self.folder / folder / f"{self.data}-{budget.name}.{kind}"

    def _write(self, budget: Budget, figures: Figures) -> None:
        file = self._file("rows", budget, "json")
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        part.replace(file)


def _results(place: Path) -> Figures:
    """Return the recalls of the student, the teacher's where it was evaluated, and the number of steps."""
    rows = {row["name"]: row for row in Results.read(place / RESULTS).rows}
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    student, teacher = rows["student"], rows.get("teacher")
    recalls = {key: student[key] for key in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")}
    return {
        "r_sum": student["r_sum"],
        "teacher_r_sum": None if teacher is None else teacher["r_sum"],
        "steps": max(line["step"] for line in lines if line["kind"] == "train"),
        **recalls,
    }
