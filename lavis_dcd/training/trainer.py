"""The life of a job: start or resume, train, choose the best weights, evaluate, export.

The loop works with any `TrainTask` and any model (`contracts.py`). It is free of LAVIS's registry and configuration
classes: `runners/runner_dcd.py` brings those.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
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
from lavis_dcd.training.job_neighbours import job_neighbourhoods
from lavis_dcd.training.logs import MetricsLog, StepLog, log_file, progress
from lavis_dcd.training.neighbourhoods import Neighbourhoods
from lavis_dcd.training.resume_checks import Origin, fingerprint
from lavis_dcd.training.run_folder import clear_run_manifest, export_model, hold, write_config, write_run_manifest
from lavis_dcd.training.sampler import TrainLoader
from lavis_dcd.training.step import Progress, Stepper
from lavis_dcd.training.strategy import make_strategy
from lavis_dcd.training.training_state import JobState, Position, find_resume_point, from_main
from lavis_dcd.training.writing import require_folder, writing_into

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
        self._written: set[str] = set()  # names of the job's products
        folder = Path(run.output_dir).absolute() / project
        self._resume_point = find_resume_point(run, self.process, folder, job_id, self._origin(), self.model)
        self._held: ExitStack | None = self._resume_point.held
        self.output_dir = self._resume_point.folder

    def _origin(self) -> Origin:
        """Return what the job is made of; the main process reads the data, which takes seconds where it is large."""
        run, used = self.run, {split: self.datasets[split] for split in self.run.used_splits}
        needs_as_built = run.evaluate_before and run.table_splits and not run.evaluate

        def origin() -> Origin:
            # hashing a large teacher takes seconds, and it does not change
            teacher = as_learner(self.model).teacher_fingerprint()
            as_built = fingerprint(self.model) if needs_as_built else ""
            return Origin.of(self.config, teacher, as_built, used, run.picture_content)

        return from_main(self.process, origin)

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
            self._evaluate_as_built()
            self._restore()
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
            weights = self._resume_point.weights
            if weights is not None:
                log.info("evaluating %s (%s)", weights.words, weights.path)
                self._strategy.load_model(weights.model)
            return self._finish(export=False)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._holding(), log_file(self.output_dir / "log.txt", self.process.is_main):
            self._begin()
            try:
                yield
            finally:
                self.metrics.close()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Have the run folder's lock, which the constructor took, until the end; take it again the next time."""
        held, self._held = self._held, None
        if held is None:
            held = ExitStack()
            from_main(self.process, lambda: held.enter_context(hold(self.output_dir)) and None)
        with held:
            yield

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
        changed = set() if self._begun else self._resume_point.changed_splits(run.used_splits)
        if process.is_main:
            with writing_into(self.output_dir):
                clear_run_manifest(self.output_dir)
                kept = {key: value for key, value in self.config.items() if key != environment.KEY}
                write_config(self.output_dir, kept)
                if step is not None:
                    checkpoint.discard_after(self.output_dir, step)
        self.metrics = MetricsLog(self.output_dir, step, process.is_main, changed)
        best = self._best.best if self._begun else None
        self._best = self._make_best_checkpoint(step)
        self._best.best = best
        self._begun = True

    def _step_before(self) -> int | None:
        """Return the step at which the job goes on: after train(), or of the checkpoint; None for a new job."""
        if self.position.global_step:
            return self.position.global_step
        continued = self._resume_point.continued
        return None if continued is None else continued.step

    def _make_best_checkpoint(self, resume_step: int | None) -> BestCheckpoint:
        return BestCheckpoint(
            self.output_dir,
            self.run,
            self._task,
            self._strategy,
            self.datasets,
            self.metrics,
            self._resume_point.origin.identity,
            resume_step,
        )

    def _set_up_training(self) -> None:
        run, process = self.run, self.process
        neighbourhoods = self._find_neighbourhoods()
        dataset = self._task.wrap_training_set(self.datasets["train"], self.model)
        self._loader = self._make_loader(dataset, neighbourhoods)
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
        self._state = JobState(
            self.output_dir,
            run,
            self._strategy,
            self._stepper,
            self._log.means,
            self._best,
            self._resume_point.origin,
            None if neighbourhoods is None else neighbourhoods.table.digest(),
        )

    def _find_neighbourhoods(self) -> Neighbourhoods | None:
        training_set, continued = self.datasets["train"], self._resume_point.continued
        find = partial(self._task.neighbours, training_set, self.model, self.run)
        return job_neighbourhoods(self.run, self.output_dir, self.process, continued, find)

    def _make_loader(self, dataset: Any, neighbourhoods: Neighbourhoods | None) -> TrainLoader:
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
            groups=self._groups(dataset),
            neighbourhoods=neighbourhoods,
        )

    def _groups(self, dataset: Any) -> list[tuple[Any, Any]] | None:
        key = self.run.batch_key
        where = "run.batch_by" if self.run.batches is None else "run.batches.by"
        return None if key is None else batch_groups(dataset, key, where)

    def _evaluate_as_built(self) -> None:
        """Evaluate the model before its first step again, where a resumed job has no such evaluation of its data."""
        run, continued = self.run, self._resume_point.continued
        if continued is None or continued.step == 0 or self.position.global_step or not run.evaluate_before:
            return
        splits = self._best.lacks_before()
        if splits and continued.content["as_built"] != self._resume_point.origin.as_built:
            log.warning("the model before training is not in the table: it is not built as it was in the first run")
        elif splits:
            with self._evaluating():
                self._best.evaluate_learner(splits, 0)
            self._best.write_evaluations()

    def _restore(self) -> None:
        continued = self._resume_point.continued
        if continued is None or self.position.global_step:
            return
        self._state.restore_best(continued)
        if self._best.best is not None and self._resume_point.changed_splits(self.run.valid_splits):
            with self._evaluating():
                self._best.rescore()
        self.position = self._state.restore(continued)

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
        if self.process.is_main:
            require_folder(self.output_dir)

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
            if process.is_main:
                self._written.update(best.write_results(self.project, step, self._memory.facts()))
            process.share(None)
        if export:
            path = export_model(self.output_dir, self._strategy)
            if process.is_main:
                self._written.add(path.name)
                log.info("model: %s", path)
        if process.is_main:
            self._finish_folder()
        process.share(None)
        return by_split

    def _finish_folder(self) -> None:
        """Write the report, and then the mark that all is written."""
        if self.run.report and "results.json" in self._written:
            with writing_into(self.output_dir):
                path = write_report(self.output_dir)
            self._written.add(path.name)
            log.info("report: %s", path)
        best = self._best.best
        identity, step = self._resume_point.origin.identity, None if best is None else best["step"]
        write_run_manifest(self.output_dir, identity, sorted(self._written), step)


def _stored(config: Mapping[str, Any], written: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a configuration as it is kept: texts of interpolations, and digests of what came in by them."""
    kept: dict[str, Any] = as_stored(dict(written or config))
    from_environment = environment.digests(kept, config)
    return {**kept, environment.KEY: from_environment} if from_environment else kept
