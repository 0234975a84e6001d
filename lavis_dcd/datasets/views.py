"""Data sets for matchers that read pictures and captions differently: one decoding, a reading per matcher."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.job_file import model_defaults
from lavis_dcd.datasets.tree import original, plain_sets, replace_plain_sets
from lavis_dcd.matching.contract import MAIN_VIEW, Matcher
from lavis_dcd.matching.learner import as_learner

log = logging.getLogger(__name__)

KINDS = ("vis_processor", "text_processor")

Processor = Callable[[Any], Any]


@dataclass(frozen=True)
class View:
    """One matcher's reading of pictures and captions; ``None`` leaves the data set's own processor.

    Args:
        vis_train, text_train: while another matcher trains on the same pictures and captions.
        vis_eval, text_eval: in evaluation.
        words: per use, what the log says of it.
    """

    vis_train: Processor | None = None
    vis_eval: Processor | None = None
    text_train: Processor | None = None
    text_eval: Processor | None = None
    words: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        def said(use: str) -> str:
            return self.words.get(use, "the data set's own processor")

        parts = []
        for what, kind in (("pictures", "vis"), ("captions", "text")):
            train, evaluation = said(f"{kind}_train"), said(f"{kind}_eval")
            parts.append(f"{what} through {evaluation}" + (f" (in training {train})" if train != evaluation else ""))
        return ", ".join(parts)


class _Several(BaseProcessor):
    """The processors of all views; the main view first.

    Args:
        processors: by view; those that are alike run once and share what they made.
    """

    def __init__(self, processors: Mapping[str, Processor]) -> None:
        super().__init__()
        self.processors: dict[str, Processor] = {}
        self._made_by: dict[str, str] = {}
        for name, processor in processors.items():
            twin = next((other for other, known in self.processors.items() if alike(known, processor)), name)
            self.processors.setdefault(twin, processor)
            self._made_by[name] = twin
        # an unused function of the base class, which other processes could not be sent
        del self.transform

    def __call__(self, item: Any) -> dict[str, Any]:
        made = {name: processor(item) for name, processor in self.processors.items()}
        return {name: made[source] for name, source in self._made_by.items()}


class MultiImage(_Several):
    """PIL picture -> {view: FloatTensor ``[3, H, W]`` of its own size}."""


class MultiText(_Several):
    """Caption -> {view: str}."""


def alike(one: Processor, other: Processor) -> bool:
    """Return whether two processors surely make the same of an item (up to random draws): equal in all they hold."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        return _held(one) == _held(other)
    except (pickle.PicklingError, AttributeError, TypeError):
        # what cannot be pickled (a function made inside another) cannot be compared either
        return False


def _held(processor: Processor) -> bytes:
    # LAVIS's base class leaves a function that does nothing behind, which cannot be pickled
    if getattr(getattr(processor, "transform", None), "__qualname__", "").startswith("BaseProcessor.__init__."):
        twin = copy.copy(cast(BaseProcessor, processor))
        del twin.transform
        return pickle.dumps(twin)
    return pickle.dumps(processor)


def with_views(dataset: Any, views: Mapping[str, View]) -> Any:
    """A copy of a training set whose pictures and captions are mappings from view to value.

    The main view is what the set's own processors make, unless ``views`` has one for it. A view that reads like the
    main one is left out; with none left over, values stay plain. A picture is decoded once.

    Args:
        dataset: a LAVIS retrieval training set, a concatenation of some, or a wrapper with ``.dataset``.
        views: by name (see ``matching.contract``).

    Raises:
        UserError: a set that has no processors to put others beside.
    """
    sets = list(plain_sets(dataset, "").values())
    for plain in sets:
        if not (hasattr(plain, "vis_processor") and hasattr(plain, "text_processor")):
            raise UserError(
                f"the data set {type(plain).__name__} has no vis_processor and text_processor, so that matchers with "
                f"processors of their own ({', '.join(views)}) cannot read it; give all of them the same processors"
            )
    kinds = {
        "vis_processor": (MultiImage, {name: view.vis_train for name, view in views.items()}),
        "text_processor": (MultiText, {name: view.text_train for name, view in views.items()}),
    }
    more = {}
    for kind, (several, of_view) in kinds.items():
        main = of_view.pop(MAIN_VIEW, None)
        mains = [main or getattr(plain, kind) for plain in sets]
        # all sets of a concatenation need the same views, or their samples would not make one batch
        others = {
            name: processor
            for name, processor in of_view.items()
            if processor is not None and not all(alike(of_set, processor) for of_set in mains)
        }
        more[kind] = (several, main, others)
    return replace_plain_sets(dataset, "", lambda _, plain: _viewed(plain, more))


def _viewed(plain: Any, more: Mapping[str, tuple[type[_Several], Processor | None, dict[str, Processor]]]) -> Any:
    twin = copy.copy(plain)
    for kind, (several, main, others) in more.items():
        processor = main or getattr(plain, kind)
        setattr(twin, kind, several({MAIN_VIEW: processor, **others}) if others else processor)
    return twin


def evaluation_view(dataset: Any, view: View) -> Any:
    """A copy of an evaluation set, its pictures and captions as the view reads them; rows and tables are the same.

    A set that answers from a feature bank is taken without it: the bank's features are of another reading.

    Args:
        dataset: LAVIS's retrieval evaluation shape, with the captions as written in ``annotation[i]["caption"]``.

    Raises:
        UserError: the captions as written are not there.
    """
    dataset = original(dataset)
    twin = copy.copy(dataset)
    if view.vis_eval is not None:
        twin.vis_processor = view.vis_eval
    if view.text_eval is not None:
        captions = _written(dataset)
        twin.text_processor = view.text_eval
        twin.text = [view.text_eval(caption) for caption in captions]
    return twin


def _written(dataset: Any) -> list[str]:
    rows = getattr(dataset, "annotation", [])
    captions = [caption for row in rows for caption in row.get("caption", ())]
    if len(captions) != len(dataset.text):
        raise UserError(
            f"the evaluation set {type(dataset).__name__} has {len(dataset.text)} captions, but {len(captions)} as "
            "written (annotation[i]['caption']), so that no matcher can read them through its own text processor; give "
            "all matchers the data set's (preprocess.text_processor: null)"
        )
    return captions


def preprocess_of(section: Mapping[str, Any], explicit_only: bool = False) -> dict[str, Any] | None:
    """``{"vis_processor": {"train": ..., "eval": ...}, "text_processor": {...}}`` as far as known, else ``None``.

    Args:
        section: of the model; its key ``preprocess`` goes, kind by kind, before that of its model type's YAML. The
            YAML's pictures have the size that the section gives its model, where it gives one.
        explicit_only: leave the YAML out.
    """
    written = _plain(section.get("preprocess"))
    if explicit_only:
        return written
    default = _resized(_plain(model_defaults(section).get("preprocess")), section)
    if written is None or default is None:
        return default if written is None else written
    return {**default, **written}


def build_view(section: Mapping[str, Any], path: str, learner: bool = False) -> View:
    """Return the reading of pictures and captions by the matcher of a ``model:`` section.

    One that does not learn reads training data as it reads evaluation data, without random changes, unless its
    section (not the YAML of its type) names a ``train`` processor.

    Args:
        section: with ``arch``, and ``model_type`` or ``preprocess``.
        path: where the section stands, for messages.
        learner: the matcher learns, so the YAML's ``train`` processors count too.

    Raises:
        UserError: processors that are not registered or cannot be built.
    """
    wanted = preprocess_of(section) or {}
    explicit = wanted if learner else preprocess_of(section, explicit_only=True) or {}
    built: dict[str, Processor] = {}
    words: dict[str, str] = {}
    for kind, short in zip(KINDS, ("vis", "text"), strict=True):
        evaluation = (wanted.get(kind) or {}).get("eval")
        train = (explicit.get(kind) or {}).get("train")
        for stage, config in (("eval", evaluation), ("train", train)):
            if config is not None:
                built[f"{short}_{stage}"] = _build(config, f"{path}.preprocess.{kind}.{stage}")
                words[f"{short}_{stage}"] = _words(config)
        if train is None and evaluation is not None:
            built[f"{short}_train"], words[f"{short}_train"] = built[f"{short}_eval"], words[f"{short}_eval"]
    return View(**built, words=words)


class MatcherViews:
    """The readings of a model's matchers, and the evaluation sets so read, each made once.

    Args:
        by_name: of the views; those that change nothing are left out.
        matchers: whose view it is, by the same names.
    """

    def __init__(
        self, by_name: Mapping[str, View] | None = None, matchers: Mapping[str, Matcher] | None = None
    ) -> None:
        self.by_name, self._matchers = dict(by_name or {}), dict(matchers or {})
        self._made: list[tuple[str, Any, Any]] = []

    @classmethod
    def of_model(cls, model: nn.Module) -> MatcherViews:
        """Return the views that the model's ``views()`` and ``view_matchers()`` name; none for most models."""
        learner, by_name = as_learner(model), {}
        for name, section in learner.views().items():
            view = build_view(section, _place(name), learner=name == MAIN_VIEW)
            if view != View():
                by_name[name] = view
                log.info("%s reads %s", name, view)
        return cls(by_name, learner.view_matchers() if by_name else {})

    def dataset_for(self, matcher: Matcher, dataset: Any) -> Any:
        """The set as this matcher reads it; the set itself for a matcher without a view."""
        name = next((name for name, other in self._matchers.items() if other is matcher), None)
        if name is None or name not in self.by_name:
            return dataset
        for made_for, source, made in self._made:
            if made_for == name and source is dataset:
                return made
        made = evaluation_view(dataset, self.by_name[name])
        self._made.append((name, dataset, made))
        return made


def _place(view: str) -> str:
    """The path of the section of a view's matcher."""
    return f"model.{view.replace('teacher.', 'teachers.')}"


def _resized(default: dict[str, Any] | None, section: Mapping[str, Any]) -> dict[str, Any] | None:
    sizes = section.get("sizes") or {}
    places = [section, section.get("vision") or {}, sizes, sizes.get("vision") or {}]
    side = next((place["image_size"] for place in places if place.get("image_size")), None)
    for config in ((default or {}).get("vis_processor") or {}).values():
        if side is not None and config and "image_size" in config:
            config["image_size"] = side
    return default


def _plain(section: Any) -> dict[str, Any] | None:
    if OmegaConf.is_config(section):
        return OmegaConf.to_container(section, resolve=True)
    return None if section is None else dict(section)


def _build(config: Any, path: str) -> Processor:
    name = config.get("name") if isinstance(config, Mapping) else None
    processor = registry.get_processor_class(name) if name else None
    if processor is None:
        known = ", ".join(registry.list_processors())
        raise UserError(f"{path}.name: {name!r} is not registered; registered: {known}")
    try:
        return processor.from_config(OmegaConf.create(config))
    except UserError as error:
        # processors of this package name only their kind
        kind = path.split(".")[-2]
        faults = [line.replace(kind, path, 1) if line.startswith(kind) else line for line in error.faults]
        raise UserError(faults) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: {name} cannot be built: {str(error).splitlines()[0]}") from error


def _words(config: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in config.items() if key != "name")
    return f"{config['name']} ({settings})" if settings else str(config["name"])
