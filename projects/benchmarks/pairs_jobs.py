"""The jobs behind ``pairs_budget.py``: a packaged job, a student, and a choice of the candidates that it is shown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.config.job_file import find_config, merge, parse_options, read_yaml
from lavis_dcd.models.meter.config import MeterConfig
from lavis_dcd.models.weights import locate, read

ARCH, FRESH_ARCH = "dcd_kept_scores", "dcd_fresh_student"  # of kept_scores.py
DATA = ("scenes", "flickr8k")
FUSION_TEACHER = "DCD_FUSION_TEACHER"
ALL, STRATEGIES = "all", ("random", "hardest", "mixed", "stratified")
REWEIGHTED = "stratified, reweighted"
STUDENTS = {  # what each is, and where it starts
    "dual": ("A dual encoder", "from random weights"),
    "thinned": ("Half of the teacher's fusion", "started from the teacher's layers"),
    "fresh": ("A fusion of the same size", "from random weights"),
}
# KL to the teacher over the candidates and nothing else: runs differ in the candidates alone
_LOSS = {"alpha": 1.0, "weighting": "uniform", "distill": "kl", "contrastive": "listwise_ce", "in_batch_weight": 0.0}
_RUN = {"save_every": None, "evaluate_before": False, "keep_last": 1, "report": False, "verify": "off"}


@dataclass(frozen=True)
class Budget:
    """One run: which of the three students, on which candidates, with which seed.

    Args:
        student: a key of ``STUDENTS``.
        strategy: one of ``STRATEGIES`` or ``REWEIGHTED``; ``ALL`` for every candidate of the pool.
        pairs: K, candidates per query beside its match; None with ``ALL``.
    """

    student: str
    strategy: str
    pairs: int | None
    seed: int

    @property
    def name(self) -> str:
        """The run in messages, and the name of its files."""
        words = self.strategy.replace(", ", "-") + ("" if self.pairs is None else f"-{self.pairs}")
        return f"{self.student}-{words}-seed{self.seed}"

    @property
    def selection(self) -> dict[str, Any]:
        """The job's ``model.selection``."""
        if self.strategy == ALL:
            return {"hard_negatives": None}
        strategy = "stratified" if self.strategy == REWEIGHTED else self.strategy
        return {"hard_negatives": self.pairs, "strategy": strategy, "reweight": self.strategy == REWEIGHTED}


def make_job(data: str, budget: Budget, quick: bool = False, options: Sequence[str] = ()) -> DictConfig:
    """Return the sections of the job of one run.

    Args:
        data: "scenes" or "flickr8k".
        quick: a few steps on a few scenes, to see that it works.
        options: ``a.b=c`` settings over all others.

    Raises:
        UserError: options of another form; an environment variable that is needed and not set.
    """
    base, changes = (_scenes if data == "scenes" else _flickr8k)(budget.student)
    job = read_yaml(find_config(f"projects/dcd/{base}.yaml"))
    for section in ("variants", "seeds"):
        job.pop(section, None)
    model = changes["model"]
    if "arch" in model["student"]:
        job.model.student = {}  # replaced, not mixed with the packaged job's
    loss = {**_LOSS, **model.pop("loss", {})}
    common = {
        "model": {"arch": FRESH_ARCH if budget.student == "fresh" else ARCH, "loss": loss},
        "run": {**_RUN, "seed": budget.seed},
    }
    job.model.selection = budget.selection
    settings = [common, changes, _QUICK if quick else {}]
    return merge(job, *(OmegaConf.create(section) for section in settings), parse_options(options))


# -- the students on the drawn scenes --------------------------------------------------------------------------------

_SCENES = {"train": 600, "val": 96, "test": 6}
_QUICK = {
    "datasets": {"shape_scenes": {"build_info": {"scenes": {"train": 60, "val": 12, "test": 12}}}},
    "run": {"max_steps": 2},
}


def _scenes(student: str) -> tuple[str, dict[str, Any]]:
    teacher = read_yaml(packaged_folder("configs") / "models" / "meter_retrieval_quickstart.yaml").model
    dual = {
        "arch": "dual_encoder",
        "model_type": "tiny",
        "init_from_teacher": {"towers": True},
        "head": {"dim": 64, "hidden": 256, "image_pooling": "attention_mean", "text_pooling": "attention_mean"},
    }
    # steps and rate: the longest of each before the teacher's own R-sum leaves no room between strategies
    steps, rate = {"dual": (100, 3.0e-3), "thinned": (30, 2.0e-4), "fresh": (100, 1.0e-3)}[student]
    run = {
        "batch_size_train": 24, # four families of six
        "max_epoch": 100, "max_steps": steps, "init_lr": rate, "head_lr_multiplier": 1.0, "eval_every_epochs": 100,
        "k_test": None, "valid_splits": [], "test_splits": ["val"],
    }  # fmt: skip
    changes = {
        "model": {"student": dual if student == "dual" else _half(teacher.fusion.layers)},
        "datasets": {"shape_scenes": {"build_info": {"scenes": _SCENES}}},
        "run": run,
    }
    return "quickstart", changes


# -- the students on Flickr8k ----------------------------------------------------------------------------------------


def _flickr8k(student: str) -> tuple[str, dict[str, Any]]:
    _need("FLICKR8K", "DCD_WEIGHTS", "DCD_TEACHERS" if student == "dual" else FUSION_TEACHER)
    if student == "dual":
        # smaller than the packaged job's, as it is the choice of the candidates that differs here
        head = {"dim": 256, "hidden": 512, "text_pooling": "mean"}
        run = {"max_epoch": 4, "eval_every_epochs": 4, "init_lr": 2.5e-3}
        # the teachers have memorised their training pictures: 0.6 of their logits
        changes = {"loss": {"teacher_temperature": 1.667}, "student": {"head": head}}
        return "flickr8k_ensemble_dcd", {"model": changes, "run": run}
    path = os.environ[FUSION_TEACHER]
    saved = read(locate(path), MeterConfig).config
    student_section = _half(MeterConfig().fusion.layers if saved is None else saved.fusion.layers)
    steps, rate = {"thinned": (150, 1.0e-4), "fresh": (450, 5.0e-4)}[student]
    changes = {"teacher": {"finetuned": path}, "student": student_section}
    run = {"max_epoch": 100, "max_steps": steps, "eval_every_epochs": 100, "init_lr": rate, "k_test": 16}
    return "flickr8k_fusion_thinned", {"model": changes, "run": run}


def teacher_of(data: str, student: str) -> str:
    """Return the name of a student's teacher; students of one name share a teacher."""
    if data == "scenes":
        return "quickstart"
    return "dual encoders" if student == "dual" else "fusion"


def _need(*variables: str) -> None:
    if missing := [name for name in variables if not os.environ.get(name)]:
        raise UserError(f"--data flickr8k: set the environment variables {', '.join(missing)}; see README.md")


def _half(layers: int) -> dict[str, Any]:
    return {"arch": "meter_retrieval", "init_from_teacher": {"layers": half_of(layers)}}


def half_of(layers: int) -> list[int]:
    """Return half of a stack's layers, evenly from the first to the last: 0, 3, 5 of six, the last of two."""
    count = max(1, layers // 2)
    if count == 1:
        return [layers - 1]
    return [int(place * (layers - 1) / (count - 1) + 0.5) for place in range(count)]
