"""One distillation step in several ways: as the published code computes it, and with shortcut after shortcut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from geometries import Geometry, captions
from torch import Tensor

from lavis_dcd.distillation.candidates import IMAGE_TO_TEXT, CandidatePool
from lavis_dcd.distillation.objective import LossConfig, build_objective
from lavis_dcd.distillation.selection import select
from lavis_dcd.matching.attention import Shortcuts
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.recompute import match_recomputed
from lavis_dcd.models.building import build_matcher
from lavis_dcd.models.meter.model import MeterRetrieval


@dataclass(frozen=True)
class StepRow:
    """A way of computing the step.

    Args:
        per_pair: towers run anew for every pair.
        trim: captions cut to their real length; without it all are padded to 40 tokens and matched in one piece.
        shortcuts: names of ``Shortcuts`` that are on.
        kept: what was computed before the step: "" | "features" | "scores" (and features).
        chunk_pairs: ``student_chunk_pairs``, pairs whose activations are recomputed in the backward pass.
        checkpoint: ``fusion.grad_checkpoint`` of the student.
        compiled: ``fusion.compile`` of teacher and student; compiled before what is timed.
        frozen_bf16: towers and teacher under bfloat16 autocast, as ``frozen_amp`` runs them; not exact.
    """

    name: str
    label: str
    per_pair: bool = False
    trim: bool = True
    shortcuts: tuple[str, ...] = ()
    kept: str = ""
    chunk_pairs: int | None = None
    checkpoint: bool = False
    compiled: bool = False
    frozen_bf16: bool = False

    @property
    def exact(self) -> bool:
        return not self.frozen_bf16


_ALL = ("sdpa", "first_layer", "last_layer", "low_rank")
_FRESH = StepRow("fresh", "+ low-rank cross-attention: fresh candidates", shortcuts=_ALL)
_STEADY = StepRow("steady", "+ teacher's scores kept: steady state", shortcuts=_ALL, kept="scores")
ROWS = (
    StepRow("plain", "plain: every pair encoded anew", per_pair=True, trim=False),
    StepRow("once", "+ every item encoded once", trim=False),
    StepRow("trimmed", "+ captions trimmed, pairs in chunks"),
    StepRow("sdpa", "+ scaled_dot_product_attention", shortcuts=_ALL[:1]),
    StepRow("first_layer", "+ first layer once per item", shortcuts=_ALL[:2]),
    StepRow("last_layer", "+ last layer for class tokens only", shortcuts=_ALL[:3]),
    _FRESH,
    StepRow("features", "+ features kept", shortcuts=_ALL, kept="features"),
    _STEADY,
)
# ways to trade time for memory or precision; a further one is a field of StepRow and a line here
EXTRA_ROWS = (
    replace(_STEADY, name="chunks", label="steady, student_chunk_pairs: 2", chunk_pairs=2),
    replace(_STEADY, name="checkpoint", label="steady, grad_checkpoint: true", checkpoint=True),
    replace(_FRESH, name="bf16", label="fresh, towers and teacher in bfloat16", frozen_bf16=True),
)
# minutes of compiling before anything is measured, so only by name
COMPILED_ROWS = (
    replace(_FRESH, name="compile", label="fresh, fusion.compile: true", compiled=True),
    replace(_STEADY, name="steady_compile", label="steady, fusion.compile: true", compiled=True),
)


@dataclass
class StepBatch:
    """Pictures ``[I, 3, S, S]``; token ids and mask ``[I * (1+C), 40]``, each picture's match first; the pool."""

    pictures: Tensor
    ids: Tensor
    mask: Tensor
    pool: CandidatePool

    @classmethod
    def drawn(cls, geometry: Geometry, model: MeterRetrieval, images: int, candidates: int, seed: int) -> StepBatch:
        generator = torch.Generator().manual_seed(seed)
        side, config = geometry.teacher["vision"]["image_size"], model.text_tower.model.config
        texts = torch.arange(images * (1 + candidates)).view(images, 1 + candidates)
        rows = torch.arange(images)[:, None].expand_as(texts)
        pool = CandidatePool(rows, texts, torch.ones_like(texts, dtype=torch.bool), IMAGE_TO_TEXT)
        pictures = torch.randn(images, 3, side, side, generator=generator)
        return cls(pictures, *captions(texts.numel(), config.vocab_size, config.pad_token_id, generator), pool)


@dataclass
class Kept:
    """What a step finds ready: features of the pictures and of captions, whose rows ``text_rows`` says, and scores.

    Args:
        text_rows: int64 ``[I, 1+C]`` or, with scores, ``[I, 1+K]``: rows of ``texts``.
        columns: int64 ``[I, 1+K]``: the pool's columns that ``scores [I, 1+K]`` belong to.
    """

    images: ImageFeatures
    texts: TextFeatures
    text_rows: Tensor
    scores: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class StepResult:
    """Scores ``[I, 1+C]`` (``[I, 1+K]`` where they were kept), the pool's columns ``[I, 1+K]``, the loss."""

    teacher_scores: Tensor
    columns: Tensor
    loss: Tensor


def build_models(geometry: Geometry, seed: int) -> tuple[MeterRetrieval, MeterRetrieval]:
    """Teacher and student; the student starts from the teacher's layers and shares its frozen towers.

    The fusion's weights are 2.5 times METER's start, so that what attention sees has a say in the scores.
    """
    torch.manual_seed(seed)
    teacher = build_matcher(geometry.teacher, "model").eval().requires_grad_(False)
    for name, weight in teacher.named_parameters():
        if weight.ndim > 1 and name.startswith(("cross_modal_", "rank_output")):
            weight.mul_(2.5)
    fusion = {**geometry.teacher["fusion"], "layers": len(geometry.student_layers)}
    student = build_matcher({**geometry.teacher, "fusion": fusion}, "model")
    student.init_from_teacher(teacher, list(geometry.student_layers), share_encoders=True)
    return teacher, student.train()


@dataclass
class Step:
    """A row's step on one batch. ``teacher`` may be ``None`` where its scores are kept."""

    row: StepRow
    teacher: MeterRetrieval | None
    student: MeterRetrieval
    batch: StepBatch
    hard_negatives: int
    kept: Kept | None = None
    objective: Callable = field(default_factory=lambda: build_objective(LossConfig()))

    def __post_init__(self) -> None:
        shortcuts = Shortcuts(**{name: name in self.row.shortcuts for name in _ALL})
        for model in (self.teacher, self.student):
            if model is not None:
                model.shortcuts = shortcuts

    def prepare(self, columns: Tensor | None = None) -> None:
        """What the row keeps, computed with the towers and, for scores, the teacher; ``columns`` as in ``run``."""
        if not self.row.kept:
            return
        with self._frozen():
            images, texts = self._encode()
            self.kept = Kept(images, texts, self.batch.pool.text_rows)
            if self.row.kept == "scores":
                scores = self._match(self.teacher, images, texts, self.batch.pool.text_rows)
                columns, kept_scores = self._select(scores, columns)
                rows = self.batch.pool.text_rows.gather(1, columns)
                local = torch.arange(rows.numel()).view_as(rows)
                self.kept = Kept(images, texts[rows.flatten()], local, kept_scores, columns)
                self.teacher = None

    def run(self, columns: Tensor | None = None) -> StepResult:
        """Forward and backward; gradients are added to the student's.

        Args:
            columns: int64 ``[I, 1+K]``: of the pool, instead of the teacher's choice.
        """
        if self.row.per_pair:
            return self._run(None, None, columns)
        if self.kept is not None:
            return self._run(self.kept.images, self.kept.texts, columns)
        return self._run(*self._encode(), columns)

    def _run(self, images: ImageFeatures | None, texts: TextFeatures | None, columns: Tensor | None) -> StepResult:
        rows = self.batch.pool.text_rows
        if self.kept is not None and self.kept.scores is not None:
            scores, chosen, columns, rows = self.kept.scores, self.kept.scores, self.kept.columns, self.kept.text_rows
        else:
            with self._frozen():
                scores = self._match(self.teacher, images, texts, rows)
            columns, chosen = self._select(scores, columns)
            rows = rows.gather(1, columns)
        student_scores = self._match(self.student, images, texts, rows)
        loss = self.objective(chosen, student_scores, torch.ones_like(rows, dtype=torch.bool))["loss"]
        loss.backward()
        return StepResult(scores, columns, loss.detach())

    def _select(self, scores: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """The pool's columns and the teacher's scores of the kept pairs, ``[I, 1+K]`` each."""
        if columns is not None:
            return columns, scores.gather(1, columns)
        selection = select(self.batch.pool, scores, self.hard_negatives)
        return selection.text_rows - self.batch.pool.text_rows[:, :1], selection.teacher_scores

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.row.frozen_bf16):
            yield

    def _encode(self) -> tuple[ImageFeatures, TextFeatures]:
        """Every picture and caption once."""
        ids, mask = self.batch.ids, self.batch.mask
        if self.row.trim:
            longest = int(mask.sum(dim=1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
        with self._frozen():
            return self.student.encode_images(self.batch.pictures), self.student.encode_token_ids(ids, mask)

    def _match(
        self, model: MeterRetrieval, images: ImageFeatures | None, texts: TextFeatures | None, rows: Tensor
    ) -> Tensor:
        """Scores ``[I, N]`` of each picture with the captions in its line of ``rows``."""
        pictures = torch.arange(len(rows))[:, None].expand_as(rows)
        pairs = torch.stack([pictures.flatten(), rows.flatten()], dim=1)
        if self.row.per_pair:
            return self._match_anew(model, pairs).view(rows.shape)
        if not self.row.trim:
            return _fuse_all(model, images[pairs[:, 0]], texts[pairs[:, 1]]).view(rows.shape)
        return match_recomputed(model.match, images, texts, pairs, self.row.chunk_pairs).view(rows.shape)

    def _match_anew(self, model: MeterRetrieval, pairs: Tensor) -> Tensor:
        """As the published code: each pair's picture and caption through the towers, all pairs as one batch."""
        images = model.encode_images(self.batch.pictures[pairs[:, 0]])
        texts = model.encode_token_ids(self.batch.ids[pairs[:, 1]], self.batch.mask[pairs[:, 1]])
        return _fuse_all(model, images, texts)


def _fuse_all(model: MeterRetrieval, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """The reference path on one row of features per pair: scores ``[P]``."""
    hidden = model._project_images(images), model._project_texts(texts)
    return model.rank_output(model.fuse(*hidden, texts.full_mask())[2])[:, 0].float()
