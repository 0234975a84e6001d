"""``selection.prescreen``: only the most promising candidates reach the teacher. Not exact, and measured as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.prescreen import found_share, most_promising, range_share
from lavis_dcd.distillation.strategies import Draws, SelectionStrategy
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.batch import BatchFeatures
from lavis_dcd.models.building import module_of
from lavis_dcd.models.dcd.config import PrescreenConfig
from lavis_dcd.models.dcd.scores import ScoreTable, gather_tables, score_tables


class Prescreen:
    """A cut of pools to candidates that the selection would choose by a cheap matcher's scores.

    Args:
        config: by whom, how many, and how often the teacher scores all of them to tell what is lost.
        matchers: whose scores are cheap, by the names that ``config.by`` may have.
        strategy: of the selection.
    """

    def __init__(
        self, config: PrescreenConfig, matchers: Mapping[str, Matcher], strategy: SelectionStrategy | None = None
    ) -> None:
        self.config, self._strategy = config, strategy
        self._matcher = None if config.by == "random" else matchers[config.by]

    @torch.no_grad()
    def cut(self, batch: BatchFeatures, pools: list[CandidatePool], draws: Sequence[Draws]) -> list[CandidatePool]:
        """Return the pools with at most ``keep`` valid candidates per query beside the match; ``draws`` are by pool."""
        cheap = self._cheap_scores(batch, pools)
        return [
            most_promising(pool, scores, self.config.keep, self._strategy, of_pool)
            for pool, scores, of_pool in zip(pools, cheap, draws, strict=True)
        ]

    def due(self, step: int) -> bool:
        """Return whether the teacher is to score every candidate of the batch of this ``step``, counted from 0."""
        return bool(self.config.check_every) and step % self.config.check_every == 0

    def found(
        self, pools: list[CandidatePool], cut: list[CandidatePool], teacher: Sequence[ScoreTable], hardest: int
    ) -> dict[str, Tensor]:
        """Return what the prescreen leaves in, by the names of the training log, 0-dim each.

        Args:
            pools: per direction, all candidates ``[Q, 1+C]``.
            cut: the same after :meth:``cut``.
            teacher: the same, scored by the teacher.
            hardest: how many of a query's candidates count as its hardest.

        Returns:
            ``prescreen_found``: the share of the teacher's hardest candidates; ``prescreen_range``: that of the range
            of its scores. Each is the mean over the directions.
        """
        tables = [(pool, left, table.known_scores()) for pool, left, table in zip(pools, cut, teacher, strict=True)]
        return {
            "prescreen_found": torch.stack([found_share(*table, hardest) for table in tables]).mean(),
            "prescreen_range": torch.stack([range_share(*table) for table in tables]).mean(),
        }

    def _cheap_scores(self, batch: BatchFeatures, pools: list[CandidatePool]) -> Sequence[Tensor | None]:
        """Return per pool scores ``[Q, 1+C]``, or None where chance decides."""
        matcher = self._matcher
        if matcher is None:
            return [None for _ in pools]
        return [table.scores for table in self._scored(matcher, batch, [ScoreTable.of(pool) for pool in pools])]

    def _scored(self, matcher: Matcher, batch: BatchFeatures, tables: list[ScoreTable]) -> list[ScoreTable]:
        if self.config.by == "joint":
            joint = matcher.joint_scores(matcher.embed_images(batch.images), matcher.embed_texts(batch.texts))
            return gather_tables(joint, tables)
        if matcher.family == "dual":
            return score_tables(matcher, batch, tables)
        # the score that ranks is the deterministic one: dropout would shuffle what is promising
        module = module_of(matcher)
        training = module.training
        module.eval()
        try:
            return score_tables(matcher, batch, tables)
        finally:
            module.train(training)
