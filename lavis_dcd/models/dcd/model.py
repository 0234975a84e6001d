"""Dynamic contrastive distillation (IEEE TMM 2023) as a LAVIS model: frozen teachers, a student, what they share."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig
from torch import Tensor, nn
from typing_extensions import override

from lavis_dcd.banks.encoding import autocast_to, device_of
from lavis_dcd.banks.feature_bank import FeatureBank
from lavis_dcd.banks.score_bank import ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.schema import parse
from lavis_dcd.common.seeding import seed_for
from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.diagnostics import diagnostics
from lavis_dcd.distillation.objective import build_objective
from lavis_dcd.distillation.prescreen import within_budget
from lavis_dcd.distillation.selection import Selection, release_selection, select
from lavis_dcd.distillation.strategies import Draws, build_strategy
from lavis_dcd.matching.contract import MAIN_VIEW, Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.learner import Learner, as_learner
from lavis_dcd.matching.recompute import match_recomputed
from lavis_dcd.models.batch import Batch, BatchFeatures, EncodedBatch, encode_batch, info_nce, own_rows, whole_batch
from lavis_dcd.models.building import module_of
from lavis_dcd.models.dcd.banked_teachers import BankedTeachers
from lavis_dcd.models.dcd.build import (
    build_from_bank,
    build_prescreen,
    build_student,
    build_teachers,
    check_student,
)
from lavis_dcd.models.dcd.checks import (
    build_pools,
    inner_faults,
    inner_models,
    matcher_names,
    method_faults,
    section_faults,
)
from lavis_dcd.models.dcd.config import IN_BATCH, DcdConfig
from lavis_dcd.models.dcd.scores import GivesScores, ScoreTable, gather_tables, match_tables, top_first
from lavis_dcd.models.dcd.teachers import Teachers

log = logging.getLogger(__name__)


@registry.register_model("dcd")
class DynamicContrastiveDistillation(Learner, BaseModel):
    """Distils any matcher, or several, into any matcher.

    Per query and direction: a candidate pool, the teacher's scores on it, the hard samples they select, the
    student's scores on those, and the dynamic loss (design of the method: paper section 3). A dual-encoder student
    learns from all pairs of the batch besides (InfoNCE), and any student's own loss can be mixed in. Teachers are
    held outside the module tree: not in ``state_dict()``, the optimizer or DDP, and always in evaluation mode.

    Args:
        teacher: a matcher, the teachers, or what stands for teachers whose scores a bank has.
        student: learns.
        config: the whole section; ``loss`` may leave terms to the families ("auto").

    Raises:
        UserError: settings that do not fit each other; a student in which nothing learns.
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "default": str(packaged_folder("configs") / "models" / "dcd_default.yaml")
    }

    def __init__(self, teacher: Matcher | GivesScores, student: Matcher, config: DcdConfig):
        super().__init__()
        self.config = config
        self.student = student
        self.teachers: GivesScores = (
            Teachers([teacher], amp=config.frozen_amp) if isinstance(teacher, Matcher) else teacher
        )
        if faults := method_faults(config):
            raise UserError(faults)
        check_student(module_of(student))
        self.random_captions_per_image = config.candidates.random_captions
        self.needs_score_bank = config.candidates.from_bank
        self.find_unused_parameters = as_learner(module_of(student)).find_unused_parameters
        self.pools = build_pools(config.candidates)
        self.strategy = build_strategy(config.selection.strategy, hard_share=config.selection.hard_share)
        self.prescreen = build_prescreen(config, self.teachers, student, self.strategy)
        self.loss_config = config.loss_terms(self.teachers.family, student.family)
        try:
            self.objective = build_objective(self.loss_config)
        except ValueError as error:
            raise UserError([f"model.{line}" for line in str(error).splitlines()]) from error
        families, terms = (self.teachers.family, student.family), self.loss_config
        contrastive = "none" if config.candidates.match_by_teacher else terms.contrastive
        log.info("%s teacher, %s student: distill %s, contrastive %s", *families, terms.distill, contrastive)

    @classmethod
    def config_schema(cls) -> type:
        """The dataclass that a ``model:`` section of this arch must fit."""
        return DcdConfig

    @classmethod
    def config_faults(cls, section: Mapping[str, Any], path: str) -> list[str]:
        """Return what is wrong with a ``model:`` section across its keys, one line per fault; nothing is built."""
        return section_faults(section, path)

    @classmethod
    def negatives_in_batch_only(cls, section: Mapping[str, Any]) -> bool:
        """Return whether no direction has candidates from elsewhere than the batch."""
        return set(parse(DcdConfig, section, "model").candidates.sources().values()) <= {IN_BATCH}

    @classmethod
    def pair_faults(cls, section: Mapping[str, Any], path: str) -> list[str]:
        """Return which setting needs captions of the pictures, one line; none with the teacher's match."""
        if parse(DcdConfig, section, path).candidates.match_by_teacher:
            return []
        return [f"{path}.candidates.match: given needs captions of the pictures; set it to teacher, and "
                f"{path}.loss.alpha to 1"]  # fmt: skip

    @classmethod
    def inner_models(cls, section: DictConfig) -> dict[str, DictConfig]:
        """Return the sections of the teachers and the student, each over its own defaults."""
        return inner_models(section)

    @classmethod
    def inner_faults(cls, section: DictConfig, path: str) -> list[str]:
        """Return what is wrong with the teachers' and the student's sections, one line per fault."""
        return inner_faults(section, path)

    @classmethod
    def matcher_names(cls, section: DictConfig) -> list[str]:
        """Return the names of the matchers that are evaluated: the student, and the teacher unless a bank has it."""
        return matcher_names(section)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> DynamicContrastiveDistillation:
        """Teachers, student (started from the first teacher where ``init_from_teacher`` says so) and method.

        Raises:
            UserError: sections that do not fit their models, or a student that cannot start from this teacher.
        """
        config = parse(DcdConfig, cfg, "model")
        if config.candidates.from_bank:
            return cls(*build_from_bank(config), config)
        teachers = build_teachers(config)
        return cls(teachers, build_student(config, teachers.matchers[0]), config)

    # -- what the loop and the task read -------------------------------------------------------------------------

    @property
    def teacher(self) -> Matcher | Ensemble:
        """The matcher that is evaluated as "teacher"."""
        return self.teachers.evaluated_matcher()

    @override
    def matchers(self) -> dict[str, Matcher | Ensemble]:
        return {**self.teachers.evaluated_matchers(), "student": self.student}

    @override
    def view_matchers(self) -> dict[str, Matcher]:
        # teachers with other encoders than the student's, and whoever's section names a ``preprocess``
        teachers = self.teachers.by_view()
        sections = self.config.sections_by_view(teachers)
        return {
            view: matcher
            for view, matcher in {**teachers, MAIN_VIEW: self.student}.items()
            if sections[view].get("preprocess") or not matcher.shares_encoders_with(self.student)
        }

    @override
    def views(self) -> dict[str, dict[str, Any]]:
        sections = self.config.sections_by_view(self.teachers.by_view())
        return {view: sections[view] for view in self.view_matchers()}

    @override
    def exported(self) -> nn.Module:
        return module_of(self.student)

    @override
    def use_score_bank(self, bank: ScoreBank) -> None:
        if isinstance(self.teachers, BankedTeachers):
            self.teachers.use_bank(bank)

    @override
    def use_feature_bank(self, bank: FeatureBank) -> None:
        if isinstance(self.teachers, Teachers) and self._needs_teacher:
            self.teachers.keep_vectors(bank, self.config.teacher_vectors_mb)

    @override
    def teacher_fingerprint(self) -> str:
        return self.teachers.fingerprint()

    @override
    def head_parameter_names(self) -> set[str]:
        names = as_learner(module_of(self.student)).head_parameter_names()
        return {f"student.{name}" for name in names}

    @override
    def sharding_units(self) -> list[nn.Module]:
        return as_learner(module_of(self.student)).sharding_units()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicContrastiveDistillation:
        self.teachers.apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> DynamicContrastiveDistillation:
        """Train mode for the student; the teachers, and towers shared with them, stay in evaluation mode."""
        super().train(mode)
        self.teachers.eval()
        return self

    # -- a training step -----------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the distillation loss of a batch; under torchrun that of the global batch, in every process.

        Args:
            samples: a batch, see :class:``lavis_dcd.matching.contract.Samples``; with the candidates of whatever
                ``model.candidates`` draws from the data set or takes out of a score bank.

        Returns:
            0-dim tensors: ``loss``, ``distill_loss``, ``contrastive_loss`` (not with ``candidates.match: teacher``),
            where they have a weight ``in_batch_loss`` and ``student_loss``, and, detached, the diagnostics.
        """
        batch = Batch.of(samples)
        by_teacher = self.config.candidates.match_by_teacher
        batch = batch.without_owners() if by_teacher else batch
        features = self._encoded(batch)
        encoded = EncodedBatch(batch, features, self.student)
        all_pairs = self.student.match_all(features.images, features.texts) if self.student.family == "dual" else None
        pools, prescreened = self._prescreened(encoded, self._candidates(batch, features, all_pairs))
        teacher_tables = self._teacher_tables(encoded, pools)
        if by_teacher:
            pools, teacher_tables = top_first(pools, teacher_tables)
        selections = [self._select(encoded, pool, table) for pool, table in zip(pools, teacher_tables, strict=True)]
        student_tables = self._student_tables(features, selections, all_pairs)
        student_scores = [table.known_scores() for table in student_tables]
        selections, student_scores = whole_batch(features, selections, student_scores)
        losses = self._distillation(selections, student_scores)
        losses = self._with_further_losses(losses, batch, features, all_pairs)
        unchosen = self._unchosen(pools, teacher_tables)
        return {**losses, **diagnostics(selections, student_scores, unchosen, by_teacher), **prescreened}

    def _encoded(self, batch: Batch) -> BatchFeatures:
        """The batch by the student's encoders; in half precision, then widened, where those are frozen."""
        if self.config.frozen_amp == "off" or not self.student.encoders_frozen():
            return encode_batch(self.student, batch)
        with autocast_to(device_of(self.student), self.config.frozen_amp):
            features = encode_batch(self.student, batch)
        return dataclasses.replace(features, images=features.images.float(), texts=features.texts.float())

    def _candidates(self, batch: Batch, features: BatchFeatures, all_pairs: Tensor | None) -> list[CandidatePool]:
        """This process's queries, cut to what the teacher may score; a dual student's scores rank the candidates."""
        pools = [pool.build(features.context()) for pool in self.pools]
        budget = self.config.candidates.teacher_budget
        if budget is None:
            return own_rows(features, pools)
        cheap = None if all_pairs is None else all_pairs.detach()
        cut = [
            within_budget(
                pool,
                None if cheap is None else cheap[pool.image_rows, pool.text_rows],
                budget,
                self.strategy,
                Draws(_generator(batch, pool.direction, "budget")),
            )
            for pool in pools
        ]
        return own_rows(features, cut)

    def _prescreened(
        self, encoded: EncodedBatch, pools: list[CandidatePool]
    ) -> tuple[list[CandidatePool], dict[str, Tensor]]:
        """The pools as ``selection.prescreen`` cuts them and, where it is due, what share of the hardest it kept."""
        hardest = self.config.selection.hard_negatives
        if self.prescreen is None or hardest is None:
            return pools, {}
        cut = self.prescreen.cut(encoded.features, pools, [_draws(encoded, p.direction, "prescreen") for p in pools])
        if not self.prescreen.due(encoded.batch.step):
            return cut, {}
        return cut, self.prescreen.found(pools, cut, self.teachers.scores(encoded, pools), hardest)

    def _teacher_tables(self, encoded: EncodedBatch, pools: list[CandidatePool]) -> list[ScoreTable]:
        """The pools as the teacher scores them; unscored where nothing depends on its scores."""
        if not self._needs_teacher:
            return [ScoreTable.of(pool) for pool in pools]
        # the published code has no masks: every candidate counts, and is scored
        return self.teachers.scores(encoded, pools, everything=self.config.loss.reference == "release")

    @property
    def _needs_teacher(self) -> bool:
        how = self.config.selection
        mining = self.strategy.needs_teacher and how.hard_negatives is not None
        by_teacher = self.config.candidates.match_by_teacher
        return mining or by_teacher or how.margin is not None or how.reweight or self.objective.needs_teacher

    def _select(self, encoded: EncodedBatch, pool: CandidatePool, teacher: ScoreTable) -> Selection:
        how = self.config.selection
        if self.teachers.selects_hard_samples:
            return select(pool, teacher.scores, None)
        if self.config.loss.reference == "release" and how.hard_negatives is not None:
            return release_selection(pool, teacher.known_scores(), how.hard_negatives)
        draws = _draws(encoded, pool.direction)
        return select(pool, teacher.scores, how.hard_negatives, self.strategy, how.margin, draws, how.reweight)

    def _student_tables(
        self, features: BatchFeatures, selections: list[Selection], all_pairs: Tensor | None
    ) -> list[ScoreTable]:
        tables = [ScoreTable.of(selection) for selection in selections]
        if all_pairs is not None:
            return gather_tables(all_pairs, tables)
        match = partial(match_recomputed, self.student.match, chunk_pairs=self.config.student_chunk_pairs)
        return match_tables(match, features, tables)

    def _distillation(self, selections: list[Selection], student_scores: list[Tensor]) -> dict[str, Tensor]:
        """The objective of each direction, and the mean of the two."""
        by_direction = [
            self.objective(selection.teacher_scores, scores, selection.valid, selection.log_counts)
            for selection, scores in zip(selections, student_scores, strict=True)
        ]
        # to what the teacher puts first, a contrastive loss would be none of the ground truth
        left_out = {"contrastive_loss"} if self.config.candidates.match_by_teacher else set[str]()
        keys = [key for key in by_direction[0] if key not in left_out]
        return {key: torch.stack([losses[key] for losses in by_direction]).mean() for key in keys}

    def _with_further_losses(
        self, losses: dict[str, Tensor], batch: Batch, features: BatchFeatures, all_pairs: Tensor | None
    ) -> dict[str, Tensor]:
        """The losses with the weighted sum of the student's two losses that do not depend on the teacher."""
        in_batch_weight, student_weight = self.loss_config.in_batch_weight, self.loss_config.student_weight
        losses = dict(losses)
        if in_batch_weight:
            if all_pairs is None:
                all_pairs = self.student.match_all(features.images, features.texts)
            losses["in_batch_loss"] = info_nce(all_pairs, features)
        if student_weight:
            losses["student_loss"] = self.student.own_loss(batch.for_lavis())
        if in_batch_weight:
            losses["loss"] = losses["loss"] + in_batch_weight * losses["in_batch_loss"]
        if student_weight:
            losses["loss"] = losses["loss"] + student_weight * losses["student_loss"]
        return losses

    def _unchosen(
        self, pools: list[CandidatePool], teacher_tables: list[ScoreTable]
    ) -> list[tuple[CandidatePool, Tensor | None]]:
        """The pools by which the teacher can be judged: none where scores have chosen the candidates already."""
        chosen = (
            self.teachers.selects_hard_samples
            or self.prescreen is not None
            or self.config.candidates.teacher_budget is not None
            or self.config.candidates.match_by_teacher
        )
        return [] if chosen else [(pool, table.scores) for pool, table in zip(pools, teacher_tables, strict=True)]


def _draws(encoded: EncodedBatch, *purpose: str) -> Draws:
    """The chance of one direction's choice: a query draws the same in whichever process it is."""
    features = encoded.features
    return Draws(_generator(encoded.batch, *purpose), sum(features.queries) or None, features.own_queries)


def _generator(batch: Batch, *purpose: str) -> torch.Generator | None:
    return None if batch.draw_seed is None else torch.Generator().manual_seed(seed_for(batch.draw_seed, *purpose))
