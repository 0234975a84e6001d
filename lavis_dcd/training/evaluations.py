"""A run's evaluations: made once, kept in `evaluations.json`, and reused by a resumed job if they are of its data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lavis_dcd.common.errors import NotFiniteError, UserError
from lavis_dcd.common.manifest import AbsentError, DamagedError, Identity, Manifest, digest_of
from lavis_dcd.common.processes import ALONE
from lavis_dcd.common.texts import shown
from lavis_dcd.config.run_section import EvaluationProtocol, RunConfig
from lavis_dcd.reporting.table import ResultRow
from lavis_dcd.training.contracts import TrainTask
from lavis_dcd.training.devices import Process
from lavis_dcd.training.resume_checks import changed_data, splits_of
from lavis_dcd.training.saved_state import as_integer, as_mapping, as_number
from lavis_dcd.training.writing import writing_into

FILE = "evaluations.json"
KIND, FORMAT = "file of evaluations", 2  # 1 was the bare metrics
TEACHER, PROTOCOL = "the teacher", "the protocol of evaluations"
_FIGURES = ResultRow.__annotations__.keys() - {"name", "how"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a matcher on a split.

    Args:
        name: of the matcher.
        step: the optimizer steps that its weights had taken; None for weights that do not learn.
    """

    name: str
    split: str
    step: int | None
    metrics: Mapping[str, Any]

    @classmethod
    def parse(cls, stored: Any) -> Evaluation:
        """Read what `asdict` wrote.

        Raises:
            ValueError: a value that no job writes.
        """
        entry = as_mapping(stored, "evaluation", ("name", "split", "step", "metrics"))
        for key in ("name", "split"):
            if not isinstance(entry[key], str):
                raise ValueError(f"{key}: {shown(entry[key])} is no text")
        if entry["step"] is not None:
            as_integer(entry["step"], "step")
        for key, value in as_mapping(entry["metrics"], "metrics").items():
            _check_metric(key, value)
        return cls(**entry)


def _check_metric(key: str, value: Any) -> None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if key == "how":
        if not isinstance(value, str):
            raise ValueError(f"metrics.how: {shown(value)} is no text")
    elif type(value) in (int, float) or key.removeprefix("1k_") in _FIGURES:
        as_number(value, f"metrics.{key}", -1e100, 1e100)


def evaluation_identity(identity: Identity, run: RunConfig) -> Identity:
    """Return what the evaluations of a job depend on.

    Args:
        identity: of the job.
    """
    protocol = EvaluationProtocol.of_run(run)
    how = [protocol.k_test, protocol.shortlist, protocol.coco_1k_folds, protocol.amp]
    settings = {name: value for name, value in identity.settings.items() if name != "the settings of run"}
    return Identity({**settings, PROTOCOL: digest_of(how)}, identity.rows, identity.pictures)


class Evaluations:
    """The evaluations of a run, keyed by split, matcher and optimizer step.

    A resumed job repeats none that was kept (`write`) and is of its data, its settings and its teacher. The processes
    share an evaluation's work where the task says that it can (`evaluates_over_ranks`); otherwise the main one
    evaluates and the others wait.

    Args:
        folder: the run folder.
        task: its `evaluate_matcher` gives the metrics.
        identity: `evaluation_identity` of the job.
        resume_step: forget evaluations of later steps; None forgets all.
    """

    def __init__(
        self,
        folder: Path,
        task: TrainTask,
        run: RunConfig,
        process: Process,
        identity: Identity | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._folder, self._task, self._run, self._process = folder, task, run, process
        self._identity = identity or Identity()
        self._done: dict[tuple[str, str, int | None], Evaluation] = {}
        if resume_step is not None:
            # the main process's view of the disk counts: whether something is evaluated is the same in all
            stored = self._process.share(self._stored() if self._process.is_main else None)
            for entry in stored:
                if entry.step is None or entry.step <= resume_step:
                    self._done[entry.name, entry.split, entry.step] = entry

    def _stored(self) -> list[Evaluation]:
        try:
            manifest = Manifest.read(self._folder, KIND, FORMAT, FILE)
            entries = [Evaluation.parse(entry) for entry in manifest.facts.get("evaluations", ())]
        except AbsentError:
            return []
        except (DamagedError, ValueError, TypeError) as error:
            log.warning("%s is passed over (%s): its evaluations are made again", self._folder / FILE, error)
            return []
        kept = [entry for entry in entries if self._is_current(entry, manifest.identity)]
        if len(kept) < len(entries):
            why = ", ".join(self._differences(manifest.identity)) or "data that it does not name"
            gone = len(entries) - len(kept)
            log.warning("%s: %d evaluations are not reused, for what changed since: %s", FILE, gone, why)
        return kept

    def _is_current(self, entry: Evaluation, made: Identity) -> bool:
        now = self._identity
        changed = Identity(made.settings).differences(Identity(now.settings))
        if changed and (entry.name == "teacher" or changed != [TEACHER]):
            return False
        if splits_of(changed_data(made, now), [entry.split]):
            return False
        return not now.rows or bool(splits_of(made.rows, [entry.split]))

    def _differences(self, made: Identity) -> list[str]:
        data = [f"the {what} of {name}" for name, what in changed_data(made, self._identity).items()]
        return data + Identity(made.settings).differences(Identity(self._identity.settings))

    def get(self, name: str, split: str, step: int | None) -> dict[str, Any] | None:
        """Return the metrics of an evaluation that was made, else None."""
        entry = self._done.get((name, split, step))
        return dict(entry.metrics) if entry else None

    def evaluate(
        self,
        name: str,
        matcher: Any,
        dataset: Any,
        split: str,
        step: int | None,
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Return the metrics of `matcher` on a split, evaluated now unless that was done before.

        The caller puts the model into eval mode.

        Args:
            name: of the matcher ("teacher", "student", ...).
            step: how many optimizer steps its weights have seen; None for weights that do not learn.
            facts: numbers that stand beside the metrics; an evaluation that was made with others counts as none.
        """
        stored = self.get(name, split, step)
        if stored is not None and all(stored.get(key) == value for key, value in facts.items()):
            return stored
        measures = self._process.is_main or self._shares_work
        metrics = self._process.share(self._measure(name, matcher, dataset, split) if measures else None) | facts
        self._done[name, split, step] = Evaluation(name, split, step, metrics)
        return dict(metrics)

    @property
    def _shares_work(self) -> bool:
        return self._process.world_size > 1 and self._task.evaluates_over_ranks

    def _measure(self, name: str, matcher: Any, dataset: Any, split: str) -> dict[str, Any]:
        begin = time.monotonic()
        ranks = self._process.ranks if self._shares_work else ALONE
        try:
            with torch.no_grad():
                evaluation = self._task.evaluate_matcher(
                    matcher, dataset, self._run, self._process.device, ranks=ranks, folder=self._folder
                )
        except NotFiniteError as error:
            raise UserError([f"{name} on {split}: {line}" for line in error.faults]) from error
        metrics = {key: _plain(value) for key, value in evaluation.items()}
        if self._process.is_main:
            log.info("%s on %s: %s (%.1f s)", name, split, summary(metrics), time.monotonic() - begin)
        return metrics

    def write(self) -> None:
        """Write what was evaluated so far to the run folder.

        Raises:
            UserError: the disk does not take it.
        """
        if self._process.is_main:
            entries = [
                {"name": entry.name, "split": entry.split, "step": entry.step, "metrics": dict(entry.metrics)}
                for entry in self._done.values()
            ]
            with writing_into(self._folder):
                Manifest(KIND, FORMAT, self._identity, facts={"evaluations": entries}).write(self._folder, FILE)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def summary(metrics: Mapping[str, Any]) -> str:
    """Return the figures of one evaluation as a line."""
    names = [
        key
        for key in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean", "r_sum")
        if isinstance(metrics.get(key), (int, float))
    ]
    names = names or [key for key, value in metrics.items() if isinstance(value, float)]
    return ", ".join(f"{key} {metrics[key]:.2f}" for key in names)
