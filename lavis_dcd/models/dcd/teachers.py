"""The frozen side of a distillation: one teacher or several, and their scores of candidate tables."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import autocast_to
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import update_with_tensors
from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.matching.contract import Matcher, has_view
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.batch import BatchFeatures, sample_features

Match = Callable[[ImageFeatures, TextFeatures, Tensor], Tensor]


class Teachers:
    """Teachers in evaluation mode, without gradients; no module, so that nobody registers them as one's part.

    Args:
        matchers: one or more.
        weights: of each one's standardised scores; equal by default.
        amp: "off", or the precision in which they encode and score ("bf16").
    """

    def __init__(self, matchers: Sequence[Matcher], weights: Sequence[float] | None = None, amp: str = "off") -> None:
        self.matchers, self._amp = list(matchers), amp
        self.weights = list(weights or [1.0] * len(self.matchers))
        # keeps the weights' checks, and stands for all of them in evaluations
        try:
            self._ensemble = Ensemble(self.matchers, self.weights)
        except ValueError as error:
            raise UserError(f"model.teachers: {error}") from error
        for matcher in self.matchers:
            matcher.requires_grad_(False)
            matcher.eval()

    # whether the samples bring the hard samples, chosen already
    selects = False

    def evaluated(self) -> dict[str, Matcher | Ensemble]:
        """By name, what is evaluated beside the student."""
        return {"teacher": self.one()}

    def one(self) -> Matcher | Ensemble:
        """What is evaluated as "teacher"."""
        return self.matchers[0] if len(self.matchers) == 1 else self._ensemble

    @property
    def family(self) -> str:
        """ "dual" where all are dual encoders."""
        return self._ensemble.family

    def named(self) -> dict[str, Matcher]:
        """By the name of the view that each reads."""
        if len(self.matchers) == 1:
            return {"teacher": self.matchers[0]}
        return {f"teacher.{i}": matcher for i, matcher in enumerate(self.matchers)}

    def fingerprint(self) -> str:
        """SHA-256 over all teachers' tensors, names and shapes included, and their weights."""
        digest = hashlib.sha256()
        if len(self.matchers) > 1:
            digest.update(repr(self.weights).encode())
        for matcher in self.matchers:
            update_with_tensors(digest, sorted(matcher.state_dict().items()))
        return digest.hexdigest()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves and casts, as ``nn.Module._apply``."""
        for matcher in self.matchers:
            matcher._apply(fn)

    def eval(self) -> None:
        for matcher in self.matchers:
            matcher.eval()

    @torch.no_grad()
    def scores(
        self,
        samples: Mapping[str, Any],
        seen: BatchFeatures,
        seen_by: Matcher,
        pools: Sequence[CandidatePool],
        everything: bool = False,
    ) -> list[Tensor]:
        """Scores ``[Q, 1+C]`` per pool, invalid entries 0; several teachers standardised per query and averaged.

        Args:
            samples: the batch, from which teachers with encoders of their own encode.
            seen: its features by ``seen_by``, for teachers that share its encoders.
            pools: the candidates.
            everything: score invalid entries too.
        """
        tables = [(p.image_rows, p.text_rows, p.valid | everything) for p in pools]
        # features of a view of one's own serve nobody else, whoever shares the encoders
        common: list[tuple[Matcher, BatchFeatures]] = [(seen_by, seen)]
        of_teachers = []
        for view, matcher in self.named().items():
            own = has_view(samples, view)
            batch = next((found for other, found in common if not own and matcher.shares_encoders_with(other)), None)
            with autocast_to(seen.images.device, self._amp):
                if batch is None:
                    batch = sample_features(matcher, samples, view)
                    common += [] if own else [(matcher, batch)]
                of_teachers.append(score_tables(matcher, batch, tables))
        return [
            combine([tables_of[i] for tables_of in of_teachers], tables[i][2], self.weights) for i in range(len(tables))
        ]


def score_tables(matcher: Matcher, batch: BatchFeatures, tables: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Scores of tables (image rows, text rows, validity), by one product where the matcher is a dual encoder."""
    if matcher.family == "dual":
        return gather_tables(matcher.match_all(batch.images, batch.texts), tables)
    return match_tables(matcher.match, batch, tables)


def gather_tables(scores: Tensor, tables: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Entries of all pairs' ``scores [I, T]``, float32 ``[Q, N]`` per table; invalid ones are 0."""
    return [scores[image, text].float().masked_fill(~valid, 0.0) for image, text, valid in tables]


def match_tables(match: Match, batch: BatchFeatures, tables: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Scores of every valid entry, each distinct pair matched once; invalid entries are 0 and carry no gradient.

    Args:
        tables: per direction image rows, text rows and validity, each ``[Q, N]``.

    Returns:
        float32 ``[Q, N]`` per direction.
    """
    pairs = torch.cat([torch.stack([image[valid], text[valid]], dim=1) for image, text, valid in tables])
    distinct, inverse = pairs.unique(dim=0, return_inverse=True)
    scores = match(batch.images, batch.texts, distinct).float()[inverse]
    sizes = [int(valid.sum()) for _, _, valid in tables]
    return [
        torch.zeros(valid.shape, device=scores.device).masked_scatter(valid, part)
        for (_, _, valid), part in zip(tables, scores.split(sizes), strict=True)
    ]
