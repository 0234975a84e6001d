"""Training from a score bank: the teachers' scores come with the samples, and no teacher is in memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.banks.score_bank import ScoreBank
from lavis_dcd.banks.score_candidates import SCORES
from lavis_dcd.common.errors import UserError
from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.objective import DUAL, FUSION
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.batch import BatchFeatures
from lavis_dcd.models.dcd.checks import family_of
from lavis_dcd.models.dcd.config import DcdConfig

log = logging.getLogger(__name__)


class BankedTeachers:
    """Stands where :class:`lavis_dcd.models.dcd.teachers.Teachers` do when a score bank has their scores.

    Args:
        family: of the teachers ("fusion" or "dual"), by which the loss terms are chosen.
    """

    # the samples bring the hard samples, chosen already
    selects = True

    def __init__(self, family: str) -> None:
        self.family = family
        self._fingerprint = ""

    @classmethod
    def of(cls, config: DcdConfig) -> BankedTeachers:
        """For the teachers that a section names; none of them is built.

        Raises:
            UserError: neither or both of ``teacher`` and ``teachers``, or an arch that LAVIS does not know.
        """
        if bool(config.teacher) == bool(config.teachers):
            raise UserError("model: give either teacher: (one section) or teachers: (a list of sections)")
        families = {family_of(section, path) for path, section in config.teacher_sections}
        log.info("the teacher's scores come from a score bank: it takes no part in training and is not evaluated")
        return cls(DUAL if families == {DUAL} else FUSION)

    def use(self, bank: ScoreBank) -> None:
        """The bank that the samples' scores are of."""
        content = json.dumps([asdict(bank.identity), bank.settings], sort_keys=True, default=str)
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def evaluated(self) -> dict[str, Matcher]:
        """Nothing: a bank scores no other pairs than its own."""
        return {}

    def one(self) -> Matcher:
        raise UserError("model.candidates.source: bank, so no teacher is built")

    def named(self) -> dict[str, Matcher]:
        """No matcher reads a view of its own."""
        return {}

    def fingerprint(self) -> str:
        """SHA-256 over the bank's identity and settings; "" before :meth:`use`."""
        return self._fingerprint

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """There is nothing to move or cast."""

    def eval(self) -> None:
        """There is nothing to put into evaluation mode."""

    def scores(
        self,
        samples: Mapping[str, Any],
        seen: BatchFeatures,
        seen_by: Matcher,
        pools: Sequence[CandidatePool],
        everything: bool = False,
    ) -> list[Tensor]:
        """Scores float32 ``[Q, 1+C]`` per pool, invalid entries 0, as the samples bring them.

        Raises:
            UserError: samples without scores of these candidates.
        """
        found = []
        for pool in pools:
            scores = samples.get(SCORES[pool.direction])
            if scores is None or tuple(scores.shape) != tuple(pool.valid.shape):
                raise UserError(
                    f"model.candidates: the samples bring no scores of {pool.direction} out of a score bank; train "
                    "with the task dcd_retrieval, which adds them"
                )
            scores = torch.as_tensor(scores, device=pool.valid.device).float()
            found.append(scores.masked_fill(~(pool.valid | everything), 0.0))
        return found
