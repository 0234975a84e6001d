"""The task ``dcd_retrieval``: data sets and model from a job, training steps, evaluation of every matcher."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import reorg_datasets_by_split
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from lavis_dcd.banks.feature_bank import FeatureBank
from lavis_dcd.banks.feature_cache import with_kept_features
from lavis_dcd.banks.feature_sets import BankedTrainingSet, banked_sample
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.common.schema import parse, plain
from lavis_dcd.config.batches_section import BANK
from lavis_dcd.config.run_section import EvaluationProtocol, RunConfig
from lavis_dcd.datasets.lavis_sets import with_opener
from lavis_dcd.datasets.neighbours import NeighbourTable
from lavis_dcd.datasets.pictures import load_picture, verify_pictures
from lavis_dcd.datasets.random_captions import RandomCaptions
from lavis_dcd.datasets.splits import check_annotations
from lavis_dcd.datasets.training_sample import TrainingSample
from lavis_dcd.datasets.tree import is_evaluation_set
from lavis_dcd.datasets.unpaired_rows import drawn_apart
from lavis_dcd.datasets.views import MatcherViews, with_views
from lavis_dcd.evaluation.evaluator import Evaluation, EvaluationCache, Evaluator
from lavis_dcd.evaluation.gallery import PICTURE_SIDE, GalleryItem, gallery_items
from lavis_dcd.evaluation.pair_checks import caption_faults, learning_faults, shortlist_faults
from lavis_dcd.evaluation.shortlist import ShortlistError
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.learner import as_learner
from lavis_dcd.mining.neighbours import neighbours_by_bank, neighbours_by_teacher
from lavis_dcd.mining.score_cache import KeptScores
from lavis_dcd.mining.scores import MiningResources
from lavis_dcd.models.building import build_matcher
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.training.contracts import TrainTask

log = logging.getLogger(__name__)

# of ``run:``, all that this task reads
RUN_KEYS = (
    "seed", "evaluate", "evaluate_teacher_on_train", "verify", "picture_content", "cache_features", "cache_dtype",
    "k_test", "shortlist", "coco_1k_folds", "batch_size_eval", "num_workers", "amp", "match_memory_mb",
    "eval_memory_mb",
)  # fmt: skip


def run_config(run: Any) -> RunConfig:
    """Return the ``run:`` section parsed, if it is not yet: of a mapping, the keys that this task reads.

    LAVIS's own runners have sections with keys and values of their own.

    Raises:
        UserError: a value of the wrong type or out of its range.
    """
    if isinstance(run, RunConfig):
        return run
    section = plain(run)
    return parse(RunConfig, {key: section[key] for key in RUN_KEYS if section.get(key) is not None}, "run")


@registry.register_task("dcd_retrieval")
class DcdRetrievalTask(TrainTask, BaseTask):
    """Image-text retrieval with any matchers, a distiller's teacher and student included.

    Args:
        run: the ``run:`` section, a mapping or ``RunConfig``.
    """

    def __init__(self, run: Any = None) -> None:
        super().__init__()
        self.run = run
        self._matchers: dict[str, Matcher | Ensemble] = {}
        self._evaluations = EvaluationCache()
        self._views = MatcherViews()
        self._scores: KeptScores | None = None
        # of the job that is prepared: its data sets by split before views and kept features, and these where it trains
        self._built: Mapping[str, Any] = {}
        self._bank: FeatureBank | None = None

    @classmethod
    def setup_task(cls, cfg: Any = None, **_: Any) -> DcdRetrievalTask:
        """Make the task of a job, as LAVIS does."""
        return cls(getattr(cfg, "run_cfg", None))

    def build_model(self, cfg: Any) -> nn.Module:
        """Build the job's model; one of LAVIS's own that has an adapter comes as a matcher.

        Raises:
            UserError: a section that does not fit its model; a score bank that the job needs and that is not there.
        """
        if adapter_for(cfg.model_cfg.arch) is not None:
            return cast(nn.Module, build_matcher(cfg.model_cfg, "model"))
        self._scores = KeptScores.of_job(cfg)
        model = super().build_model(cfg)
        if self._scores is not None:
            model.use_score_bank(self._scores.bank)
        return model

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Build the job's data sets by builder and split, their pictures verified as ``run.verify`` says.

        Raises:
            UserError: pictures that are missing or broken, all of them listed.
        """
        datasets = {
            builder: {split: with_opener(dataset) for split, dataset in splits.items()}
            for builder, splits in super().build_datasets(cfg).items()
        }
        mode = run_config(cfg.run_cfg).verify
        faults: list[str] = []
        for splits in datasets.values():
            for dataset in splits.values():
                try:
                    verify_pictures(dataset, mode)
                except UserError as error:
                    faults += error.faults
        if faults:
            raise UserError(faults)
        # the training set of one builder and the test set of another may share pictures, too
        by_split = reorg_datasets_by_split(datasets)
        joined = {split: sets[0] if len(sets) == 1 else ConcatDataset(sets) for split, sets in by_split.items()}
        check_annotations(joined, contents=mode != "off")
        return datasets

    def prepare(self, model: nn.Module, datasets: Mapping[str, Any], run: Any, device: Any = None) -> dict[str, Any]:
        """Return ``datasets`` by split as the job reads them: from a feature bank with ``run.cache_features``.

        Training sets carry a view for every matcher that reads pictures and captions in its own way
        (``model.views()``); evaluation sets stay as they are, see :meth:`dataset_for`.

        Raises:
            UserError: matchers and data that cannot work together; a stale score bank; the encoders learn, or the
                model's matchers do not share them; processors that cannot be built.
        """
        config = run_config(run)
        self._adopt(model, run)
        self._built, self._bank = datasets, None
        if self._scores is not None and not config.evaluate:
            self._scores.check(datasets)
        self._check_pair(datasets, config)
        views = self._views.by_name
        if config.cache_features != "off":
            kept = with_kept_features(datasets, cast(dict[str, Matcher], self._matchers), views, config)
            training = kept.get("train")
            if isinstance(training, BankedTrainingSet):
                self._bank = training.bank
                if _sees_items_again(len(training), config):
                    as_learner(model).use_feature_bank(training.bank)
            return kept
        return {
            split: dataset if is_evaluation_set(dataset) or not views else with_views(dataset, views)
            for split, dataset in datasets.items()
        }

    def _adopt(self, model: nn.Module, run: Any) -> None:
        self.run, self._matchers = run, dict(as_learner(model).matchers())
        self._views = MatcherViews.of_model(model)

    def _check_pair(self, datasets: Mapping[str, Any], run: RunConfig) -> None:
        faults = shortlist_faults(self._matchers, run.k_test, run.shortlist)
        sets = [dataset for dataset in datasets.values() if is_evaluation_set(dataset)]
        if sets:
            faults += caption_faults(self._matchers, lambda matcher: self.dataset_for(matcher, sets[0]).text)
            student = self._matchers.get("student")
            if isinstance(student, Matcher) and not faults and not run.evaluate:
                read = self.dataset_for(student, sets[0])
                faults += learning_faults(student, read[0]["image"], read.text)
        if faults:
            raise UserError(faults)

    def dataset_for(self, matcher: Matcher, dataset: Any) -> Any:
        """Return the evaluation set as this matcher reads it: through its own processors where it has some."""
        return self._views.dataset_for(matcher, dataset)

    def wrap_training_set(self, dataset: Any, model: nn.Module) -> Any:
        """Return the training set as it is drawn for this job, with the candidates that the model wants.

        These are captions drawn at random (``random_captions_per_image``), or hard ones out of a score bank. Pictures
        and texts of an unpaired set are put beside each other by ``run.seed`` and the epoch.

        Raises:
            UserError: the model trains from a score bank that :meth:`build_model` has not loaded, or of other rows.
        """
        learner, seed = as_learner(model), run_config(self.run).seed
        dataset = drawn_apart(dataset, seed)
        wrap: Callable[[Any], Any]
        if learner.needs_score_bank:
            if self._scores is None:
                raise UserError("model.candidates: the score bank is not loaded; build the model with this task")
            wrap = partial(self._scores.around, seed=seed)
        elif count := learner.random_captions_per_image:
            wrap = partial(RandomCaptions, count=count, seed=seed)
        else:
            return dataset
        return dataset.wrapped(wrap) if isinstance(dataset, BankedTrainingSet) else wrap(dataset)

    def neighbours(self, dataset: Any, model: nn.Module, run: Any) -> NeighbourTable:
        """Return the neighbours of the training set's pictures by the teacher, or by a score bank; after `prepare`.

        Raises:
            UserError: a model without a teacher or a bank, or a teacher without a joint space.
        """
        config = run_config(run)
        batches, teacher, section = config.batches, self._matchers.get("teacher"), getattr(model, "config", None)
        if batches is None:
            raise UserError("run.batches: is empty, so no neighbours are wanted")
        if batches.by == BANK:
            if self._scores is None:
                raise UserError("run.batches.by: bank, but no score bank is loaded; build the model with this task")
            return neighbours_by_bank(batches, self._scores.bank, self._built)
        if teacher is None or not isinstance(section, DcdConfig):
            raise UserError(f"run.batches.by: {batches.by}, but {type(model).__name__} has no teacher")
        protocol = EvaluationProtocol.of_run(config)
        amp = section.frozen_amp if protocol.amp == "off" else protocol.amp  # as in training
        resources = MiningResources(protocol.batch_size, protocol.num_workers, amp, protocol.memory_mb)
        return neighbours_by_teacher(batches, teacher, section, self._built, dataset, resources)

    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the model's output: ``loss``, its parts, diagnostics, all 0-dim."""
        return model(samples)

    # `evaluate_matcher` takes `ranks`: the runner then calls it in every process, not in the main one alone
    evaluates_over_ranks = True

    def evaluate_matcher(
        self,
        matcher: Matcher | Ensemble,
        dataset: Any,
        run: Any,
        device: torch.device | str | None = None,
        shortlist: Matcher | Ensemble | None = None,
        ranks: ProcessGroup = ALONE,
        folder: Path | None = None,
    ) -> Evaluation:
        """Evaluate one matcher; the result reads as the mapping of its figures.

        Args:
            shortlist: whose joint space makes the shortlist; by default the one that ``run.shortlist`` names.
            ranks: processes that share the work; all must call.
            folder: of the run, where features that do not fit into memory wait; without one, the system's temporary
                folder.

        Raises:
            UserError: ``run.shortlist`` names no matcher of the model, or one without a joint space; an empty set; no
                room on the disk for features that shall not stay in memory.
        """
        spill_folder = folder if folder is not None and folder.is_dir() else None
        protocol = replace(EvaluationProtocol.of_run(run_config(run)), spill_folder=spill_folder)
        shortlist = shortlist or self._shortlist_matcher(protocol)
        self._evaluations.drop(matcher)  # its tables would stand beside the new ones
        try:
            evaluation = Evaluator(protocol, device, ranks, self.dataset_for).evaluate(matcher, dataset, shortlist)
        except ShortlistError as error:
            raise UserError(
                f"run.shortlist: {error}; name a matcher that has one (for METER: joint_head), or leave run.k_test "
                "empty to score every pair"
            ) from error
        self._evaluations.put(matcher, dataset, evaluation)
        return evaluation

    def _shortlist_matcher(self, protocol: EvaluationProtocol) -> Matcher | Ensemble | None:
        name = protocol.shortlist
        if protocol.k_test is None or name is None or name == "joint":
            return None
        if name not in self._matchers:
            known = ", ".join(["joint", *self._matchers])
            raise UserError(f"run.shortlist: {name!r} is none of this job's matchers: {known}")
        return self._matchers[name]

    def training_sample(self, teacher: Matcher | Ensemble, like: Any, run: Any) -> Any | None:
        """Return as many training pictures as ``like`` has, with as many captions of each as are usual there.

        They are the same for every job on the same training set. Read as ``like`` is, or from the feature bank.

        Returns:
            None where ``run.evaluate_teacher_on_train`` says no, or says nothing and the pairs are not those of dual
            encoders; and where the training set is too small, or of another shape than LAVIS's.
        """
        wanted = run_config(run).evaluate_teacher_on_train
        wanted = teacher.family == "dual" if wanted is None else wanted
        training = self._built.get("train")
        if not wanted or training is None or not len(like):
            return None
        size, captions = len(like), max(1, round(len(like.text) / len(like)))
        try:
            if self._bank is not None:
                return banked_sample(TrainingSample(training, size, captions, seed=0), self._bank)
            read = like.vis_processor, like.text_processor
            return TrainingSample(training, size, captions, 0, *read)
        except (AttributeError, ValueError) as error:
            log.info("the teacher is not evaluated on training pictures: %s", error)
            return None

    def gallery(
        self,
        matchers: Mapping[str, Matcher | Ensemble],
        dataset: Any,
        run: Any,
        device: torch.device | str | None = None,
        count: int = 12,
        seed: int = 0,
        folder: Path | None = None,
    ) -> list[GalleryItem]:
        """Return queries with what each matcher returns, see ``evaluation.gallery``.

        The scores of this process's last evaluation serve where the weights are still the same.

        Args:
            folder: of the run, as of :meth:`evaluate_matcher`.
        """
        evaluations = {
            name: self._evaluations.get(matcher, dataset)
            or self.evaluate_matcher(matcher, dataset, run, device, folder=folder)
            for name, matcher in matchers.items()
        }
        source = getattr(dataset, "source", dataset)
        return gallery_items(evaluations, dataset, lambda row: load_picture(source, row, PICTURE_SIDE), count, seed)

    def evaluation(self, model: nn.Module, data_loader: Any, **_: Any) -> dict[str, Any]:
        """Return the figures of the learner on the loader's data set; LAVIS's own runners call this."""
        if not self._matchers:
            self._adopt(model, self.run)
        learner = self._matchers.get("student") or next(iter(self._matchers.values()))
        dataset = getattr(data_loader, "dataset", data_loader)
        return dict(self.evaluate_matcher(learner, dataset, self.run).metrics)

    def before_evaluation(self, model: nn.Module, dataset: Any, **_: Any) -> None:
        """Do nothing: LAVIS's hook, and there is nothing to prepare."""

    def after_evaluation(self, val_result: Any = None, **_: Any) -> Any:
        """Return the figures as they are: LAVIS's hook."""
        return val_result


def _sees_items_again(items: int, run: RunConfig) -> bool:
    """Return whether a job comes back to the items of its training set."""
    samples = (run.max_steps or math.inf) * run.batch_size_train * run.accum_grad_iters
    return not run.evaluate and min(samples, run.max_epoch * items) > items
