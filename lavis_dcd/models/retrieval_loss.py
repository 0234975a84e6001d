"""A retriever's own loss: listwise cross-entropy over in-batch hard negatives, and InfoNCE on a joint head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lavis_dcd.distillation.candidates import CandidatePool, InBatch
from lavis_dcd.matching.chunked import match_recomputed
from lavis_dcd.matching.gather import gather_rows
from lavis_dcd.models.batch import BatchFeatures, info_nce
from lavis_dcd.models.dcd_ranks import own_rows
from lavis_dcd.models.meter_config import RetrievalLossConfig

if TYPE_CHECKING:
    from lavis_dcd.models.meter import MeterRetrieval


class RetrievalLoss(nn.Module):
    """What a METER teacher is fine-tuned with.

    The fusion learns from its own score over negatives that are drawn, not simply taken: by the joint head's
    in-batch softmax where there is one, else the hardest by the fusion itself among ``pool`` random ones. Taking
    the listwise loss on fusion plus joint score would leave the fusion nothing to learn once the joint head
    overfits, so the two are trained apart and added only when matching.
    """

    def __init__(self, config: RetrievalLossConfig):
        super().__init__()
        self.config = config

    def forward(self, model: MeterRetrieval, batch: BatchFeatures, progress: float = 1.0) -> dict[str, Tensor]:
        """Losses of a batch; ``progress`` in [0, 1] is how much of the run is done.

        Before ``fusion_start`` there is no ``fusion_loss``.
        """
        losses: dict[str, Tensor] = {}
        logits = None
        if model.joint_head is not None:
            scale = model.joint_head.scale
            logits = scale * model.embed_images(batch.images) @ model.embed_texts(batch.texts).T
            losses["joint_loss"] = self.config.joint_weight * info_nce(logits, batch)
        if model.config.fusion_score and (logits is None or progress >= self.config.fusion_start):
            drawn_by = None if logits is None else logits.detach()
            losses["fusion_loss"] = self._fusion_loss(model, batch, drawn_by, progress)
        return {"loss": sum(losses.values()), **losses}

    def _fusion_loss(
        self, model: MeterRetrieval, batch: BatchFeatures, logits: Tensor | None, progress: float
    ) -> Tensor:
        rows = []
        for direction in ("image_to_text", "text_to_image"):
            (pool,) = own_rows(batch, [InBatch(direction).build(batch.context())])
            pool = _some_queries(pool, self.config.queries, batch.ranks.size)
            kept = self._negatives(model, batch, pool, logits, progress)
            # the directions differ in width where a batch has fewer pictures, or captions, than negatives are asked
            missing = (0, 1 + self.config.negatives - kept.shape[1])
            valid = nnf.pad(pool.valid.gather(1, kept), missing, value=False)
            kept = nnf.pad(kept, missing)
            rows.append((pool.image_rows.gather(1, kept), pool.text_rows.gather(1, kept), valid))
        image_rows, text_rows, valid = (torch.cat(parts) for parts in zip(*rows, strict=True))
        pairs = torch.stack([image_rows[valid], text_rows[valid]], dim=1)
        scores = match_recomputed(model.fusion_scores, batch.images, batch.texts, pairs, self.config.grad_chunk_pairs)
        table = torch.full(valid.shape, torch.finfo(torch.float32).min, device=scores.device)
        table = table.masked_scatter(valid, scores.float())
        table = gather_rows(table, batch.ranks)
        target = torch.zeros(len(table), dtype=torch.long, device=table.device)
        return nnf.cross_entropy(table, target)

    @torch.no_grad()
    def _negatives(
        self, model: MeterRetrieval, batch: BatchFeatures, pool: CandidatePool, logits: Tensor | None, progress: float
    ) -> Tensor:
        """Columns of ``pool`` to train on, int64 ``[Q, 1 + K]``: 0, the match, and K drawn negatives."""
        hardness = torch.zeros(pool.valid.shape, device=pool.valid.device)
        if logits is not None:
            start = self.config.sharpness_start
            sharpness = start + (self.config.sharpness - start) * progress
            hardness = sharpness * logits[pool.image_rows, pool.text_rows]
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
        self, model: MeterRetrieval, batch: BatchFeatures, pool: CandidatePool, noisy: Tensor, count: int
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
