"""Data sets for matchers that read pictures and captions differently: one decoding, a reading per matcher."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lavis.processors.base_processor import BaseProcessor

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.leaves import leaf_sets
from lavis_dcd.matching.views import MAIN_VIEW

Processor = Callable[[Any], Any]


@dataclass(frozen=True)
class View:
    """How one matcher reads pictures and captions; ``None`` leaves the data set's own processor.

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
    """What every view makes of an item; the main view first.

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
    """Whether two processors surely make the same of an item (up to their random draws): equal in all they hold."""
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
        processor = copy.copy(processor)
        del processor.transform
    return pickle.dumps(processor)


def with_views(dataset: Any, views: Mapping[str, View]) -> Any:
    """A copy of a training set whose pictures and captions are mappings from view to value.

    The main view is what the set's own processors make, unless ``views`` has one for it. A view that reads like the
    main one is left out; with none left over, values stay plain. A picture is decoded once.

    Args:
        dataset: a LAVIS retrieval training set, a concatenation of some, or a wrapper with ``.dataset``.
        views: by name (see ``matching.views``).

    Raises:
        UserError: a set that has no processors to put others beside.
    """
    leaves = list(leaf_sets(dataset, "").values())
    for leaf in leaves:
        if not (hasattr(leaf, "vis_processor") and hasattr(leaf, "text_processor")):
            raise UserError(
                f"the data set {type(leaf).__name__} has no vis_processor and text_processor, so that matchers with "
                f"processors of their own ({', '.join(views)}) cannot read it; give all of them the same processors"
            )
    kinds = {
        "vis_processor": (MultiImage, {name: view.vis_train for name, view in views.items()}),
        "text_processor": (MultiText, {name: view.text_train for name, view in views.items()}),
    }
    more = {}
    for kind, (several, of_view) in kinds.items():
        main = of_view.pop(MAIN_VIEW, None)
        own = [main or getattr(leaf, kind) for leaf in leaves]
        # all sets of a concatenation need the same views, or their samples would not make one batch
        others = {
            name: processor
            for name, processor in of_view.items()
            if processor is not None and not all(alike(mine, processor) for mine in own)
        }
        more[kind] = (several, main, others)
    return _replaced(dataset, lambda leaf: _viewed(leaf, more))


def _viewed(leaf: Any, more: Mapping[str, tuple[type[_Several], Processor | None, dict[str, Processor]]]) -> Any:
    twin = copy.copy(leaf)
    for kind, (several, main, others) in more.items():
        own = main or getattr(leaf, kind)
        setattr(twin, kind, several({MAIN_VIEW: own, **others}) if others else own)
    return twin


def _replaced(dataset: Any, of_leaf: Callable[[Any], Any]) -> Any:
    """A copy with other plain sets inside its wrappers and concatenations."""
    if hasattr(dataset, "datasets"):
        return type(dataset)([_replaced(part, of_leaf) for part in dataset.datasets])
    if "dataset" in vars(dataset):
        wrapper = copy.copy(dataset)
        wrapper.dataset = _replaced(dataset.dataset, of_leaf)
        return wrapper
    return of_leaf(dataset)


def evaluation_view(dataset: Any, view: View) -> Any:
    """A copy of an evaluation set, its pictures and captions as the view reads them; rows and tables are the same.

    A set that answers from a feature bank is taken without it: the bank's features are of another reading.

    Args:
        dataset: LAVIS's retrieval evaluation shape, with the captions as written in ``annotation[i]["caption"]``.

    Raises:
        UserError: the captions as written are not there.
    """
    while "source" in vars(dataset):
        dataset = dataset.source
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
    found = [caption for row in rows for caption in row.get("caption", ())]
    if len(found) != len(dataset.text):
        raise UserError(
            f"the evaluation set {type(dataset).__name__} has {len(dataset.text)} captions, but {len(found)} as "
            "written (annotation[i]['caption']), so that no matcher can read them through its own text processor; give "
            "all matchers the data set's (preprocess.text_processor: null)"
        )
    return found
