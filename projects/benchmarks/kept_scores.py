"""The distiller with its teacher's scores of whole batches kept in a folder, for runs that see the same batches.

Runs of one seed get the same batches in the same order, whatever their selection or student, so that the teacher works
once for all of them. The scores are kept as they are, in float32: a run gets the very numbers that it would compute.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.registry import registry
from pairs_jobs import ARCH, FRESH_ARCH
from typing_extensions import override

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.models.batch import EncodedBatch
from lavis_dcd.models.dcd.model import DynamicContrastiveDistillation
from lavis_dcd.models.dcd.scores import ScoreTable

_FOLDER: ContextVar[Path | None] = ContextVar("folder of kept scores", default=None)


@contextmanager
def scores_kept_in(folder: Path | None) -> Iterator[None]:
    """Keep what models of this arch score inside the ``with`` block; None: keep nothing."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


@registry.register_model(ARCH)
class KeptScores(DynamicContrastiveDistillation):
    """Reads a batch's teacher scores where an earlier run has left them, and leaves those that it computes."""

    @override
    def _teacher_tables(self, encoded: EncodedBatch, pools: Sequence[CandidatePool]) -> list[ScoreTable]:
        folder = _FOLDER.get()
        if folder is None or not self._needs_teacher:
            return super()._teacher_tables(encoded, list(pools))
        file = folder / self._fingerprint()[:16] / f"{_batch_key(encoded, pools)}.npz"
        if file.exists():
            with np.load(file) as kept:
                return [_scored(pool, kept[pool.direction]) for pool in pools]
        tables = super()._teacher_tables(encoded, list(pools))
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part.npz")
        np.savez(part, **{p.direction: t.known_scores().numpy() for p, t in zip(pools, tables, strict=True)})
        part.replace(file)  # a run that is killed leaves no half file under the name
        return tables

    def _fingerprint(self) -> str:
        if not hasattr(self, "_teachers_sha256"):
            self._teachers_sha256 = self.teacher_fingerprint()
        return self._teachers_sha256


@registry.register_model(FRESH_ARCH)
class FreshStudent(KeptScores):
    """Distils into a student of the size that the job describes, of which only the frozen towers are the teacher's."""

    @classmethod
    @override
    def from_config(cls, cfg: Mapping[str, Any]) -> FreshStudent:
        model = super().from_config(cfg)
        started = model.student
        fresh = type(started)(started.config)
        fresh.vision_tower, fresh.text_tower = started.vision_tower, started.text_tower
        model.student = fresh.train(started.training)
        return model


def _scored(pool: CandidatePool, scores: np.ndarray) -> ScoreTable:
    return replace(ScoreTable.of(pool), scores=torch.from_numpy(scores))


def _batch_key(encoded: EncodedBatch, pools: Sequence[CandidatePool]) -> str:
    """Return a digest of the batch's pictures and captions, in their order, and of the pairs in the pools."""
    digest = hashlib.sha256(repr((encoded.batch.pictures, list(encoded.batch.view().texts))).encode())
    for pool in pools:
        digest.update(repr((pool.direction, tuple(pool.valid.shape))).encode())
        for rows in (pool.image_rows, pool.text_rows, pool.valid):
            digest.update(np.ascontiguousarray(rows.numpy()))
    return digest.hexdigest()[:32]
