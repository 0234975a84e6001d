"""A job's health: steps whose numbers go wrong are undone, counted and in the end fatal; odd scores get a warning."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import gather_objects
from lavis_dcd.datasets.tree import plain_sets
from lavis_dcd.training import checkpoint
from lavis_dcd.training.devices import Process
from lavis_dcd.training.strategy import local_norm

log = logging.getLogger(__name__)

MOST_IDS = 10  # pictures that a message names
DEAD_SPREAD = 1e-6  # of the largest score
STEPS_TO_TELL = 5  # fewer say nothing
CHANCE = 0.5  # the share of the other candidates that stand above a match placed at random

_SCORES = {"teacher_": "teacher scores", "student_": "student scores"}


@dataclass(frozen=True)
class Blame:
    """The values that were NaN or infinite in one process's part of a step.

    Args:
        terms: in words, causes first: scores, then parts of the loss, else the gradient's parameter groups.
        image_ids: the pictures of the micro-batches that broke; of all of them where only the gradient did.
        in_loss: the loss itself, not only its gradient.
    """

    terms: tuple[str, ...]
    image_ids: tuple[Any, ...]
    in_loss: bool


def blame(reports: Sequence[Mapping[str, Tensor]], image_ids: Sequence[Any], optimizer: torch.optim.Optimizer) -> Blame:
    """Return what broke in a step; it reads many values, so only for a step that did break.

    Args:
        reports: the scalars of each micro-batch's output.
        image_ids: per micro-batch its "image_id" (a tensor, a list, or None).
        optimizer: its parameters hold the gradient.
    """
    broken = [number for number, report in enumerate(reports) if not math.isfinite(report["loss"])]
    terms = [] if broken else [f"the gradient of {name}" for name in _broken_groups(optimizer)]
    for number in broken:
        terms += _broken_terms(reports[number])
    ids = [item for number in broken or range(len(image_ids)) for item in _plain_ids(image_ids[number])]
    return Blame(tuple(dict.fromkeys(terms)), tuple(dict.fromkeys(ids)), bool(broken))


def _broken_terms(report: Mapping[str, Tensor]) -> list[str]:
    names = [name for name, value in report.items() if not math.isfinite(value)]
    scores = [words for start, words in _SCORES.items() if any(n.startswith(start) for n in _scores(names))]
    return [*scores, *(name for name in names if name.endswith("_loss"))] or ["loss"]


def _scores(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith("_score")]


def _broken_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    return [
        str(group.get("name", number))
        for number, group in enumerate(optimizer.param_groups)
        if not math.isfinite(local_norm(group["params"]))
    ]


def _plain_ids(ids: Any) -> list[Any]:
    if ids is None:
        return []
    return ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)


class Health:
    """Counts the skipped steps of a job; a part of its checkpoints.

    Args:
        process: this process among those that train; all of them skip together.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self.skipped = 0
        self.in_row = 0
        self.last_taken: int | None = None
        self._blames: list[Blame] = []

    def took(self, number: int) -> None:
        """Note that step `number` was taken."""
        self.in_row, self.last_taken, self._blames = 0, number, []

    def skip(self, number: int, broken: Blame, scale: float | None) -> None:
        """Count the skipped step `number`. Every process must call it.

        Args:
            broken: in this process.
            scale: of fp16's gradient scaler. Above 1 it may be what made the gradient overflow, so that such steps
                are no sign of trouble: they are counted, but never end a job.
        """
        blames = self._gathered(broken)
        self.skipped += 1
        in_loss = any(item.in_loss for item in blames)
        if scale is not None and scale > 1 and not in_loss:
            log.info("step %d skipped: fp16 overflows at a gradient scale of %g", number + 1, scale)
            return
        self.in_row, self._blames = self.in_row + 1, blames
        terms = ", ".join(self._terms())
        log.warning("step %d skipped: NaN or infinite: %s; pictures %s", number + 1, terms, self._pictures({}))

    def _gathered(self, broken: Blame) -> list[Blame]:
        of_all = gather_objects(broken, self._process.ranks)
        if len(of_all) == 1:
            return of_all
        # one process's broken loss spreads to every gradient, which says nothing about the other processes' pictures
        return [item for item in of_all if item.in_loss] or [item for item in of_all if item.terms]

    def _terms(self) -> list[str]:
        return list(dict.fromkeys(term for item in self._blames for term in item.terms))

    def _pictures(self, names: Mapping[Any, str]) -> str:
        ids = list(dict.fromkeys(item for blamed in self._blames for item in blamed.image_ids))
        shown = [f"{item} ({names[item]})" if item in names else str(item) for item in ids[:MOST_IDS]]
        more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
        return (", ".join(shown) or "without ids") + more

    def check(self, most: int, step: int, run_folder: Path, dataset: Any) -> None:
        """End the job where `most` steps in a row were skipped.

        Args:
            step: where the job stands.
            run_folder: whose checkpoints are looked through.
            dataset: the training set, whose rows name the pictures' files.

        Raises:
            UserError: naming what broke, the last batch's pictures, and the last good checkpoint.
        """
        if self.in_row < most:
            return
        terms, in_loss = ", ".join(self._terms()), any(item.in_loss for item in self._blames)
        pictures, good = self._pictures(picture_names(dataset)), last_good(run_folder, self.last_taken)
        raise UserError(
            f"run.max_bad_steps: the {'loss' if in_loss else 'gradient'} is NaN or infinite in {self.in_row} steps in "
            f"a row, up to step {step}; what broke: {terms}; pictures of the last batch: {pictures}; last "
            f"good checkpoint: {good or 'none yet'}. Look at these pictures, or try a lower run.init_lr, "
            "run.grad_clip=1, or run.amp=off"
        )

    def refuse_untaken(self, steps: int) -> None:
        """Refuse to call a job of `steps` steps finished of which every one was skipped: nothing was learnt.

        Raises:
            UserError: whatever run.max_bad_steps says.
        """
        if self.last_taken is None and self.skipped >= steps > 0:
            raise UserError(
                f"run: every one of the {steps} steps was skipped, because the loss or its gradient was NaN or "
                "infinite: the model has learnt nothing and is not evaluated; try a lower run.init_lr, run.grad_clip=1 "
                "or run.amp=off, and look at the data"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_row": self.in_row, "last_taken": self.last_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the counts of a checkpoint."""
        self.skipped, self.in_row, self.last_taken = state["skipped"], state["in_row"], state["last_taken"]


def picture_names(dataset: Any) -> dict[Any, str]:
    """Return the file of every "image_id" that samples of a LAVIS training set, or a wrapper of some, come with."""
    names: dict[Any, str] = {}
    for leaf in plain_sets(dataset, "").values():
        numbers: Mapping[Any, Any] = getattr(leaf, "img_ids", None) or {}
        for row in getattr(leaf, "annotation", []) if numbers else []:
            if row.get("image_id") in numbers:
                names.setdefault(numbers[row["image_id"]], str(row.get("image", row["image_id"])))
    return names


def last_good(run_folder: Path, last_taken: int | None) -> Path | None:
    """Return the newest checkpoint whose weights are known to have given a finite loss; the newest if none is.

    Args:
        last_taken: the number, from 0, of the last step that was not skipped. Its loss was finite, and came of the
            weights of a checkpoint with as many steps or fewer; what it made of them, no step has shown.
    """
    by_step = {}
    for path in (run_folder / checkpoint.FOLDER).glob("step-*"):
        digits = path.stem.removeprefix("step-")
        if digits.isdigit():
            by_step[int(digits)] = path
    proven = [step for step in by_step if last_taken is not None and step <= last_taken]
    return by_step[max(proven or by_step)] if by_step else None


class LiveBuffers:
    """The buffers that a forward pass may change (running means, queues), to be put back when a step is skipped.

    Those of modules in training mode; others stay as they are anyway. One more copy of them is held.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[str, Tensor] = {}

    def live(self) -> dict[str, Tensor]:
        """Return these buffers by name, as they are now."""
        return {
            f"{path}.{name}": buffer
            for path, module in self._model.named_modules()
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
        }

    @torch.no_grad()
    def remember(self) -> None:
        """Copy them, before the forward passes of a step."""
        live = self.live()
        self._copies = {name: copy for name, copy in self._copies.items() if name in live}
        for name, buffer in live.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != buffer.shape or copy.device != buffer.device:
                self._copies[name] = buffer.clone()
            else:
                copy.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what the forward passes since `remember` changed."""
        for name, buffer in self.live().items():
            if name in self._copies:
                buffer.copy_(self._copies[name])


class ScoreWatch:
    """Warns once of a student whose scores are all alike, of a teacher that is worse than chance, and of batches in
    which no query has a negative."""

    def __init__(self) -> None:
        self._dead_steps = 0
        self._without_negative: Tensor | None = None
        self._rank, self._rank_steps = 0.0, 0
        self._told: set[str] = set()

    def note(self, report: Mapping[str, Tensor]) -> None:
        """Take one step's scalars: without any negative its loss is exactly 0, and a distiller's spread no number.

        They are counted where they are, so that nothing waits for the GPU.
        """
        if "loss" not in report:
            return
        empty = report["loss"].detach() == 0
        if "student_spread" in report:
            empty = empty | torch.isnan(report["student_spread"].detach()).to(empty.device)
        self._without_negative = empty.long() if self._without_negative is None else self._without_negative + empty

    def see(self, means: Mapping[str, float], steps: int) -> None:
        """Take the means of `steps` more steps; "student_spread" and "teacher_match_rank" are read where given."""
        without = 0 if self._without_negative is None else int(self._without_negative)
        self._without_negative = None
        if without:
            self._tell(
                "negatives",
                f"{without} of {steps} steps had no negative at all, or a loss of exactly 0: nothing is learnt from "
                "such a batch; raise run.batch_size_train, or take candidates from elsewhere (model.candidates.source)",
            )
        if "student_spread" in means:
            self._dead_steps = self._dead_steps + steps if means["student_spread"] < DEAD_SPREAD else 0
            if self._dead_steps >= STEPS_TO_TELL:
                self._tell(
                    "student",
                    f"the student scores all candidates of a query alike ({self._dead_steps} steps now): it learns "
                    "nothing; look at its weights, at run.init_lr, and at whether its inputs differ at all",
                )
        if "teacher_match_rank" in means:
            self._rank += means["teacher_match_rank"] * steps
            self._rank_steps += steps
            if self._rank_steps >= STEPS_TO_TELL:
                self._check_teacher(self._rank / self._rank_steps)
                self._rank, self._rank_steps = 0.0, 0

    def _check_teacher(self, rank: float) -> None:
        if rank > CHANCE:
            self._tell(
                "teacher",
                f"the teacher is worse than chance: {100 * rank:.0f} % of the other candidates stand above the match, "
                "50 % would at random; look at its weights, its processors, and whether captions and pictures belong "
                "together",
            )

    def _tell(self, who: str, words: str) -> None:
        if who not in self._told:
            self._told.add(who)
            log.warning("%s", words)
