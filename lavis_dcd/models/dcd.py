"""Dynamic contrastive distillation (IEEE TMM 2023) as a LAVIS model: a frozen teacher, a student, what they share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.schema import parse
from lavis_dcd.distillation.candidates import DIRECTIONS, CandidatePool, PoolStrategy, build_pool
from lavis_dcd.distillation.objective import build_objective, config_faults
from lavis_dcd.distillation.selection import SELECTION_STRATEGIES, Selection, release_selection, select
from lavis_dcd.matching.chunked import match_recomputed
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.building import build_matcher
from lavis_dcd.models.dcd_config import CandidatesConfig, DcdConfig
from lavis_dcd.models.retrieval_loss import BatchFeatures, sample_features


@registry.register_model("dcd")
class DynamicContrastiveDistillation(BaseModel):
    """Distils any matcher into any matcher.

    Per query and direction: a candidate pool, the teacher's scores on it, the hard samples they select, the
    student's scores on those, and the dynamic loss (design of the method: paper section 3). The teacher is held
    outside the module tree: not in ``state_dict()``, the optimizer or DDP, and always in evaluation mode.
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "default": str(packaged_folder("configs") / "models" / "dcd_default.yaml")
    }

    def __init__(self, teacher: Matcher, student: Matcher, config: DcdConfig):
        super().__init__()
        self.config = config
        self.student = student
        teacher.requires_grad_(False)
        # a plain attribute would register the teacher as a sub-module
        self.__dict__["_teacher"] = teacher.eval()
        faults = method_faults(config)
        if faults:
            raise UserError(faults)
        if not any(p.requires_grad for p in student.parameters()):
            raise UserError("model.student: no parameter would learn; unfreeze a tower or keep a fusion of its own")
        self.pools = _pools(config.candidates)
        self.objective = build_objective(config.loss)

    @classmethod
    def config_schema(cls) -> type:
        """The dataclass that a ``model:`` section of this arch must fit."""
        return DcdConfig

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> DynamicContrastiveDistillation:
        """Teacher, student (thinned from the teacher where ``init_from_teacher`` says so) and method.

        Raises:
            UserError: sections that do not fit their models, or a student that cannot start from this teacher.
        """
        config = parse(DcdConfig, cfg, "model")
        teacher = build_matcher(config.teacher, "model.teacher")
        section = dict(config.student)
        succession = section.pop("init_from_teacher", None)
        if succession is None:
            student = build_matcher(section, "model.student")
            if config.share_encoders and not student.shares_encoders_with(teacher):
                raise UserError("model.share_encoders: only a student with init_from_teacher shares the teacher's "
                                "towers; set share_encoders: false")  # fmt: skip
            return cls(teacher, student, config)
        layers = list(succession["layers"])
        student = build_matcher(_student_section(teacher, section, layers), "model.student")
        student.init_from_teacher(teacher, layers, share_encoders=config.share_encoders)
        return cls(teacher, student, config)

    # -- what the runner and the task ask ------------------------------------------------------------------------

    @property
    def teacher(self) -> Matcher:
        return self.__dict__["_teacher"]

    def matchers(self) -> dict[str, Matcher]:
        return {"teacher": self.teacher, "student": self.student}

    def exported(self) -> nn.Module:
        """What the final file holds."""
        return self.student

    @property
    def random_captions_per_image(self) -> int:
        """Captions that the training set must draw per picture (0: none)."""
        pool = self.config.candidates.image_to_text
        return pool.count if pool is not None and pool.source == "random" else 0

    def head_parameter_names(self) -> set[str]:
        names = getattr(self.student, "head_parameter_names", set)()
        return {f"student.{name}" for name in names}

    def teacher_fingerprint(self) -> str:
        """SHA-256 over the teacher's tensors, names and shapes included."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.teacher.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _apply(self, fn, recurse: bool = True):
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> DynamicContrastiveDistillation:
        """Train mode for the student; the teacher, and towers shared with it, stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    # -- a training step -----------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The distillation loss of a batch.

        Args:
            samples: LAVIS ``RetrievalDataset`` samples, with ``candidate_text`` / ``candidate_image_id [B, C]``
                when candidates are drawn from the data set.

        Returns:
            0-dim tensors: ``loss``, ``distill_loss``, ``contrastive_loss`` and, detached, the diagnostics.
        """
        batch = sample_features(self.student, samples)
        pools = [pool.build(batch.context()) for pool in self.pools]
        teacher_scores = self._teacher_scores(samples, batch, pools)
        selections = [self._select(p, t) for p, t in zip(pools, teacher_scores, strict=True)]
        student_scores = self._student_scores(batch, selections)
        results = [
            self.objective(selection.teacher_scores, scores, selection.valid)
            for selection, scores in zip(selections, student_scores, strict=True)
        ]
        losses = {key: torch.stack([r[key] for r in results]).mean() for key in results[0]}
        return {**losses, **_diagnostics(selections, student_scores)}

    def _teacher_scores(
        self, samples: Mapping[str, Any], batch: BatchFeatures, pools: list[CandidatePool]
    ) -> list[Tensor | None]:
        if not self._needs_teacher:
            return [None for _ in pools]
        with torch.no_grad():
            seen = batch if self.student.shares_encoders_with(self.teacher) else sample_features(self.teacher, samples)
            # the published code knows no masks: every candidate counts, and is scored
            everything = self.config.loss.reference == "release"
            tables = [(p.image_rows, p.text_rows, p.valid | everything) for p in pools]
            return _match_tables(self.teacher.match, seen, tables)

    @property
    def _needs_teacher(self) -> bool:
        how = self.config.selection
        mining = SELECTION_STRATEGIES[how.strategy].needs_teacher or how.margin is not None
        return mining or self.objective.needs_teacher

    def _select(self, pool: CandidatePool, teacher_scores: Tensor | None) -> Selection:
        how = self.config.selection
        if self.config.loss.reference == "release":
            return release_selection(pool, teacher_scores, how.hard_negatives)
        return select(pool, teacher_scores, how.hard_negatives, strategy=how.strategy, margin=how.margin)

    def _student_scores(self, batch: BatchFeatures, selections: list[Selection]) -> list[Tensor]:
        def match(images, texts, pairs):
            return match_recomputed(self.student.match, images, texts, pairs, self.config.student_chunk_pairs)

        return _match_tables(match, batch, [(s.image_rows, s.text_rows, s.valid) for s in selections])


def method_faults(config: DcdConfig) -> list[str]:
    """What is wrong with the method's settings, one line per fault."""
    faults = [f"model.loss.{line}" if not line.startswith("model.") else line for line in config_faults(config.loss)]
    how = config.selection
    if how.hard_negatives < 1:
        faults.append(f"model.selection.hard_negatives: {how.hard_negatives}, at least 1 is needed")
    if how.strategy not in SELECTION_STRATEGIES:
        known = ", ".join(sorted(SELECTION_STRATEGIES))
        faults.append(f"model.selection.strategy: {how.strategy!r} is none of {known}")
    try:
        _pools(config.candidates)
    except UserError as error:
        faults += error.faults
    return faults


def _pools(config: CandidatesConfig) -> list[PoolStrategy]:
    sections = {d: getattr(config, d) for d in DIRECTIONS if getattr(config, d) is not None}
    if not sections:
        raise UserError("model.candidates: both directions are null, nothing would be distilled")
    pools, faults = [], []
    for direction, section in sections.items():
        try:
            pools.append(build_pool(section.source, direction))
        except ValueError as error:
            faults.append(f"model.candidates.{direction}.source: {error}")
        if (section.source == "random") != bool(section.count):
            faults.append(f"model.candidates.{direction}.count: {section.count}; the source random needs the number of "
                          "captions to draw per picture, and no other source takes one")  # fmt: skip
    if faults:
        raise UserError(faults)
    return pools


def _student_section(teacher: Matcher, section: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The student's section; what it leaves out is the teacher's, its fusion as deep as ``layers``."""
    if not hasattr(teacher, "checkpoint"):
        raise UserError(f"model.student.init_from_teacher: {type(teacher).__name__} cannot be thinned")
    saved = teacher.checkpoint()
    base = {**saved["config"], "arch": saved["arch"], "model_type": None, "load_finetuned": False}
    own = OmegaConf.merge(base, section, {"fusion": {"layers": len(layers)}, "finetuned": None, "pretrained": None})
    logging.info("student: fusion layers %s of the teacher's", layers)
    return OmegaConf.to_container(own)


def _match_tables(match, batch: BatchFeatures, tables: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
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


@torch.no_grad()
def _diagnostics(selections: list[Selection], student_scores: list[Tensor]) -> dict[str, Tensor]:
    """Means over the queries that have a negative: scores of the match and of the hardest negative, misrankings."""
    valid = torch.cat([s.valid for s in selections])
    result = {}
    tables = {"student": torch.cat([s.detach() for s in student_scores])}
    if all(s.teacher_scores is not None for s in selections):
        tables["teacher"] = torch.cat([s.teacher_scores for s in selections])
    keep = valid[:, 1:].any(dim=1)
    for name, scores in tables.items():
        match, hardest = scores[keep, 0], scores.masked_fill(~valid, -torch.inf)[keep, 1:].amax(dim=1)
        result[f"{name}_match_score"] = match.mean()
        result[f"{name}_hardest_score"] = hardest.mean()
        result[f"{name}_misranked"] = (hardest >= match).float().mean()
    return result
