"""The life of a job: start or resume, train, choose the best, evaluate, export. Knows nothing of LAVIS."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.seeding import seed_everything, seed_for
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.tree import batch_groups
from lavis_dcd.reporting.report import write_report
from lavis_dcd.training import checkpoint
from lavis_dcd.training.best_checkpoint import Judge
from lavis_dcd.training.devices import MemoryPeaks, this_process, wrap_for_training
from lavis_dcd.training.interrupt import InterruptGuard
from lavis_dcd.training.logs import MetricsLog, StepLog, log_file, progress
from lavis_dcd.training.run_folder import export_model, write_config
from lavis_dcd.training.sampler import TrainLoader
from lavis_dcd.training.sharding import load_model, unsharded
from lavis_dcd.training.step import Stepper
from lavis_dcd.training.training_state import Position, Saver, find_start

logger = logging.getLogger(__name__)


class Trainer:
    """Trains and evaluates a model in a run folder.

    Args:
        run: the `run:` section.
        config: the whole job, {"model", "datasets", "run"} in plain containers; kept in checkpoints and in
            config.yaml.
        task: `train_step(model, samples) -> dict | Tensor` and
            `evaluate_matcher(matcher, dataset, run, device) -> dict` (with "agg_metrics" where there are
            run.valid_splits); optionally `prepare(model, datasets, run, device)` (may return other sets),
            `wrap_training_set(dataset, model)` and `gallery(matchers, dataset, run, device) -> list`.
        model: optionally `matchers()`, `exported()`, `teacher_fingerprint()`, `head_parameter_names()`,
            `find_unused_parameters`, `sharding_units()`.
        datasets: by split; "train" is the training set, concatenated from run.train_splits.
        project: the name of the folder below run.output_dir.
        job_id: a proposed name of the run folder.

    Raises:
        UserError: a split is missing; the device is not there; the job to resume cannot be continued.
    """

    def __init__(
        self,
        run: RunConfig,
        config: Mapping[str, Any],
        task: Any,
        model: nn.Module,
        datasets: Mapping[str, Any],
        project: str = "job",
        job_id: str | None = None,
    ) -> None:
        self.run, self.task, self.datasets, self.project = run, task, dict(datasets), project
        self.config = {**config, "run": run.to_dict()}
        missing = run.missing_splits(self.datasets)
        if missing:
            raise UserError(missing)
        self.place = this_process(run)
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        self.model = model.to(self.place.device)
        self.position = Position(world_size=self.place.world_size)
        self._memory = MemoryPeaks(self.place.device)
        self._guard = InterruptGuard()
        self._judge: Judge | None = None
        # Hashing a large teacher takes seconds, and it does not change.
        self._teacher = model.teacher_fingerprint() if hasattr(model, "teacher_fingerprint") else ""
        folder = Path(run.output_dir).absolute() / project
        self._start = find_start(
            run, self.place, folder, job_id, self.config, self._teacher, self.model, self.datasets.get("train")
        )
        self.output_dir = self._start.folder

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
            self._train_epochs()
            self._judge.load_best()
            return self._finish()

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate without training; write results.json and the report.

        Args:
            cur_epoch, skip_reload: as LAVIS's runners have them. The weights are those that the model has, or
                the best of the job that run.resume names.
        """
        del cur_epoch, skip_reload
        with self._open():
            if self._start.weights is not None:
                load_model(self.model, self._start.weights)
            return self._finish(export=False)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with log_file(self.output_dir / "log.txt", self.place.is_main):
            self._begin()
            try:
                yield
            finally:
                self.metrics.close()

    def _begin(self) -> None:
        run, place = self.run, self.place
        step = self.position.global_step or None  # evaluate() after train()
        if self._start.continued is not None and step is None:
            step = self._start.continued["position"]["global_step"]
        logger.info("run folder: %s (%s)", self.output_dir, place.device)
        seed_everything(seed_for(run.seed, "start"))
        first = self._judge is None
        if first and hasattr(self.task, "prepare"):
            used = {split: self.datasets[split] for split in run.used_splits}
            prepared = self.task.prepare(self.model, used, run, place.device)
            self.datasets.update(prepared or {})
        # a job that was refused by now leaves no file that would take its name
        if place.is_main:
            write_config(self.output_dir, self.config)
            if step is not None:
                checkpoint.discard_after(self.output_dir, step)
        self.metrics = MetricsLog(self.output_dir, step, place.is_main)
        best = None if first else self._judge.best
        self._judge = Judge(
            self.output_dir, run, place, self.task, self.model, self.datasets, self.metrics, resume_step=step
        )
        self._judge.best = best

    def _set_up_training(self) -> None:
        run, place, dataset = self.run, self.place, self.datasets["train"]
        if hasattr(self.task, "wrap_training_set"):
            dataset = self.task.wrap_training_set(dataset, self.model)
        self._loader = TrainLoader(
            dataset,
            run.batch_size_train,
            run.seed,
            drop_last=run.drop_last,
            num_workers=run.num_workers,
            pin_memory=place.device.type == "cuda",
            rank=place.rank,
            world_size=place.world_size,
            groups=batch_groups(dataset, run.batch_by) if run.batch_by else None,
        )
        self.steps_per_epoch = math.ceil(len(self._loader) / run.accum_grad_iters)
        self.total_steps = min(run.max_epoch * self.steps_per_epoch, run.max_steps or math.inf)
        self._judge.steps_per_epoch = self.steps_per_epoch
        wrapped = wrap_for_training(self.model, place, run.strategy)
        self._log = StepLog(run, place, self.output_dir, self.metrics, self.steps_per_epoch, self.total_steps)
        self._stepper = Stepper(self.task, wrapped, self.model, run, place, self.total_steps)
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        logger.info(
            "%s training samples, %d steps per epoch, %d in all; %s trainable parameters",
            f"{len(dataset):,}",
            self.steps_per_epoch,
            self.total_steps,
            f"{trainable:,}",
        )
        origin = {"config": self.config, "teacher_fingerprint": self._teacher, "data": self._start.data}
        self._saver = Saver(
            self.output_dir, run, place, self.model, self._stepper, self._log.window, self._judge, origin
        )
        if self._start.continued is not None:
            self.position = self._saver.restore(self._start.continued)

    def _train_epochs(self) -> None:
        run, position = self.run, self.position
        if position.global_step == 0 and run.evaluate_before and run.table_splits:
            with self._evaluating():
                self._judge.evaluate_learner(run.table_splits, 0)
            self._judge.keep()
            self._save()
        while True:
            with self._memory.phase("training"):
                self._train_epoch()
            done = position.global_step >= self.total_steps
            if run.valid_splits and (done or (position.epoch + 1) % run.eval_every_epochs == 0):
                with self._evaluating():
                    self._judge.validate(position.global_step)
            if done:
                return
            position.epoch, position.step_in_epoch = position.epoch + 1, 0

    def _train_epoch(self) -> None:
        """From the position to the end of its epoch (or of the job), with a checkpoint at the end."""
        run, position, begin = self.run, self.position, time.monotonic()
        first = position.step_in_epoch
        last = first + min(self.steps_per_epoch - first, self.total_steps - position.global_step)
        if last <= first:
            return
        self.model.train()
        batches = self._log.clock.timed(self._loader.epoch(position.epoch, first * run.accum_grad_iters))
        label = f"epoch {position.epoch + 1}/{run.max_epoch}"
        with self._guard as guard, progress(self.steps_per_epoch, first, label, self.place.is_main) as bar:
            for number in range(first, last):
                self._train_step(batches, number)
                bar.update()
                due = number + 1 == last or position.global_step % (run.save_every or math.inf) == 0
                if due:
                    self._save()
                if self.place.any(guard.requested):  # perhaps while the checkpoint was being written
                    if not due:
                        self._save()
                    raise guard.error(self.place)
        logger.info("%s: %d steps in %.1f s", label, last - first, time.monotonic() - begin)

    def _train_step(self, batches: Iterator[Any], number: int) -> None:
        run, position = self.run, self.position
        size = min(run.accum_grad_iters, len(self._loader) - number * run.accum_grad_iters)
        extra = {  # LAVIS's own three, and the part of the whole job that is done
            "epoch": position.epoch,
            "iters": number,
            "num_iters_per_epoch": self.steps_per_epoch,
            "progress": position.global_step / self.total_steps,
        }
        lr, health = self._stepper.lr, self._stepper.health
        with self._log.clock.step():
            report = self._stepper.step(batches, size, position.global_step, extra)
        position.global_step += 1
        position.step_in_epoch = number + 1
        health.check(run.max_bad_steps, position.global_step, self.output_dir, self.datasets["train"])
        self._log.add(report, position.global_step, lr, health.skipped)

    def _save(self) -> None:
        self._log.finite_means(self.position.global_step)
        self._saver.save(self.position)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with self._memory.phase("evaluation"), unsharded(self.model):
            yield

    def _finish(self, export: bool = True) -> dict[str, Any]:
        judge, place = self._judge, self.place
        step = judge.best["step"] if judge.best is not None else self.position.global_step
        with unsharded(self.model):
            with self._memory.phase("evaluation"):
                found = judge.evaluate_learner(self.run.table_splits, step, self.position.global_step)
                judge.keep()
                judge.evaluate_teacher(self.position.global_step)
            written = place.is_main and judge.write_results(self.project, step, self._memory.facts())
            place.share(None)
        if export:
            path = export_model(self.output_dir, self.model, write=place.is_main)
            if place.is_main:
                logger.info("model: %s", path)
        if written and self.run.report:
            logger.info("report: %s", write_report(self.output_dir))
        place.share(None)
        return found
