"""The life of a job: start or resume, train, choose the best weights, evaluate, export.

The loop works with any `TrainTask` and any model (`contracts.py`). It is free of LAVIS's registry and configuration
classes: `runners/runner_dcd.py` brings those.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.names import name_fault
from lavis_dcd.common.secrets import as_stored
from lavis_dcd.common.seeding import seed_everything, seed_for
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.tree import batch_groups
from lavis_dcd.matching.learner import as_learner
from lavis_dcd.reporting.report import write_report
from lavis_dcd.training import checkpoint, environment
from lavis_dcd.training.best_checkpoint import BestCheckpoint
from lavis_dcd.training.contracts import as_task
from lavis_dcd.training.devices import MemoryPeaks, load_warnings, this_process
from lavis_dcd.training.interrupt import InterruptGuard
from lavis_dcd.training.logs import MetricsLog, StepLog, log_file, progress
from lavis_dcd.training.run_folder import export_model, write_config
from lavis_dcd.training.sampler import TrainLoader
from lavis_dcd.training.step import Progress, Stepper
from lavis_dcd.training.strategy import make_strategy
from lavis_dcd.training.training_state import JobState, Position, find_resume_point

log = logging.getLogger(__name__)


class Trainer:
    """Trains and evaluates a model in a run folder.

    Args:
        run: the `run:` section.
        config: the whole job, {"model", "datasets", "run"} in plain containers.
        task: a `TrainTask`, or an object with `train_step`, `evaluate_matcher` and any other method of its.
        model: a `Learner`, or any module, with any of its hooks.
        datasets: by split; "train" is the training set, concatenated from run.train_splits.
        project: the name of the folder below run.output_dir.
        job_id: a proposed name of the run folder.
        written: `config` with interpolations as they are written (by default `config` itself); that is what
            checkpoints and config.yaml keep, without the values that come from the environment.

    Raises:
        UserError: a name that cannot be a folder's; a split is missing; the device is not there; the job to resume
            cannot be continued.
    """

    metrics: MetricsLog
    _best: BestCheckpoint
    _loader: TrainLoader
    _log: StepLog
    _stepper: Stepper
    _state: JobState

    def __init__(
        self,
        run: RunConfig,
        config: Mapping[str, Any],
        task: Any,
        model: nn.Module,
        datasets: Mapping[str, Any],
        project: str = "job",
        job_id: str | None = None,
        written: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.task, self.datasets, self.project = run, task, dict(datasets), project
        self.config = _stored({**config, "run": run.to_dict()}, written)
        named = {"run.project": project, "run.job_id": job_id}
        faults = [name_fault(value, field) for field, value in named.items() if value is not None]
        if found := [*filter(None, faults), *run.missing_splits(self.datasets)]:
            raise UserError(found)
        self.process = this_process(run)
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        self.model = model.to(self.process.device)
        self.position = Position(world_size=self.process.world_size)
        self._task = as_task(task)
        self._strategy = make_strategy(run.strategy, self.model, self.process)
        self._memory = MemoryPeaks(self.process.device)
        self._guard = InterruptGuard()
        self._begun = False
        # hashing a large teacher takes seconds, and it does not change
        teacher = as_learner(self.model).teacher_fingerprint()
        folder = Path(run.output_dir).absolute() / project
        training_set = self.datasets.get("train")
        self._resume_point = find_resume_point(
            run, self.process, folder, job_id, self.config, teacher, self.model, training_set
        )
        self.output_dir = self._resume_point.folder

    # -- the life of a job

    def train(self) -> dict[str, Any]:
        """Run the job to its end.

        Returns:
            The learner's metrics by split of the final table.

        Raises:
            KeyboardInterrupt: after Ctrl-C (`Terminated`: after SIGTERM), once the step is finished and a checkpoint
                is saved.
            UserError: the training set is too small, nothing is trainable, or run.max_bad_steps in a row had a NaN
                or infinite loss or gradient.
        """
        if self.run.evaluate:
            return self.evaluate(skip_reload=True)
        with self._open():
            self._set_up_training()
            self._evaluate_before()
            self._train_epochs()
            self._stepper.health.refuse_untaken(self.total_steps)
            self._best.load_best()
            return self._finish()

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate without training; write results.json and the report.

        Args:
            cur_epoch, skip_reload: as LAVIS's runners have them. The weights are those that the model has, or
                the best of the job that run.resume names.
        """
        del cur_epoch, skip_reload
        with self._open():
            if self._resume_point.weights is not None:
                self._strategy.load_model(self._resume_point.weights)
            return self._finish(export=False)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with log_file(self.output_dir / "log.txt", self.process.is_main):
            self._begin()
            try:
                yield
            finally:
                self.metrics.close()

    def _begin(self) -> None:
        run, process, step = self.run, self.process, self._step_before()
        log.info("run folder: %s (%s)", self.output_dir, process.device)
        if process.is_main:
            for line in load_warnings(run):
                log.warning("%s", line)
        seed_everything(seed_for(run.seed, "start"))
        if not self._begun:
            used = {split: self.datasets[split] for split in run.used_splits}
            self.datasets.update(self._task.prepare(self.model, used, run, process.device))
        # a job that was refused by now leaves no file that would take its name
        if process.is_main:
            write_config(self.output_dir, {key: value for key, value in self.config.items() if key != environment.KEY})
            if step is not None:
                checkpoint.discard_after(self.output_dir, step)
        self.metrics = MetricsLog(self.output_dir, step, process.is_main)
        best = self._best.best if self._begun else None
        self._best = self._make_best_checkpoint(step)
        self._best.best = best
        self._begun = True

    def _step_before(self) -> int | None:
        """Return the step at which the job goes on: after train(), or of the checkpoint; None for a new job."""
        if self.position.global_step:
            return self.position.global_step
        continued = self._resume_point.continued
        return None if continued is None else continued["position"]["global_step"]

    def _make_best_checkpoint(self, resume_step: int | None) -> BestCheckpoint:
        return BestCheckpoint(
            self.output_dir, self.run, self._task, self._strategy, self.datasets, self.metrics, resume_step
        )

    def _set_up_training(self) -> None:
        run, process = self.run, self.process
        dataset = self._task.wrap_training_set(self.datasets["train"], self.model)
        self._loader = self._make_loader(dataset)
        self.steps_per_epoch = -(-len(self._loader) // run.accum_grad_iters)
        all_steps = run.max_epoch * self.steps_per_epoch
        self.total_steps = min(all_steps, run.max_steps or all_steps)
        self._best.steps_per_epoch = self.steps_per_epoch
        self._strategy.wrap()
        self._log = StepLog(run, process, self.output_dir, self.metrics, self.steps_per_epoch, self.total_steps)
        self._stepper = Stepper(self._task, self._strategy, run, self.total_steps)
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        log.info(
            "%s training samples, %d steps per epoch, %d in all; %s trainable parameters",
            f"{len(dataset):,}",
            self.steps_per_epoch,
            self.total_steps,
            f"{trainable:,}",
        )
        origin, continued = self._resume_point.origin, self._resume_point.continued
        self._state = JobState(self.output_dir, run, self._strategy, self._stepper, self._log.means, self._best, origin)
        if continued is not None:
            self.position = self._state.restore(continued)

    def _make_loader(self, dataset: Any) -> TrainLoader:
        run, process = self.run, self.process
        return TrainLoader(
            dataset,
            run.batch_size_train,
            run.seed,
            drop_last=run.drop_last,
            num_workers=run.num_workers,
            pin_memory=process.device.type == "cuda",
            rank=process.rank,
            world_size=process.world_size,
            groups=batch_groups(dataset, run.batch_by) if run.batch_by else None,
        )

    def _evaluate_before(self) -> None:
        run = self.run
        if self.position.global_step == 0 and run.evaluate_before and run.table_splits:
            with self._evaluating():
                self._best.evaluate_learner(run.table_splits, 0)
            self._best.write_evaluations()
            self._save()

    def _train_epochs(self) -> None:
        run, position = self.run, self.position
        while True:
            with self._memory.phase("training"):
                self._train_epoch()
            done = position.global_step >= self.total_steps
            if run.valid_splits and (done or (position.epoch + 1) % run.eval_every_epochs == 0):
                with self._evaluating():
                    self._best.validate(position.global_step)
            if done:
                return
            position.epoch, position.step_in_epoch = position.epoch + 1, 0

    def _train_epoch(self) -> None:
        """Train from the position to the end of its epoch (or of the job), with a checkpoint at the end."""
        run, position, begin = self.run, self.position, time.monotonic()
        first = position.step_in_epoch
        last = first + min(self.steps_per_epoch - first, self.total_steps - position.global_step)
        if last <= first:
            return
        self.model.train()
        batches = self._log.clock.timed(self._loader.epoch(position.epoch, first * run.accum_grad_iters))
        label = f"epoch {position.epoch + 1}/{run.max_epoch}"
        with self._guard as guard, progress(self.steps_per_epoch, first, label, self.process.is_main) as bar:
            for number in range(first, last):
                self._train_step(batches, number)
                bar.update()
                due = number + 1 == last or self._is_save_due()
                if due:
                    self._save()
                if self.process.any(guard.requested):  # perhaps while the checkpoint was being written
                    if not due:
                        self._save()
                    raise guard.error(self.process)
        log.info("%s: %d steps in %.1f s", label, last - first, time.monotonic() - begin)

    def _is_save_due(self) -> bool:
        return self.run.save_every is not None and self.position.global_step % self.run.save_every == 0

    def _train_step(self, batches: Iterator[Any], number: int) -> None:
        run, position = self.run, self.position
        size = min(run.accum_grad_iters, len(self._loader) - number * run.accum_grad_iters)
        where = Progress(
            epoch=position.epoch,
            iters=number,
            num_iters_per_epoch=self.steps_per_epoch,
            progress=position.global_step / self.total_steps,
        )
        lr, health = self._stepper.lr, self._stepper.health
        with self._log.clock.step():
            report = self._stepper.step(batches, size, position.global_step, where)
        position.global_step += 1
        position.step_in_epoch = number + 1
        health.check(run.max_bad_steps, position.global_step, self.output_dir, self.datasets["train"])
        self._log.add(report, position.global_step, lr, health.skipped)

    def _save(self) -> None:
        self._log.finite_means(self.position.global_step)
        self._require_folder()
        self._state.save(self.position)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with self._memory.phase("evaluation"), self._strategy.unsharded():
            yield
        self._require_folder()

    def _require_folder(self) -> None:
        """Refuse to go on where the run folder was deleted: a new one would lack all that was in it."""
        if self.process.is_main and not self.output_dir.is_dir():
            raise UserError(
                f"run.output_dir: {self.output_dir} is gone: it was deleted or moved while the job ran; put it back, "
                "then run.resume=auto, or start the job anew"
            )

    def _finish(self, export: bool = True) -> dict[str, Any]:
        best, process = self._best, self.process
        step = best.best["step"] if best.best is not None else self.position.global_step
        with self._strategy.unsharded():
            with self._memory.phase("evaluation"):
                self._require_folder()
                by_split = best.evaluate_learner(self.run.table_splits, step, self.position.global_step)
                self._require_folder()
                best.write_evaluations()
                best.evaluate_teacher(self.position.global_step)
            self._require_folder()
            written = process.is_main and best.write_results(self.project, step, self._memory.facts())
            process.share(None)
        if export:
            path = export_model(self.output_dir, self._strategy)
            if process.is_main:
                log.info("model: %s", path)
        if written and self.run.report:
            log.info("report: %s", write_report(self.output_dir))
        process.share(None)
        return by_split


def _stored(config: Mapping[str, Any], written: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a configuration as it is kept: texts of interpolations, and digests of what came in by them."""
    kept: dict[str, Any] = as_stored(dict(written or config))
    from_environment = environment.digests(kept, config)
    return {**kept, environment.KEY: from_environment} if from_environment else kept
