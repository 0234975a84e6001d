"""A retriever's own loss: listwise cross-entropy over in-batch hard negatives, and InfoNCE on a joint head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.distillation.candidates import CandidatePool, InBatch
from lavis_dcd.matching.features import ImageFeatures, TextFeatures, gather_rows
from lavis_dcd.matching.recompute import match_recomputed
from lavis_dcd.models.batch import BatchFeatures, info_nce, own_rows
from lavis_dcd.models.pair_groups import draw_groups, group_pairs


@dataclass
class RetrievalLossConfig:
    """The retriever's own loss: listwise cross-entropy over in-batch hard negatives, both directions."""

    negatives: int = 4  # per query and direction
    queries: int | None = None  # fusion queries drawn per batch; None: every sample
    # fusion queries drawn in groups of so many samples that the joint head takes for each other; all pairs of a group
    # are scored, once, for both directions: more negatives a query at fewer pairs. null: ``negatives`` for each query
    group: int | None = None
    pool: int = 16  # without a joint head: in-batch candidates scored to find the hard ones
    sharpness: float = 1.0  # with a joint head: negatives are drawn by softmax(sharpness * joint logits) ...
    sharpness_start: float = 0.2  # ... growing linearly from this over the run, for hard negatives alone stall it
    joint_weight: float = 1.0  # weight of the joint head's InfoNCE; 0: the joint head stays as it is
    # share of the run in which the joint head trains alone: towers that start at random learn from it many times
    # faster without the noise of a fusion that has nothing to attend to yet
    fusion_start: float = 0.0
    grad_chunk_pairs: int | None = None  # recompute the fusion in chunks of so many pairs to bound memory

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 2:
            raise ValueError(f"group: {self.group}, at least 2 samples tell a match from a negative")


class TrainsOnPairs(Protocol):
    """A retriever as its own loss sees it."""

    training: bool

    @property
    def scores_pairs(self) -> bool:
        """Return whether a fusion scores pairs; without one only the joint space learns."""

    def joint_logits(self, images: ImageFeatures, texts: TextFeatures) -> Tensor | None:
        """Return logits ``[I, T]`` of the joint space with gradients, or None where the model has none."""

    def fusion_scores(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """Return the fusion's logits ``[P]`` of (image row, text row) pairs ``[P, 2]``."""

    def train(self, mode: bool = True) -> nn.Module:
        """Set train or evaluation mode, as ``nn.Module.train``."""

    def eval(self) -> nn.Module:
        """Set evaluation mode, as ``nn.Module.eval``."""


class RetrievalLoss(nn.Module):
    """The loss that METER and ViLT teachers are fine-tuned with.

    The fusion learns from its own score over negatives that are drawn, not simply taken: by the joint head's
    in-batch softmax where there is one, else the hardest by the fusion itself among ``pool`` random ones. Taking
    the listwise loss on fusion plus joint score would leave the fusion nothing to learn once the joint head
    overfits, so the two are trained apart and added only when matching.
    """

    def __init__(self, config: RetrievalLossConfig):
        super().__init__()
        self.config = config

    def forward(self, model: TrainsOnPairs, batch: BatchFeatures, progress: float = 1.0) -> dict[str, Tensor]:
        """Return the losses of a batch; ``progress`` in [0, 1] is how much of the run is done.

        Before ``fusion_start`` there is no ``fusion_loss``.
        """
        losses: dict[str, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.joint_weight > 0):
            logits = model.joint_logits(batch.images, batch.texts)
        if logits is not None:
            losses["joint_loss"] = self.config.joint_weight * info_nce(logits, batch)
        if model.scores_pairs and (logits is None or progress >= self.config.fusion_start):
            drawn_by = None if logits is None else logits.detach()
            of_queries = self._fusion_loss if self.config.group is None else self._group_loss
            losses["fusion_loss"] = of_queries(model, batch, drawn_by, progress)
        return {"loss": reduce(torch.add, losses.values()), **losses}

    def _fusion_loss(
        self, model: TrainsOnPairs, batch: BatchFeatures, logits: Tensor | None, progress: float
    ) -> Tensor:
        rows = []
        for direction in ("image_to_text", "text_to_image"):
            (pool,) = own_rows(batch, [InBatch(direction).build(batch.context())])
            pool = _some_queries(pool, self.config.queries, batch.ranks.size)
            columns = self._negatives(model, batch, pool, logits, progress)
            # the directions differ in width where a batch has fewer pictures, or captions, than negatives are asked
            missing = (0, 1 + self.config.negatives - columns.shape[1])
            valid = nnf.pad(pool.valid.gather(1, columns), missing, value=False)
            columns = nnf.pad(columns, missing)
            rows.append((pool.image_rows.gather(1, columns), pool.text_rows.gather(1, columns), valid))
        image_rows, text_rows, valid = (torch.cat(of_directions) for of_directions in zip(*rows, strict=True))
        pairs = torch.stack([image_rows[valid], text_rows[valid]], dim=1)
        scores = match_recomputed(model.fusion_scores, batch.images, batch.texts, pairs, self.config.grad_chunk_pairs)
        table = torch.full(valid.shape, torch.finfo(torch.float32).min, device=scores.device)
        table = table.masked_scatter(valid, scores.float())
        table = gather_rows(table, batch.ranks)
        target = torch.zeros(len(table), dtype=torch.long, device=table.device)
        return nnf.cross_entropy(table, target)

    def _group_loss(self, model: TrainsOnPairs, batch: BatchFeatures, logits: Tensor | None, progress: float) -> Tensor:
        groups = draw_groups(batch, self.config.group or 2, self.config.queries, logits, self._sharpness(progress))
        rows, valid = group_pairs(batch, groups)
        scores = match_recomputed(
            model.fusion_scores, batch.images, batch.texts, rows[valid], self.config.grad_chunk_pairs
        )
        table = torch.full(valid.shape, torch.finfo(torch.float32).min, device=scores.device)
        table = table.masked_scatter(valid, scores.float())
        table = gather_rows(torch.stack([table, table.transpose(1, 2)], dim=1), batch.ranks).flatten(0, 2)
        size = table.shape[1]
        return nnf.cross_entropy(table, torch.arange(len(table), device=table.device) % size)

    def _sharpness(self, progress: float) -> float:
        start = self.config.sharpness_start
        return start + (self.config.sharpness - start) * progress

    @torch.no_grad()
    def _negatives(
        self, model: TrainsOnPairs, batch: BatchFeatures, pool: CandidatePool, logits: Tensor | None, progress: float
    ) -> Tensor:
        """Columns of ``pool`` to train on, int64 ``[Q, 1 + K]``: 0, the match, and K drawn negatives."""
        hardness = torch.zeros(pool.valid.shape, device=pool.valid.device)
        if logits is not None:
            hardness = self._sharpness(progress) * logits[pool.image_rows, pool.text_rows]
        # Gumbel noise makes the K largest a draw without replacement from the softmax
        noisy = hardness - torch.empty_like(hardness).exponential_().log()
        noisy = noisy.masked_fill(~pool.valid, -torch.inf)[:, 1:]
        count = min(self.config.negatives, noisy.shape[1])
        if logits is not None:
            chosen = noisy.topk(count, dim=1).indices + 1
        else:
            chosen = self._hardest_by_fusion(model, batch, pool, noisy, count)
        return torch.cat([chosen.new_zeros(len(chosen), 1), chosen], dim=1)

    def _hardest_by_fusion(
        self, model: TrainsOnPairs, batch: BatchFeatures, pool: CandidatePool, noisy: Tensor, count: int
    ) -> Tensor:
        some = noisy.topk(min(max(self.config.pool, count), noisy.shape[1]), dim=1).indices + 1
        valid = pool.valid.gather(1, some)
        pairs = torch.stack([pool.image_rows.gather(1, some)[valid], pool.text_rows.gather(1, some)[valid]], dim=1)
        was_training = model.training
        model.eval()
        scores = model.fusion_scores(batch.images, batch.texts, pairs)
        model.train(was_training)
        table = torch.full(valid.shape, -torch.inf, device=scores.device).masked_scatter(valid, scores.float())
        return some.gather(1, table.topk(count, dim=1).indices)


def _some_queries(pool: CandidatePool, count: int | None, processes: int) -> CandidatePool:
    count = None if count is None else -(-count // processes)
    if count is None or count >= len(pool.valid):
        return pool
    chosen = torch.randperm(len(pool.valid), device=pool.valid.device)[:count]
    return CandidatePool(pool.image_rows[chosen], pool.text_rows[chosen], pool.valid[chosen], pool.direction)
