"""The neighbours of a training set's pictures: by the teachers' joint spaces, or by the scores that a bank keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import reported
from lavis_dcd.banks.feature_sets import BankedTrainingSet
from lavis_dcd.banks.score_bank import BankTable, ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.config.batches_section import BANK, BatchesConfig
from lavis_dcd.datasets.neighbours import NeighbourTable, pictures_with_equal_captions
from lavis_dcd.datasets.tree import annotation_rows, is_evaluation_set, plain_sets
from lavis_dcd.distillation.candidates import IMAGE_TO_TEXT
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble, members_of, weights_of
from lavis_dcd.mining.identity import teacher_views
from lavis_dcd.mining.joint_space import JointSpace, KeptFeatures, ReadFeatures, TrainingFeatures, joint_spaces
from lavis_dcd.mining.pools import Pairing
from lavis_dcd.mining.scores import MiningResources, Reader, pairing_of
from lavis_dcd.models.dcd.config import DcdConfig

TILE_MB = 64  # of one block of nearness
_ENTRIES = 2**24  # of a bank's pairs of pictures that are sorted at once
_ROWS = 2**16  # of a bank that are read at once


def neighbours_by_teacher(
    batches: BatchesConfig,
    teacher: Matcher | Ensemble,
    config: DcdConfig,
    datasets: Mapping[str, Any],
    train_set: Any,
    resources: MiningResources,
) -> NeighbourTable:
    """Return the neighbours of the training set's pictures by the teacher's joint space.

    Args:
        teacher: the teacher, or the ensemble of several.
        config: the ``model:`` section, which says how each teacher reads.
        datasets: by split, as the task built them.
        train_set: the training set as the job reads it; kept features, where it has them, are not made again.

    Raises:
        UserError: a teacher without a joint space, or with scores that are not finite; rows of another shape.
    """
    pairing = _pairing(datasets["train"])
    chosen = [(m, w) for m, w in zip(members_of(teacher), weights_of(teacher), strict=True) if w > 0]
    lacking = next((matcher for matcher, _ in chosen if not matcher.has_joint_space), None)
    if lacking is not None:
        raise UserError(
            f"run.batches.by: teacher, but {type(lacking).__name__} has no joint space to find neighbours in; take "
            f"them from a score bank (python -m lavis_dcd mine --cfg-path F, then run.batches.by={BANK}), or a teacher "
            "that has one (for METER: joint_head)"
        )
    matchers = [matcher for matcher, _ in chosen]
    features: TrainingFeatures
    if isinstance(train_set, BankedTrainingSet):
        features = KeptFeatures(train_set, len(matchers), pairing, resources.batch_size)
    else:
        views = [v for v, w in zip(teacher_views(config, datasets), weights_of(teacher), strict=True) if w > 0]
        readers = [Reader(matcher, view) for matcher, view in zip(matchers, views, strict=True)]
        features = ReadFeatures(datasets["train"], readers, pairing, resources)
    spaces = joint_spaces(matchers, features, pairing, resources.amp)
    nearest, pairs = nearest_pictures(spaces, [w for _, w in chosen], batches.neighbours, batches.margin)
    return NeighbourTable.of(pairing.image_of_row, nearest, _guarded(batches, datasets, pairing), pairs)


def neighbours_by_bank(batches: BatchesConfig, bank: ScoreBank, datasets: Mapping[str, Any]) -> NeighbourTable:
    """Return the neighbours of the training set's pictures by a score bank.

    Args:
        datasets: by split, as the task built them.

    Raises:
        UserError: a bank of another number of rows; rows of another shape.
    """
    pairing = _pairing(datasets["train"])
    if len(bank) != len(pairing.image_of_row):
        raise UserError(
            f"run.batches.by: {BANK}, but the score bank has {len(bank):,} rows and the training set "
            f"{len(pairing.image_of_row):,}; run: python -m lavis_dcd mine --cfg-path F --overwrite"
        )
    nearest = nearest_by_bank(bank.tables, pairing, batches.neighbours)
    return NeighbourTable.of(pairing.image_of_row, nearest, _guarded(batches, datasets, pairing))


def nearest_pictures(
    spaces: Sequence[JointSpace], weights: Sequence[float], count: int, margin: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the nearest pictures of each, int32 ``[P, min(count, P - 1)]``, and the pairs that ``margin`` parts.

    The pairs, int64 ``[M, 2]``, are among those of a picture with its nearest ones.

    Of several teachers, the nearness by each is divided by the spread of its scores and weighted, and all are given
    their mean spread back, so that the sum is on the scale of a teacher's scores. The table of all pairs is made block
    by block, and never stands in memory as a whole.

    Args:
        weights: of the spaces, above 0.
        margin: two pictures are parted whose nearness is above the lower of their own scores plus this.

    Raises:
        UserError: scores that are not finite numbers.
    """
    pictures, factors = len(spaces[0]), _factors(spaces, weights)
    count = min(count, pictures - 1)
    nearest = torch.empty(pictures, count, dtype=torch.int32)
    own = _own(spaces, factors) if margin is not None else None
    size = max(1, TILE_MB * 2**20 // (4 * pictures))
    pairs: list[Tensor] = []
    starts = range(0, pictures, size)
    for start in reported(starts, len(starts), "blocks of pictures compared with all"):
        rows = slice(start, min(start + size, pictures))
        values, items = nearest_of_block(spaces, factors, rows, count)
        nearest[rows] = items.int().cpu()
        if own is not None and margin is not None:
            parted = values > torch.minimum(own[rows][:, None], own[items]) + margin
            here = torch.arange(rows.start, rows.stop, device=items.device)[:, None].expand_as(items)
            pairs.append(torch.stack([here[parted], items[parted]], dim=1).cpu())
    return nearest, _distinct_pairs(pairs)


def nearest_of_block(
    spaces: Sequence[JointSpace], factors: Sequence[float], rows: slice, count: int
) -> tuple[Tensor, Tensor]:
    """Return the nearness, float32 ``[B, count]``, and the numbers, int64, of the nearest pictures of some.

    Args:
        factors: what the nearness by each space is multiplied with.
        rows: of the pictures, with a start and a stop.

    Raises:
        UserError: scores that are not finite numbers.
    """
    near = spaces[0].nearness(rows).mul_(factors[0])
    for space, factor in zip(spaces[1:], factors[1:], strict=True):
        near.add_(space.nearness(rows).mul_(factor))
    _check_finite(near)
    near.diagonal(rows.start)[:] = -torch.inf
    values, items = near.topk(count, dim=1)
    return values, items


def nearest_by_bank(tables: Mapping[str, BankTable], pairing: Pairing, count: int) -> Tensor:
    """Return the nearest pictures of each by a bank's scores, int32 ``[P, N]``, -1 where there are no more.

    A score counts as far as it is above the lowest that the bank keeps of its query, so that captions and pictures
    which it does not keep count as that; else as in :func:`nearest_pictures`.

    Args:
        count: the most that are kept of each; N is the most that any picture has.
    """
    captions = torch.bincount(pairing.image_of_row, minlength=pairing.images)
    entries = 2 * sum(table.candidates.numel() for table in tables.values())
    blocks = max(1, -(-entries // _ENTRIES))
    nearest = torch.full((pairing.images, min(count, pairing.images - 1)), -1, dtype=torch.int32)
    for block in range(blocks):
        first, end = (pairing.images * number // blocks for number in (block, block + 1))
        found = [_scored_pairs(direction, table, pairing, captions, first, end) for direction, table in tables.items()]
        _keep_best(nearest, first, *(torch.cat(parts) for parts in zip(*found, strict=True)))
    used = int((nearest >= 0).any(dim=0).sum())
    return nearest[:, :used].contiguous()


def _scored_pairs(
    direction: str, table: BankTable, pairing: Pairing, captions: Tensor, first: int, end: int
) -> tuple[Tensor, Tensor]:
    """Return keys (picture * P + other picture) and values of the pairs of pictures ``first`` to ``end`` - 1.

    Args:
        captions: int64 ``[P]``, how many each picture has.
    """
    # the rows of one picture have the same candidates, those of its captions have their own
    rows = pairing.row_of_image if direction == IMAGE_TO_TEXT else torch.arange(len(table))
    keys, values = [], []
    for some in rows.split(_ROWS):
        candidates, scores = table.candidates[some].long(), table.scores[some][:, 1:].double()
        there = candidates >= 0
        lowest = scores.masked_fill(~there, torch.inf).amin(dim=1, keepdim=True)
        query = pairing.image_of_row[some][:, None].expand_as(candidates)
        other = pairing.image_of_row[candidates.clamp_min(0)]
        # a mean over the captions of whichever picture they belong to
        shared_by = captions[other] if direction == IMAGE_TO_TEXT else captions[query]
        above = (scores - lowest) / shared_by
        for one, two in ((query, other), (other, query)):
            chosen = there & (query != other) & (one >= first) & (one < end)
            keys.append(one[chosen] * pairing.images + two[chosen])
            values.append(above[chosen])
    return torch.cat(keys), torch.cat(values)


def _keep_best(nearest: Tensor, first: int, keys: Tensor, values: Tensor) -> None:
    """Write the nearest pictures of those from ``first`` on into their rows; of ties the lower number comes first."""
    pictures, width = nearest.shape
    pairs, place = torch.unique(keys, return_inverse=True)
    total = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, place, values)
    pairs = pairs[total.sort(descending=True, stable=True).indices]
    pairs = pairs[(pairs // pictures).sort(stable=True).indices]
    rows, others = pairs // pictures, pairs % pictures
    counts = torch.bincount(rows - first, minlength=1)
    rank = torch.arange(len(rows)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    kept = rank < width
    nearest[rows[kept], rank[kept]] = others[kept].int()


def _factors(spaces: Sequence[JointSpace], weights: Sequence[float]) -> list[float]:
    """Return what the nearness by each teacher is multiplied with; one that scores all alike has no say."""
    if len(spaces) == 1:
        return [1.0]
    spreads = [space.spread() for space in spaces]
    shares = [weight / sum(weights) for weight in weights]
    scale = sum(share * spread for share, spread in zip(shares, spreads, strict=True))
    return [share * scale / spread if spread > 0 else 0.0 for share, spread in zip(shares, spreads, strict=True)]


def _own(spaces: Sequence[JointSpace], factors: Sequence[float]) -> Tensor:
    every = slice(0, len(spaces[0]))
    return torch.stack([space.own(every) * factor for space, factor in zip(spaces, factors, strict=True)]).sum(dim=0)


def _check_finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise UserError(
            "run.batches.by: teacher, but some of its scores are not finite numbers; check its weights, or set "
            "run.amp=off"
        )


def _distinct_pairs(pairs: Sequence[Tensor]) -> Tensor:
    if not pairs:
        return torch.empty(0, 2, dtype=torch.int64)
    distinct: Tensor = torch.unique(torch.cat(list(pairs)).sort(dim=1).values, dim=0)
    return distinct


def _guarded(batches: BatchesConfig, datasets: Mapping[str, Any], pairing: Pairing) -> list[list[int]]:
    if not batches.guard:
        return []
    captions = [str(row["caption"]) for _, row in annotation_rows(datasets["train"])]
    return pictures_with_equal_captions(pairing.image_of_row, captions)


def _pairing(train_set: Any) -> Pairing:
    """Return who belongs to whom in a training set.

    Raises:
        UserError: it has not LAVIS's retrieval shape.
    """
    for plain in plain_sets(train_set, "").values():
        if not getattr(plain, "annotation", None) or is_evaluation_set(plain) or not hasattr(plain, "img_ids"):
            raise UserError(
                "run.batches: neighbours are found in training sets of LAVIS's retrieval shape (annotation with image, "
                f"caption and image_id; img_ids), and {type(plain).__name__} is none; leave run.batches out"
            )
    return pairing_of(train_set)
