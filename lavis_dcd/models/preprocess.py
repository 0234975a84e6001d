"""The processors that a ``model:`` section wants its pictures and captions to go through."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.config import model_defaults
from lavis_dcd.datasets.views import Processor, View, evaluation_view
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.views import MAIN_VIEW

log = logging.getLogger(__name__)

KINDS = ("vis_processor", "text_processor")
STAGES = ("train", "eval")


def preprocess_of(section: Mapping[str, Any], explicit_only: bool = False) -> dict[str, Any] | None:
    """``{"vis_processor": {"train": ..., "eval": ...}, "text_processor": {...}}`` as far as known, else ``None``.

    Args:
        section: of the model; its key ``preprocess`` goes, kind by kind, before that of its model type's YAML. The
            YAML's pictures have the size that the section gives its model, where it gives one.
        explicit_only: leave the YAML out.
    """
    own = _plain(section.get("preprocess"))
    if explicit_only:
        return own
    default = _resized(_plain(model_defaults(section).get("preprocess")), section)
    if own is None or default is None:
        return default if own is None else own
    return {**default, **own}


def build_view(section: Mapping[str, Any], path: str, learner: bool = False) -> View:
    """How the matcher of a ``model:`` section reads pictures and captions.

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
    """How the matchers of a model read, and the evaluation sets as they do, each made once.

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
        """Those that ``model.views()`` and ``model.view_matchers()`` name; none for other models."""
        sections = model.views() if hasattr(model, "views") else {}
        found = {}
        for name, section in sections.items():
            view = build_view(section, _place(name), learner=name == MAIN_VIEW)
            if view != View():
                found[name] = view
                log.info("%s reads %s", name, view)
        return cls(found, model.view_matchers() if found else {})

    def dataset_for(self, matcher: Matcher, dataset: Any) -> Any:
        """The set as this matcher reads it; the set itself for a matcher without a view."""
        name = next((name for name, own in self._matchers.items() if own is matcher), None)
        if name not in self.by_name:
            return dataset
        for kept_name, source, made in self._made:
            if kept_name == name and source is dataset:
                return made
        made = evaluation_view(dataset, self.by_name[name])
        self._made.append((name, dataset, made))
        return made


def _place(view: str) -> str:
    """Where the section of a view's matcher stands."""
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
        # our own processors know only their kind
        kind = path.split(".")[-2]
        faults = [line.replace(kind, path, 1) if line.startswith(kind) else line for line in error.faults]
        raise UserError(faults) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: {name} cannot be built: {str(error).splitlines()[0]}") from error


def _words(config: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in config.items() if key != "name")
    return f"{config['name']} ({settings})" if settings else str(config["name"])
