"""Training from a score bank: the teachers' scores come with the samples, and no teacher is in memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import Tensor

from lavis_dcd.banks.score_bank import ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.objective import DUAL, FUSION
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.models.batch import EncodedBatch
from lavis_dcd.models.dcd.checks import family_of
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.models.dcd.scores import ScoreTable

log = logging.getLogger(__name__)


class BankedTeachers:
    """A stand-in for :class:``lavis_dcd.models.dcd.teachers.Teachers`` whose scores a score bank has.

    Args:
        family: of the teachers ("fusion" or "dual"), by which the loss terms are chosen.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self._fingerprint = ""

    @property
    def selects_hard_samples(self) -> bool:
        """Always: the samples bring those that were selected when the bank was read."""
        return True

    @classmethod
    def of(cls, config: DcdConfig) -> BankedTeachers:
        """Return the stand-in for the teachers that a section names; none of them is built.

        Raises:
            UserError: neither or both of ``teacher`` and ``teachers``, or an arch that is not registered with LAVIS.
        """
        if bool(config.teacher) == bool(config.teachers):
            raise UserError("model: give either teacher: (one section) or teachers: (a list of sections)")
        families = {family_of(section, path) for path, section in config.teacher_sections}
        log.info("the teacher's scores come from a score bank: it takes no part in training and is not evaluated")
        return cls(DUAL if families == {DUAL} else FUSION)

    def use_bank(self, bank: ScoreBank) -> None:
        """Take the fingerprint of the bank that the samples' scores come from."""
        content = json.dumps([asdict(bank.identity), bank.settings], sort_keys=True, default=str)
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def evaluated_matchers(self) -> dict[str, Matcher | Ensemble]:
        """Return nothing: a bank has no scores but those of its training pairs."""
        return {}

    def evaluated_matcher(self) -> Matcher | Ensemble:
        """Raise a ``UserError``: there is no teacher to evaluate."""
        raise UserError("model.candidates.source: bank, so no teacher is built")

    def by_view(self) -> dict[str, Matcher]:
        """Return nothing: no teacher reads the samples."""
        return {}

    def fingerprint(self) -> str:
        """Return a SHA-256 over the bank's identity and settings; "" before :meth:``use_bank``."""
        return self._fingerprint

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do nothing: there are no tensors to move or cast."""

    def eval(self) -> None:
        """Do nothing: there is no teacher to put into evaluation mode."""

    def scores(
        self, encoded: EncodedBatch, pools: Sequence[CandidatePool], everything: bool = False
    ) -> list[ScoreTable]:
        """Return each pool ``[Q, 1+C]`` with the scores that the samples bring.

        Args:
            encoded: the batch that has them.
            pools: the candidates of each direction, in the samples' order.
            everything: keep the scores of invalid entries, too.

        Raises:
            UserError: samples without scores of these candidates.
        """
        return [self._table(encoded.batch.bank_scores.get(pool.direction), pool, everything) for pool in pools]

    def _table(self, scores: Tensor | None, pool: CandidatePool, everything: bool) -> ScoreTable:
        if scores is None or scores.shape != pool.valid.shape:
            raise UserError(
                f"model.candidates: the samples bring no scores of {pool.direction} out of a score bank; train "
                "with the task dcd_retrieval, which adds them"
            )
        return ScoreTable.of(pool, everything).with_scores(scores.to(pool.valid.device))
