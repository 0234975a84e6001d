"""RingNet: a retriever written for LAVIS alone; nothing in this file knows LAVIS-DCD.

A small convolution net sees the picture, whose map is averaged over concentric rings. A caption is the average of its
words. Both have a vector in a joint space, and a small fusion net that reads rings and words together scores a pair.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as nnf


@registry.register_model("ringnet_retrieval")
class RingNetRetrieval(BaseModel):
    """The made-up model.

    Args:
        width: of a ring's and of a word's vector.
        rings: into which a picture is divided.
        buckets: vectors that all words share; a word's hash chooses its own.
        hidden: width of the fusion net.
    """

    # LAVIS joins the path with its own folder, which an absolute path overrides
    PRETRAINED_MODEL_CONFIG_DICT = {"tiny": str(Path(__file__).with_name("ringnet_tiny.yaml"))}  # noqa: RUF012

    def __init__(self, width: int = 64, rings: int = 4, buckets: int = 512, hidden: int = 128) -> None:
        super().__init__()
        self.rings, self.buckets = rings, buckets
        self.conv = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1),
        )
        self.words = nn.Embedding(buckets, width)
        self.image_proj = nn.Linear(rings * width, width)
        self.text_proj = nn.Linear(width, width)
        self.fusion = nn.Sequential(nn.Linear((rings + 1) * width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> RingNetRetrieval:
        """LAVIS's way to build a model from a ``model:`` section."""
        model = cls(
            width=cfg.get("width", 64),
            rings=cfg.get("rings", 4),
            buckets=cfg.get("buckets", 512),
            hidden=cfg.get("hidden", 128),
        )
        if cfg.get("load_finetuned", True) and cfg.get("finetuned"):
            model.load_checkpoint(cfg["finetuned"])
        return model

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Rings ``[B, R, D]`` and unit vectors of the joint space ``[B, D]`` of ``images [B, 3, H, W]``."""
        grid = self.conv(images)
        rings = torch.einsum("bdhw,rhw->brd", grid, _ring_masks(self.rings, *grid.shape[-2:]).to(grid))
        return rings, nnf.normalize(self.image_proj(rings.flatten(1)), dim=-1)

    def read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Averaged words ``[B, D]`` and unit vectors of the joint space ``[B, D]`` of B captions."""
        rows = [torch.tensor(_buckets(text, self.buckets), device=self.device) for text in texts]
        words = torch.stack([self.words(row).mean(dim=0) for row in rows])
        return words, nnf.normalize(self.text_proj(words), dim=-1)

    def fuse(self, rings: Tensor, words: Tensor) -> Tensor:
        """Match scores ``[P]``, higher is better, of rings ``[P, R, D]`` and words ``[P, D]`` side by side."""
        return self.fusion(torch.cat([rings.flatten(1), words], dim=1))[:, 0]

    def score(self, images: Tensor, texts: list[str]) -> Tensor:
        """The model's own scoring: how well each picture matches the caption at its side, ``[B]``."""
        return self.fuse(self.see(images)[0], self.read(texts)[0])

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's own loss on a batch of LAVIS's ``RetrievalDataset``: every caption against every picture.

        Captions of one picture share an ``image_id`` and are no negatives of each other.
        """
        rings, image_embeds = self.see(samples["image"])
        words, text_embeds = self.read(samples["text_input"])
        image_id = torch.as_tensor(samples["image_id"], device=rings.device)
        same = image_id[:, None] == image_id[None, :]
        size = len(rings)
        fused = self.fuse(rings.repeat_interleave(size, dim=0), words.repeat(size, 1)).view(size, size)
        loss_itc = _both_ways(self.logit_scale.exp() * image_embeds @ text_embeds.T, same)
        loss_itm = _both_ways(fused, same)
        return {"loss": loss_itc + loss_itm, "loss_itc": loss_itc, "loss_itm": loss_itm}


def _ring_masks(rings: int, height: int, width: int) -> Tensor:
    """``[R, H, W]``: each ring's share of the map's cells, adding up to 1 over a ring; ring 0 is the middle."""
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width)[None, :].expand(height, width)
    ring = (torch.hypot(x, y) / 2**0.5 * rings).long().clamp(max=rings - 1)
    masks = nnf.one_hot(ring, rings).permute(2, 0, 1).float()
    return masks / masks.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _buckets(text: str, buckets: int) -> list[int]:
    # Python's own hash() differs from one process to the next; a checkpoint needs one that does not
    return [zlib.crc32(word.encode()) % buckets for word in re.findall(r"\w+", text.lower()) or [""]]


def _both_ways(scores: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of ``scores [B, B]``, picture to caption and caption to picture."""
    target = same / same.sum(dim=1, keepdim=True)  # ``same`` is symmetric
    return (nnf.cross_entropy(scores, target) + nnf.cross_entropy(scores.T, target)) / 2
