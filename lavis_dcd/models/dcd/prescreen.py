"""``selection.prescreen``: only the most promising candidates reach the teacher. Not exact, and measured as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.prescreen import found_share, most_promising
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.batch import BatchFeatures
from lavis_dcd.models.building import module_of
from lavis_dcd.models.dcd.config import PrescreenConfig
from lavis_dcd.models.dcd.scores import ScoreTable, gather_tables, score_tables


class Prescreen:
    """A cut of pools to the candidates that a cheap matcher scores highest.

    Args:
        config: by whom, how many, and how often the teacher scores all of them to tell what is lost.
        matchers: whose scores are cheap, by the names that ``config.by`` may have.
    """

    def __init__(self, config: PrescreenConfig, matchers: Mapping[str, Matcher]) -> None:
        self.config = config
        self._matcher = None if config.by == "random" else matchers[config.by]

    @torch.no_grad()
    def cut(self, batch: BatchFeatures, pools: list[CandidatePool]) -> list[CandidatePool]:
        """Return the pools with at most ``keep`` valid candidates per query beside the match."""
        cheap = self._cheap_scores(batch, pools)
        return [most_promising(pool, scores, self.config.keep) for pool, scores in zip(pools, cheap, strict=True)]

    def due(self, step: int) -> bool:
        """Return whether the teacher is to score every candidate of the batch of this ``step``, counted from 0."""
        return bool(self.config.check_every) and step % self.config.check_every == 0

    def found(
        self, pools: list[CandidatePool], cut: list[CandidatePool], teacher: Sequence[ScoreTable], hardest: int
    ) -> Tensor:
        """Return the share of the teacher's hardest candidates that the prescreen leaves in, 0-dim.

        Args:
            pools: per direction, all candidates ``[Q, 1+C]``.
            cut: the same after :meth:``cut``.
            teacher: the same, scored by the teacher.
            hardest: how many of a query's candidates count as its hardest.

        Returns:
            The mean over the directions.
        """
        shares = [
            found_share(pool, promising, table.known_scores(), hardest)
            for pool, promising, table in zip(pools, cut, teacher, strict=True)
        ]
        return torch.stack(shares).mean()

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
