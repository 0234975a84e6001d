"""Groups of samples of a batch that are hard to tell apart, all pairs of which are scored once for both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_dcd.models.batch import BatchFeatures


@torch.no_grad()
def draw_groups(
    batch: BatchFeatures, size: int, queries: int | None, logits: Tensor | None, sharpness: float
) -> Tensor:
    """Draw groups of samples, each around a sample of this process.

    A group's first sample is drawn evenly; the others come, without replacement, from the softmax of ``sharpness``
    times the mean of the logits of either one's picture with the other's caption. None shows the first one's picture.

    Args:
        size: samples of a group; fewer where the batch has fewer other pictures.
        queries: samples of all groups of all processes, rounded up to whole groups; None: as many as the batch has.
        logits: ``[I, T]`` of the joint space; None: the others are drawn evenly.

    Returns:
        int64 ``[G, size]``, rows of ``batch.match_pairs``; the same number of groups in every process.
    """
    image, text = batch.match_pairs.unbind(dim=1)
    device = image.device
    own = torch.arange(len(image), device=device)[batch.own_queries]
    count = -(-(len(image) if queries is None else queries) // (size * batch.ranks.size))
    count = max(1, min(count, *(batch.queries or [len(image)])))
    seeds = own[torch.randperm(len(own), device=device)[:count]]
    noisy = -torch.empty(len(seeds), len(image), device=device).exponential_().log()
    if logits is not None:
        there, back = logits[image[seeds]][:, text], logits[image][:, text[seeds]].T
        noisy = noisy + sharpness * (there + back).float() / 2
    ids = batch.image_ids[image]
    same = ids[seeds][:, None] == ids[None, :]
    # of all samples, so that it is the same in every process
    size = min(size, 1 + len(ids) - int(ids.unique(return_counts=True)[1].max()))
    others = noisy.masked_fill(same, -torch.inf).topk(size - 1, dim=1).indices
    return torch.cat([seeds[:, None], others], dim=1)


def group_pairs(batch: BatchFeatures, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return every pair of a picture and a caption of a group.

    Args:
        groups: int64 ``[G, g]``, rows of ``batch.match_pairs``.

    Returns:
        int64 ``[G, g, g, 2]``, (image row, text row), the matches on the diagonal; bool ``[G, g, g]``, False off the
        diagonal where the caption belongs to the picture, too.
    """
    image, text = batch.match_pairs.unbind(dim=1)
    size = groups.shape[1]
    images = image[groups][:, :, None].expand(-1, -1, size)
    texts = text[groups][:, None, :].expand(-1, size, -1)
    match = torch.eye(size, dtype=torch.bool, device=groups.device)
    return torch.stack([images, texts], dim=-1), (batch.image_ids[images] != batch.text_image_ids[texts]) | match
