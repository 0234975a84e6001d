"""Dynamic contrastive distillation (IEEE TMM 2023) as a LAVIS model: frozen teachers, a student, what they share."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig
from torch import Tensor, nn

from lavis_dcd.banks.encoding import autocast_to, device_of
from lavis_dcd.banks.score_bank import ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.schema import parse
from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.distillation.diagnostics import diagnostics
from lavis_dcd.distillation.objective import build_objective, loss_defaults
from lavis_dcd.distillation.prescreen import within_budget
from lavis_dcd.distillation.selection import SELECTION_STRATEGIES, Selection, release_selection, select
from lavis_dcd.matching.contract import MAIN_VIEW, Matcher, view_of
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.recompute import match_recomputed
from lavis_dcd.models.batch import BatchFeatures, info_nce, own_rows, sample_features, whole_batch
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
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.models.dcd.teachers import Teachers, gather_tables, match_tables

log = logging.getLogger(__name__)


@registry.register_model("dcd")
class DynamicContrastiveDistillation(BaseModel):
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

    def __init__(self, teacher: Matcher | Teachers | BankedTeachers, student: Matcher, config: DcdConfig):
        super().__init__()
        self.config = config
        self.student = student
        # a plain attribute would register the teachers as sub-modules
        several = isinstance(teacher, Teachers | BankedTeachers)
        self.__dict__["teachers"] = teacher if several else Teachers([teacher], amp=config.frozen_amp)
        if faults := method_faults(config):
            raise UserError(faults)
        check_student(student)
        self.pools = build_pools(config.candidates)
        self.prescreen = build_prescreen(config, self.teachers, student)
        self.loss_config = loss_defaults(config.loss, self.teachers.family, student.family)
        try:
            self.objective = build_objective(self.loss_config)
        except ValueError as error:
            raise UserError([f"model.{line}" for line in str(error).splitlines()]) from error
        families, terms = (self.teachers.family, student.family), self.loss_config
        log.info("%s teacher, %s student: distill %s, contrastive %s", *families, terms.distill, terms.contrastive)

    @classmethod
    def config_schema(cls) -> type:
        """The dataclass that a ``model:`` section of this arch must fit."""
        return DcdConfig

    @classmethod
    def config_faults(cls, section: Mapping[str, Any], path: str) -> list[str]:
        """Return what is wrong with a ``model:`` section across its keys, one line per fault; nothing is built."""
        return section_faults(section, path)

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

    # -- what the runner and the task ask ------------------------------------------------------------------------

    @property
    def teacher(self) -> Matcher | Ensemble:
        """What is evaluated as "teacher"."""
        return self.teachers.one()

    def matchers(self) -> dict[str, Matcher | Ensemble]:
        return {**self.teachers.evaluated(), "student": self.student}

    def view_matchers(self) -> dict[str, Matcher]:
        """Who reads pictures and captions of their own, by view: teachers with other encoders than the student's, and
        whoever's section names a ``preprocess``.
        """
        sections = self.config.sections_by_view(self.teachers.named())
        named = {**self.teachers.named(), MAIN_VIEW: self.student}
        return {
            name: matcher
            for name, matcher in named.items()
            if sections[name].get("preprocess") or not matcher.shares_encoders_with(self.student)
        }

    def views(self) -> dict[str, dict[str, Any]]:
        """The ``model:`` sections of :meth:`view_matchers`, whose ``preprocess`` says what they read."""
        sections = self.config.sections_by_view(self.teachers.named())
        return {name: sections[name] for name in self.view_matchers()}

    def exported(self) -> nn.Module:
        """What the final file holds."""
        return self.student

    @property
    def random_captions_per_image(self) -> int:
        """Captions that the training set must draw per picture (0: none)."""
        candidates = self.config.candidates
        drawn = candidates.sources().get("image_to_text") == "random"
        return candidates.image_to_text.count if drawn else 0

    @property
    def needs_score_bank(self) -> bool:
        """Whether the training set must bring candidates and scores out of a score bank."""
        return self.config.candidates.from_bank

    def use_score_bank(self, bank: ScoreBank) -> None:
        """The bank that the samples' scores come from, for :meth:`teacher_fingerprint`."""
        self.teachers.use(bank)

    def head_parameter_names(self) -> set[str]:
        names = getattr(self.student, "head_parameter_names", set)()
        return {f"student.{name}" for name in names}

    @property
    def find_unused_parameters(self) -> bool:
        """Whether some step leaves trainable parameters without a gradient, as distributed training must know."""
        return bool(getattr(self.student, "find_unused_parameters", False))

    def sharding_units(self) -> list[nn.Module]:
        """What ``run.strategy: fsdp`` gathers one at a time: the student's."""
        return self.student.sharding_units()

    def teacher_fingerprint(self) -> str:
        """SHA-256 over the teachers' tensors, or over what the score bank with their scores was made from."""
        return self.teachers.fingerprint()

    def _apply(self, fn, recurse: bool = True):
        self.teachers.apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> DynamicContrastiveDistillation:
        """Train mode for the student; the teachers, and towers shared with them, stay in evaluation mode."""
        super().train(mode)
        self.teachers.eval()
        return self

    # -- a training step -----------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The distillation loss of a batch; under torchrun that of the global batch, in every process.

        Args:
            samples: LAVIS ``RetrievalDataset`` samples, with ``candidate_text`` / ``candidate_image_id [B, C]``
                when candidates are drawn from the data set, and with what ``banks.score_candidates`` adds when they
                come from a score bank; by view where matchers differ in their inputs.

        Returns:
            0-dim tensors: ``loss``, ``distill_loss``, ``contrastive_loss``, where they have a weight
            ``in_batch_loss`` and ``student_loss``, and, detached, the diagnostics.
        """
        batch = self._features(samples)
        all_pairs = self.student.match_all(batch.images, batch.texts) if self.student.family == "dual" else None
        pools, found = self._prescreened(samples, batch, self._candidates(batch, all_pairs))
        teacher_scores = self._teacher_scores(samples, batch, pools)
        selections = [self._select(p, t) for p, t in zip(pools, teacher_scores, strict=True)]
        student_scores = self._student_scores(batch, selections, all_pairs)
        selections, student_scores = whole_batch(batch, selections, student_scores)
        judged = self._unchosen(pools, teacher_scores)
        results = [
            self.objective(selection.teacher_scores, scores, selection.valid)
            for selection, scores in zip(selections, student_scores, strict=True)
        ]
        losses = {key: torch.stack([r[key] for r in results]).mean() for key in results[0]}
        losses |= self._further_losses(samples, batch, all_pairs)
        for name, weight in (("in_batch_loss", self.loss_config.in_batch_weight),
                             ("student_loss", self.loss_config.student_weight)):  # fmt: skip
            if name in losses:
                losses["loss"] = losses["loss"] + weight * losses[name]
        return {**losses, **diagnostics(selections, student_scores, judged), **found}

    def _unchosen(
        self, pools: list[CandidatePool], teacher_scores: Sequence[Tensor | None]
    ) -> list[tuple[CandidatePool, Tensor | None]]:
        """The pools by which the teacher can be judged: none where scores have chosen the candidates already."""
        chosen = self.teachers.selects or self.prescreen or self.config.candidates.teacher_budget is not None
        return [] if chosen else list(zip(pools, teacher_scores, strict=True))

    def _further_losses(
        self, samples: Mapping[str, Any], batch: BatchFeatures, all_pairs: Tensor | None
    ) -> dict[str, Tensor]:
        found = {}
        if self.loss_config.in_batch_weight:
            if all_pairs is None:
                all_pairs = self.student.match_all(batch.images, batch.texts)
            found["in_batch_loss"] = info_nce(all_pairs, batch)
        if self.loss_config.student_weight:
            found["student_loss"] = self.student.own_loss(view_of(samples))
        return found

    def _features(self, samples: Mapping[str, Any]) -> BatchFeatures:
        if self.config.frozen_amp == "off" or not self.student.encoders_frozen():
            return sample_features(self.student, samples)
        with autocast_to(device_of(self.student), self.config.frozen_amp):
            batch = sample_features(self.student, samples)
        return dataclasses.replace(batch, images=batch.images.float(), texts=batch.texts.float())

    def _candidates(self, batch: BatchFeatures, all_pairs: Tensor | None) -> list[CandidatePool]:
        """Our queries, cut to what the teacher may score; a dual student's scores tell what is promising."""
        pools = [pool.build(batch.context()) for pool in self.pools]
        budget = self.config.candidates.teacher_budget
        if budget is None:
            return own_rows(batch, pools)
        cheap = None if all_pairs is None else all_pairs.detach()
        cut = [
            within_budget(pool, None if cheap is None else cheap[pool.image_rows, pool.text_rows], budget)
            for pool in pools
        ]
        return own_rows(batch, cut)

    def _prescreened(
        self, samples: Mapping[str, Any], batch: BatchFeatures, pools: list[CandidatePool]
    ) -> tuple[list[CandidatePool], dict[str, Tensor]]:
        """The pools as ``selection.prescreen`` cuts them and, where it is due, what share of the hardest it kept."""
        if self.prescreen is None:
            return pools, {}
        kept = self.prescreen.cut(batch, pools)
        if not self.prescreen.due(samples):
            return kept, {}
        everything = self.teachers.scores(samples, batch, self.student, pools)
        share = self.prescreen.found(pools, kept, everything, self.config.selection.hard_negatives)
        return kept, {"prescreen_found": share}

    def _teacher_scores(
        self, samples: Mapping[str, Any], batch: BatchFeatures, pools: list[CandidatePool]
    ) -> Sequence[Tensor | None]:
        if not self._needs_teacher:
            return [None for _ in pools]
        # the published code knows no masks: every candidate counts, and is scored
        everything = self.config.loss.reference == "release"
        return self.teachers.scores(samples, batch, self.student, pools, everything)

    @property
    def _needs_teacher(self) -> bool:
        how = self.config.selection
        mining = SELECTION_STRATEGIES[how.strategy].needs_teacher and how.hard_negatives is not None
        return mining or how.margin is not None or self.objective.needs_teacher

    def _select(self, pool: CandidatePool, teacher_scores: Tensor | None) -> Selection:
        how = self.config.selection
        if self.teachers.selects:
            return select(pool, teacher_scores, None)
        if self.config.loss.reference == "release":
            return release_selection(pool, teacher_scores, how.hard_negatives)
        return select(pool, teacher_scores, how.hard_negatives, strategy=how.strategy, margin=how.margin)

    def _student_scores(
        self, batch: BatchFeatures, selections: list[Selection], all_pairs: Tensor | None
    ) -> list[Tensor]:
        tables = [(s.image_rows, s.text_rows, s.valid) for s in selections]
        if all_pairs is not None:
            return gather_tables(all_pairs, tables)
        match = partial(match_recomputed, self.student.match, chunk_pairs=self.config.student_chunk_pairs)
        return match_tables(match, batch, tables)
