"""The task `dcd_retrieval`: data sets and model from a job, training steps, evaluation of every matcher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn

from lavis_dcd.banks.feature_cache import with_kept_features
from lavis_dcd.banks.feature_sets import BankedTrainingSet
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.common.schema import parse
from lavis_dcd.config.run_section import EvaluationProtocol, RunConfig
from lavis_dcd.datasets.pictures import load_picture, verify_pictures
from lavis_dcd.datasets.random_captions import RandomCaptions
from lavis_dcd.datasets.splits import check_annotations
from lavis_dcd.datasets.tree import is_evaluation_set
from lavis_dcd.datasets.views import MatcherViews, with_views
from lavis_dcd.evaluation.evaluator import Evaluation, evaluate
from lavis_dcd.evaluation.gallery import PICTURE_SIDE, gallery_items
from lavis_dcd.evaluation.pair_checks import caption_faults, learning_faults, shortlist_faults
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.mining.score_cache import KeptScores
from lavis_dcd.models.building import build_matcher

log = logging.getLogger(__name__)


def matchers_of(model: nn.Module) -> dict[str, Matcher]:
    """What can be evaluated, by name: ``model.matchers()``, else the model itself as "model"."""
    return dict(model.matchers()) if hasattr(model, "matchers") else {"model": model}


@registry.register_task("dcd_retrieval")
class DcdRetrievalTask(BaseTask):
    """Image-text retrieval with any matchers, a distiller's teacher and student included.

    Args:
        run: the ``run:`` section, a mapping or ``RunConfig``.
    """

    def __init__(self, run: Any = None) -> None:
        super().__init__()
        self.run = run
        self._matchers: dict[str, Matcher] = {}
        self._kept = _KeptEvaluations()
        self._views = MatcherViews()
        self._scores: KeptScores | None = None

    @classmethod
    def setup_task(cls, cfg: Any = None, **_: Any) -> DcdRetrievalTask:
        """LAVIS's way to make a task."""
        return cls(getattr(cfg, "run_cfg", None))

    def build_model(self, cfg: Any) -> nn.Module:
        """The job's model; one of LAVIS's own that has an adapter comes as a matcher.

        Raises:
            UserError: a section that does not fit its model; a score bank that the job needs and that is not there.
        """
        if adapter_for(cfg.model_cfg.arch) is not None:
            return build_matcher(cfg.model_cfg, "model")
        self._scores = KeptScores.of_job(cfg)
        model = super().build_model(cfg)
        if self._scores is not None:
            model.use_score_bank(self._scores.bank)
        return model

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """The job's data sets by builder and split, their pictures verified as ``run.verify`` says.

        Raises:
            UserError: pictures that are missing or broken, all of them listed.
        """
        datasets = super().build_datasets(cfg)
        mode = cfg.run_cfg.get("verify", "fast")
        faults: list[str] = []
        for splits in datasets.values():
            for dataset in splits.values():
                try:
                    verify_pictures(dataset, mode)
                except UserError as error:
                    faults += error.faults
        if faults:
            raise UserError(faults)
        for splits in datasets.values():
            check_annotations(splits)
        return datasets

    def prepare(self, model: nn.Module, datasets: Mapping[str, Any], run: Any, device: Any = None) -> dict[str, Any]:
        """``datasets`` by split, answering from a feature bank where ``run.cache_features`` asks for one.

        Training sets carry a view for every matcher that reads pictures and captions in its own way
        (``model.views()``); evaluation sets stay as they are, see :meth:`dataset_for`.

        Raises:
            UserError: matchers and data that cannot work together; a stale score bank; the encoders learn, or the
                model's matchers do not share them; processors that cannot be built.
        """
        self._adopt(model, run)
        if self._scores is not None and not _option(run, "evaluate", False):
            self._scores.check(datasets)
        self._check_pair(datasets)
        mode = _option(run, "cache_features", "off")
        if mode == "off":
            views = self._views.by_name
            return {
                split: dataset if is_evaluation_set(dataset) or not views else with_views(dataset, views)
                for split, dataset in datasets.items()
            }
        return with_kept_features(datasets, self._matchers, self._views.by_name, _run_config(run))

    def _adopt(self, model: nn.Module, run: Any) -> None:
        self.run, self._matchers = run, matchers_of(model)
        self._views = MatcherViews.of_model(model)

    def _check_pair(self, datasets: Mapping[str, Any]) -> None:
        protocol = EvaluationProtocol.of_run(self.run)
        faults = shortlist_faults(self._matchers, protocol.k_test, protocol.shortlist)
        sets = [dataset for dataset in datasets.values() if is_evaluation_set(dataset)]
        if sets:
            faults += caption_faults(self._matchers, lambda matcher: self.dataset_for(matcher, sets[0]).text)
            student = self._matchers.get("student")
            if student is not None and not faults and not _option(self.run, "evaluate", False):
                read = self.dataset_for(student, sets[0])
                faults += learning_faults(student, read[0]["image"], read.text)
        if faults:
            raise UserError(faults)

    def dataset_for(self, matcher: Matcher, dataset: Any) -> Any:
        """The evaluation set as this matcher reads it: through its own processors where it has some."""
        return self._views.dataset_for(matcher, dataset)

    def wrap_training_set(self, dataset: Any, model: nn.Module) -> Any:
        """The training set with the candidates that the model wants: captions drawn at random
        (``random_captions_per_image``), or hard ones out of a score bank.

        Raises:
            UserError: the model trains from a score bank that :meth:`build_model` has not loaded, or of other rows.
        """
        count, seed = getattr(model, "random_captions_per_image", 0), int(_option(self.run, "seed", 0))
        if getattr(model, "needs_score_bank", False):
            if self._scores is None:
                raise UserError("model.candidates: the score bank is not loaded; build the model with this task")
            wrap = partial(self._scores.around, seed=seed)
        elif count:
            wrap = partial(RandomCaptions, count=count, seed=seed)
        else:
            return dataset
        return dataset.wrapped(wrap) if isinstance(dataset, BankedTrainingSet) else wrap(dataset)

    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's output: ``loss``, its parts, diagnostics."""
        return model(samples)

    # -- evaluation ----------------------------------------------------------------------------------------

    # `evaluate_matcher` takes `ranks`: the runner then calls it in every process, not in the main one alone
    evaluates_over_ranks = True

    def evaluate_matcher(
        self,
        matcher: Matcher,
        dataset: Any,
        run: Any,
        device: Any = None,
        shortlist: Matcher | None = None,
        ranks: ProcessGroup = ALONE,
    ) -> Evaluation:
        """Figures and scores of one matcher; the result reads as the mapping of its figures.

        Args:
            shortlist: whose joint space makes the shortlist; by default the one that ``run.shortlist`` names.
            ranks: processes that share the work; all must call.

        Raises:
            UserError: ``run.shortlist`` names no matcher of the model, or one without a joint space; see `evaluate`.
        """
        protocol = replace(EvaluationProtocol.of_run(run), spill_folder=_run_folder())
        shortlist = shortlist or self._shortlist_matcher(protocol)
        self._kept.drop(matcher)  # its tables would stand beside the new ones
        own = {"dataset_of": lambda reader: self.dataset_for(reader, dataset)} if self._views.by_name else {}
        found = evaluate(matcher, dataset, protocol, device, shortlist, ranks=ranks, **own)
        self._kept.put(matcher, dataset, found)
        return found

    def _shortlist_matcher(self, protocol: EvaluationProtocol) -> Matcher | None:
        name = protocol.shortlist
        if protocol.k_test is None or name in (None, "joint"):
            return None
        if name not in self._matchers:
            known = ", ".join(["joint", *self._matchers])
            raise UserError(f"run.shortlist: {name!r} is none of this job's matchers: {known}")
        return self._matchers[name]

    def gallery(
        self,
        matchers: Mapping[str, Matcher],
        dataset: Any,
        run: Any,
        device: Any = None,
        count: int = 12,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Queries with what each matcher returns, see ``evaluation.gallery``.

        The scores of this process's last evaluation serve where the weights are still the same.
        """
        found = {
            name: self._kept.get(matcher, dataset) or self.evaluate_matcher(matcher, dataset, run, device)
            for name, matcher in matchers.items()
        }
        source = getattr(dataset, "source", dataset)
        return gallery_items(found, dataset, lambda row: load_picture(source, row, PICTURE_SIDE), count, seed)

    def evaluation(self, model: nn.Module, data_loader: Any, **_: Any) -> dict[str, Any]:
        """LAVIS's own runners call this: the figures of the learner on the loader's data set."""
        if not self._matchers:
            self._adopt(model, self.run)
        learner = self._matchers.get("student") or next(iter(self._matchers.values()))
        dataset = getattr(data_loader, "dataset", data_loader)
        return dict(self.evaluate_matcher(learner, dataset, self.run).metrics)

    def before_evaluation(self, model: nn.Module, dataset: Any, **_: Any) -> None:
        """LAVIS's hook; nothing to prepare."""

    def after_evaluation(self, val_result: Any = None, **_: Any) -> Any:
        """LAVIS's hook: the figures as they are."""
        return val_result


class _KeptEvaluations:
    """The last evaluation of each matcher, as long as its weights and the set are the ones evaluated."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Any, Any, Any, Evaluation]] = {}

    def put(self, matcher: Matcher, dataset: Any, found: Evaluation) -> None:
        self._last[id(matcher)] = (matcher, dataset, _weights_state(matcher), found)

    def drop(self, matcher: Matcher) -> None:
        self._last.pop(id(matcher), None)

    def get(self, matcher: Matcher, dataset: Any) -> Evaluation | None:
        kept = self._last.get(id(matcher))
        if kept is None or kept[1] is not dataset or kept[2] != _weights_state(matcher):
            return None
        return kept[3]


def _weights_state(matcher: Matcher) -> list[tuple[int, int]]:
    """Which tensors hold the weights, and how often each was written in place."""
    # not of state_dict(), which would take a sharded model's whole weights away
    return [(t.data_ptr(), t._version) for t in (*matcher.parameters(), *matcher.buffers())]


def _run_folder() -> Path | None:
    """Where the runner that is at work puts its outputs: LAVIS keeps it under this name."""
    folder = registry.get_path("output_dir")
    return Path(folder) if folder and Path(folder).is_dir() else None


def _run_config(run: Any) -> RunConfig:
    if isinstance(run, RunConfig):
        return run
    values = {name: _option(run, name, None) for name in RunConfig.__dataclass_fields__}
    return parse(RunConfig, {name: value for name, value in values.items() if value is not None}, "run")


def _option(run: Any, name: str, default: Any) -> Any:
    value = run.get(name) if hasattr(run, "get") else getattr(run, name, None)
    return default if value is None else value
