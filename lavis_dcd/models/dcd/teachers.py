"""The frozen side of a distillation: one teacher or several, and their scores of candidate tables."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import autocast_to
from lavis_dcd.banks.feature_bank import FeatureBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import update_with_tensors
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.ensemble import combine
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.models.batch import BatchFeatures, EncodedBatch, encode_batch
from lavis_dcd.models.building import module_of
from lavis_dcd.models.dcd.kept_vectors import KeptVectors
from lavis_dcd.models.dcd.scores import ScoreTable, gather_tables, score_tables

log = logging.getLogger(__name__)


class Teachers:
    """Teachers in evaluation mode, without gradients. No module, so that no model registers them as its sub-modules.

    Args:
        matchers: one or more.
        weights: one per matcher, of its standardised scores; equal by default.
        amp: "off", or the precision in which they encode and score ("bf16").
    """

    def __init__(self, matchers: Sequence[Matcher], weights: Sequence[float] | None = None, amp: str = "off") -> None:
        self.matchers, self._amp = list(matchers), amp
        self.weights = list(weights or [1.0] * len(self.matchers))
        # checks the weights, and stands for all of them in evaluations
        try:
            self._ensemble = Ensemble(self.matchers, self.weights)
        except ValueError as error:
            raise UserError(f"model.teachers: {error}") from error
        self._bank: FeatureBank | None = None
        self._keeping: list[Matcher] = []
        self._vectors: dict[int, KeptVectors] = {}
        self._modules = [module_of(matcher) for matcher in self.matchers]
        for module in self._modules:
            module.requires_grad_(False)
            module.eval()

    @property
    def selects_hard_samples(self) -> bool:
        """Never: they score the candidates that a pool has."""
        return False

    def evaluated_matchers(self) -> dict[str, Matcher | Ensemble]:
        """Return what is evaluated beside the student, by name."""
        return {"teacher": self.evaluated_matcher()}

    def evaluated_matcher(self) -> Matcher | Ensemble:
        """Return the only teacher, or the ensemble of several."""
        return self.matchers[0] if len(self.matchers) == 1 else self._ensemble

    @property
    def family(self) -> str:
        """ "dual" where all are dual encoders."""
        return self._ensemble.family

    def by_view(self) -> dict[str, Matcher]:
        """Return each teacher by the name of the view that it reads."""
        if len(self.matchers) == 1:
            return {"teacher": self.matchers[0]}
        return {f"teacher.{i}": matcher for i, matcher in enumerate(self.matchers)}

    def keep_vectors(self, bank: FeatureBank, megabytes: float) -> None:
        """Embed all of ``bank`` once, at the first scores, by those teachers whose scores follow from vectors alone.

        Args:
            bank: the features of all samples come out of it.
            megabytes: of all teachers' vectors together at most, MiB; where they would take more, none are kept.
        """
        serving = [m for m in self.matchers if m.scores_by_embeds and bank.serves(m)]
        need = sum(KeptVectors.nbytes(matcher, bank) for matcher in serving)
        if need <= megabytes * 2**20:
            self._bank, self._keeping = bank, serving
        else:
            log.info("the teachers' vectors would take %s, more than model.teacher_vectors_mb: they are computed at "
                     "each step", size_in_words(need))  # fmt: skip

    def fingerprint(self) -> str:
        """Return a SHA-256 over all teachers' tensors, names and shapes included, and their weights."""
        digest = hashlib.sha256()
        if len(self.matchers) > 1:
            digest.update(repr(self.weights).encode())
        for module in self._modules:
            update_with_tensors(digest, sorted(module.state_dict().items()))
        return digest.hexdigest()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast all tensors, as ``nn.Module._apply``."""
        for module in self._modules:
            module._apply(fn)

    def eval(self) -> None:
        """Put every teacher into evaluation mode."""
        for module in self._modules:
            module.eval()

    @torch.no_grad()
    def scores(
        self, encoded: EncodedBatch, pools: Sequence[CandidatePool], everything: bool = False
    ) -> list[ScoreTable]:
        """Return each pool ``[Q, 1+C]`` scored; of several teachers standardised per query and averaged.

        Args:
            encoded: the batch, with features that serve the teachers which share the encoder and read its view. The
                others encode it anew.
            pools: the candidates of each direction.
            everything: score invalid entries, too.
        """
        tables = [ScoreTable.of(pool, everything) for pool in pools]
        by_encoder: list[tuple[Matcher, BatchFeatures]] = [(encoded.encoder, encoded.features)]
        by_teacher = [
            self._tables_of(view, matcher, encoded, by_encoder, tables) for view, matcher in self.by_view().items()
        ]
        return [
            replace(table, scores=combine([scored.known_scores() for scored in of_table], table.valid, self.weights))
            for table, of_table in zip(tables, zip(*by_teacher, strict=True), strict=True)
        ]

    def _tables_of(
        self,
        view: str,
        matcher: Matcher,
        encoded: EncodedBatch,
        by_encoder: list[tuple[Matcher, BatchFeatures]],
        tables: list[ScoreTable],
    ) -> list[ScoreTable]:
        """Return ``tables`` as one teacher scores them; features that others can use are added to ``by_encoder``."""
        # features of a view that only this teacher reads serve no other, whoever shares its encoders
        shared = not encoded.batch.has_view(view)
        features = next((f for encoder, f in by_encoder if shared and matcher.shares_encoders_with(encoder)), None)
        with autocast_to(encoded.features.images.device, self._amp):
            if features is None:
                features = encode_batch(matcher, encoded.batch, view)
                by_encoder += [(matcher, features)] if shared else []
            vectors = self._kept(matcher, features)
            if vectors is not None:
                return gather_tables(vectors.scores(features.images, features.texts), tables)
            return score_tables(matcher, features, tables)

    def _kept(self, matcher: Matcher, features: BatchFeatures) -> KeptVectors | None:
        """Return the vectors of a teacher, made now if they are not there yet; None where none are to be kept."""
        numbered = features.images.rows is not None and features.texts.rows is not None
        if self._bank is None or matcher not in self._keeping or not numbered:
            return None
        if id(matcher) not in self._vectors:
            self._vectors[id(matcher)] = KeptVectors(matcher, self._bank, self._amp)
        return self._vectors[id(matcher)]
