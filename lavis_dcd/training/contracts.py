"""The contracts of the training loop with a task and a model, and adapters for those that were written without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.neighbours import NeighbourTable

T = TypeVar("T")


class TrainTask:
    """The task of a job: a step's loss, and the evaluation of a matcher on a data set."""

    # Whether `evaluate_matcher` shares its work among `ranks`, so that every process must call it
    evaluates_over_ranks: bool = False

    def prepare(
        self, model: nn.Module, datasets: Mapping[str, Any], run: RunConfig, device: torch.device
    ) -> Mapping[str, Any]:
        """Return the data sets by split as the job will read them; by default as they are."""
        return datasets

    def wrap_training_set(self, dataset: Any, model: nn.Module) -> Any:
        """Return the training set with what the model's samples need; by default as it is."""
        return dataset

    def neighbours(self, dataset: Any, model: nn.Module, run: RunConfig) -> NeighbourTable:
        """Return the neighbours of the training set's pictures, as ``run.batches`` wants them; the main process calls.

        Args:
            dataset: the training set as :meth:`prepare` returned it.

        Raises:
            UserError: there is nothing to find them by.
        """
        by = run.batches.by if run.batches else None
        raise UserError(f"run.batches.by: {by}, but the task {type(self).__name__} finds no neighbours; leave it out")

    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> Mapping[str, Any] | Tensor:
        """Return the model's output with "loss" (and scalars for the log), or the loss itself."""
        return model(samples)

    def evaluate_matcher(
        self,
        matcher: Any,
        dataset: Any,
        run: RunConfig,
        device: torch.device | None = None,
        shortlist: Any = None,
        ranks: ProcessGroup = ALONE,
        folder: Path | None = None,
    ) -> Mapping[str, Any]:
        """Return the metrics of a matcher; with "agg_metrics", by which the best step is chosen.

        Args:
            shortlist: the matcher whose joint space makes the shortlist.
            ranks: the processes that share the work.
            folder: the run folder.
        """
        raise NotImplementedError(f"{type(self).__name__} evaluates nothing")

    def training_sample(self, teacher: Any, like: Any, run: RunConfig) -> Any | None:
        """Return training pictures as an evaluation set as large as `like`, on which the teacher shows what it knows.

        By default None: it is not evaluated there.

        Args:
            teacher: the matcher that will be evaluated.
            like: an evaluation set of the job.
        """
        return None

    def gallery(
        self, matchers: Mapping[str, Any], dataset: Any, run: RunConfig, device: torch.device | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """Return queries with what each matcher finds, for the report; by default none."""
        return []


class ForeignTask(TrainTask):
    """A task that does not inherit from `TrainTask`: the methods that it has, else the defaults.

    Its `evaluate_matcher(matcher, dataset, run, device)` gets `ranks` where it sets `evaluates_over_ranks`.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self.evaluates_over_ranks = bool(getattr(task, "evaluates_over_ranks", False))

    @override
    def prepare(
        self, model: nn.Module, datasets: Mapping[str, Any], run: RunConfig, device: torch.device
    ) -> Mapping[str, Any]:
        prepare = getattr(self._task, "prepare", super().prepare)
        return prepare(model, datasets, run, device) or datasets

    @override
    def wrap_training_set(self, dataset: Any, model: nn.Module) -> Any:
        return getattr(self._task, "wrap_training_set", super().wrap_training_set)(dataset, model)

    @override
    def neighbours(self, dataset: Any, model: nn.Module, run: RunConfig) -> NeighbourTable:
        table: NeighbourTable = getattr(self._task, "neighbours", super().neighbours)(dataset, model, run)
        return table

    @override
    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> Mapping[str, Any] | Tensor:
        return self._task.train_step(model, samples)

    @override
    def evaluate_matcher(
        self,
        matcher: Any,
        dataset: Any,
        run: RunConfig,
        device: torch.device | None = None,
        shortlist: Any = None,
        ranks: ProcessGroup = ALONE,
        folder: Path | None = None,
    ) -> Mapping[str, Any]:
        more = {"ranks": ranks} if self.evaluates_over_ranks else {}
        return self._task.evaluate_matcher(matcher, dataset, run, device, **more)

    @override
    def training_sample(self, teacher: Any, like: Any, run: RunConfig) -> Any | None:
        return getattr(self._task, "training_sample", super().training_sample)(teacher, like, run)

    @override
    def gallery(
        self, matchers: Mapping[str, Any], dataset: Any, run: RunConfig, device: torch.device | None = None
    ) -> Sequence[Mapping[str, Any]]:
        return getattr(self._task, "gallery", super().gallery)(matchers, dataset, run, device)


def as_task(task: Any) -> TrainTask:
    """Return the task itself if it is a `TrainTask`, else a view of it that has every method."""
    return task if isinstance(task, TrainTask) else ForeignTask(task)
