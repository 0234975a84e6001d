"""Scores of candidate tables: the one form in which teachers and student score the pairs of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.pseudo_match import top_as_match
from lavis_dcd.distillation.selection import Selection
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.batch import BatchFeatures, EncodedBatch

# ``Matcher.match``, or a stand-in for it
Match = Callable[[ImageFeatures, TextFeatures, Tensor], Tensor]


@dataclass(frozen=True)
class ScoreTable:
    """Pairs to score, or scored: Q queries with N items each.

    Args:
        image_rows: int64 ``[Q, N]``, rows of the batch's distinct pictures.
        text_rows: int64 ``[Q, N]``, rows of the batch's distinct captions.
        valid: bool ``[Q, N]``; the other entries are not scored.
        scores: float32 ``[Q, N]``, 0 where not valid; None before the table is scored.
    """

    image_rows: Tensor
    text_rows: Tensor
    valid: Tensor
    scores: Tensor | None = None

    @classmethod
    def of(cls, pairs: CandidatePool | Selection, everything: bool = False) -> ScoreTable:
        """Return the unscored table of a pool or a selection.

        Args:
            pairs: whose rows and validity to take.
            everything: make every entry valid.
        """
        return cls(pairs.image_rows, pairs.text_rows, pairs.valid | everything if everything else pairs.valid)

    def with_scores(self, scores: Tensor) -> ScoreTable:
        """Return the table scored: ``scores [Q, N]``, invalid entries set to 0, in float32."""
        return replace(self, scores=scores.float().masked_fill(~self.valid, 0.0))

    def known_scores(self) -> Tensor:
        """Return the scores, float32 ``[Q, N]``.

        Raises:
            ValueError: the table is not scored.
        """
        if self.scores is None:
            raise ValueError("the table is not scored yet")
        return self.scores


class GivesScores(Protocol):
    """Teachers as a distillation sees them: built and running, or scores that a bank has."""

    @property
    def selects_hard_samples(self) -> bool:
        """Return whether the candidates of a batch are the teacher's hard samples already: none are selected."""

    @property
    def family(self) -> str:
        """ "dual" where every teacher is a dual encoder, else "fusion"."""

    def scores(
        self, encoded: EncodedBatch, pools: Sequence[CandidatePool], everything: bool = False
    ) -> list[ScoreTable]:
        """Return each pool ``[Q, 1+C]`` with the teachers' scores.

        Args:
            encoded: the batch, with features by the student's encoders.
            pools: the candidates of each direction.
            everything: score invalid entries, too.
        """

    def evaluated_matcher(self) -> Matcher | Ensemble:
        """Return what is evaluated as "teacher"; raises ``UserError`` where no teacher is built."""

    def evaluated_matchers(self) -> dict[str, Matcher | Ensemble]:
        """Return what is evaluated beside the student, by name."""

    def by_view(self) -> dict[str, Matcher]:
        """Return each teacher that is built, by the name of the view that it reads."""

    def fingerprint(self) -> str:
        """Return a SHA-256 of what makes the scores."""

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast all tensors, as ``nn.Module._apply``."""

    def eval(self) -> None:
        """Put every teacher into evaluation mode."""


def score_tables(matcher: Matcher, batch: BatchFeatures, tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Return ``tables`` scored, by one product where the matcher is a dual encoder."""
    if matcher.family == "dual":
        return gather_tables(matcher.match_all(batch.images, batch.texts), tables)
    return match_tables(matcher.match, batch, tables)


def gather_tables(scores: Tensor, tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Return ``tables`` with their entries of ``scores [I, T]``, which all pairs of the batch have."""
    return [table.with_scores(scores[table.image_rows, table.text_rows]) for table in tables]


def top_first(
    pools: Sequence[CandidatePool], tables: Sequence[ScoreTable]
) -> tuple[list[CandidatePool], list[ScoreTable]]:
    """Return the pools ``[Q, 1+C]`` and their scored tables with the teacher's top candidate where the match was."""
    ordered = [top_as_match(pool, table.known_scores()) for pool, table in zip(pools, tables, strict=True)]
    return [pool for pool, _ in ordered], [ScoreTable.of(pool).with_scores(scores) for pool, scores in ordered]


def match_tables(match: Match, batch: BatchFeatures, tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Return ``tables`` scored by ``match``, which is called once, with each distinct pair of the valid entries.

    Invalid entries are 0 and carry no gradient.
    """
    entries = [torch.stack([t.image_rows[t.valid], t.text_rows[t.valid]], dim=1) for t in tables]
    pairs, inverse = torch.cat(entries).unique(dim=0, return_inverse=True)
    scores = match(batch.images, batch.texts, pairs).float()[inverse]
    by_table = scores.split([int(table.valid.sum()) for table in tables])
    return [
        replace(table, scores=torch.zeros(table.valid.shape, device=scores.device).masked_scatter(table.valid, entry))
        for table, entry in zip(tables, by_table, strict=True)
    ]
