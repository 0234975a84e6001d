"""``selection.prescreen``: only the most promising candidates reach the teacher. Not exact, and measured as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.prescreen import found_share, most_promising
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.batch import BatchFeatures
from lavis_dcd.models.dcd.config import PrescreenConfig
from lavis_dcd.models.dcd.teachers import gather_tables, match_tables

Score = Callable[[list[CandidatePool]], Sequence[Tensor]]


class Prescreen:
    """Cuts pools to the candidates that a cheap matcher finds most promising.

    Args:
        config: by whom, how many, and how often the teacher sees all of them to tell what is lost.
        matchers: whose scores are cheap, by the names that ``config.by`` may have.
    """

    def __init__(self, config: PrescreenConfig, matchers: Mapping[str, Matcher]) -> None:
        self.config = config
        self._matcher = None if config.by == "random" else matchers[config.by]

    @torch.no_grad()
    def cut(self, batch: BatchFeatures, pools: list[CandidatePool]) -> list[CandidatePool]:
        """The pools with ``keep`` valid candidates per query at most."""
        cheap = self._cheap(batch, pools)
        return [most_promising(pool, scores, self.config.keep) for pool, scores in zip(pools, cheap, strict=True)]

    def due(self, samples: Mapping[str, Any]) -> bool:
        """Whether the teacher is to score every candidate of this batch, by the step that the samples tell of."""
        if not self.config.check_every:
            return False
        step = int(samples.get("epoch", 0)) * int(samples.get("num_iters_per_epoch", 1)) + int(samples.get("iters", 0))
        return step % self.config.check_every == 0

    def found(
        self, pools: list[CandidatePool], kept: list[CandidatePool], teacher_scores: Sequence[Tensor], hardest: int
    ) -> Tensor:
        """The mean over the directions of the share of the teacher's ``hardest`` that were kept, 0-dim."""
        shares = [found_share(*each, hardest) for each in zip(pools, kept, teacher_scores, strict=True)]
        return torch.stack(shares).mean()

    def _cheap(self, batch: BatchFeatures, pools: list[CandidatePool]) -> Sequence[Tensor | None]:
        matcher, tables = self._matcher, [(p.image_rows, p.text_rows, p.valid) for p in pools]
        if matcher is None:
            return [None for _ in pools]
        if self.config.by == "joint":
            joint = matcher.joint_scores(matcher.embed_images(batch.images), matcher.embed_texts(batch.texts))
            return gather_tables(joint, tables)
        if matcher.family == "dual":
            return gather_tables(matcher.match_all(batch.images, batch.texts), tables)
        # the score that ranks is the deterministic one: dropout would shuffle what is promising
        training = matcher.training
        matcher.eval()
        try:
            return match_tables(matcher.match, batch, tables)
        finally:
            matcher.train(training)
