"""A training batch as retrieval losses read it: every distinct picture and caption once, and who belongs to whom."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup, gather_objects
from lavis_dcd.distillation.candidates import BatchContext, CandidatePool
from lavis_dcd.distillation.selection import Selection
from lavis_dcd.matching.contract import MAIN_VIEW, Matcher, view_of
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures, gather_features, gather_rows

F = TypeVar("F", bound=Features)


@dataclass
class BatchFeatures:
    """A training batch, every distinct picture and caption encoded once.

    ``image_ids [I]`` and ``text_image_ids [T]`` int64: the picture each row is of. ``match_pairs [Q, 2]``: the
    (image row, text row) of each sample. ``extra_texts [Q, C]`` and ``extra_images [Q, C]``: rows of captions drawn
    from the data set, and of captions and pictures out of a score bank, or None.

    Under torchrun this is the global batch, the same in every process. ``queries``: how many of the Q samples each
    process brought, in the order of the processes; ``ranks``: which of them this one is.
    """

    images: ImageFeatures
    texts: TextFeatures
    image_ids: Tensor
    text_image_ids: Tensor
    match_pairs: Tensor
    extra_texts: Tensor | None = None
    extra_images: Tensor | None = None
    queries: Sequence[int] = ()
    ranks: ProcessGroup = ALONE

    @property
    def own(self) -> slice:
        """The samples that this process brought; all of them where it is alone."""
        if self.ranks.alone:
            return slice(None)
        start = sum(self.queries[: self.ranks.rank])
        return slice(start, start + self.queries[self.ranks.rank])

    def context(self) -> BatchContext:
        """The same without the features, as the candidate pools read it."""
        return BatchContext(
            image_ids=self.image_ids,
            text_image_ids=self.text_image_ids,
            match_pairs=self.match_pairs,
            extra_texts=self.extra_texts,
            extra_images=self.extra_images,
        )


def sample_features(matcher: Matcher, samples: Mapping[str, Any], view: str = MAIN_VIEW) -> BatchFeatures:
    """Encode a training batch: each picture (by ``image_id``) and each caption (by text and picture) once.

    The rows follow from the main view alone, so they are the same for every matcher of a batch. Under torchrun every
    process encodes its own samples and gets the global batch, in the rows that one process would give it: all must
    call, and what the features say of gradients must be the same in all.

    Args:
        matcher: whose encoders to run, when the samples do not carry features already.
        samples: as LAVIS's ``RetrievalDataset`` collates them; ``candidate_text`` (B*C captions) and
            ``candidate_image_id [B, C]`` add captions, ``candidate_image`` (B*C pictures, or further rows of an
            ``image`` that is ``ImageFeatures``) and ``candidate_picture_id [B, C]`` pictures.
        view: which view of the pictures and captions the matcher reads, where there are several.

    Raises:
        UserError: the samples carry features for other encoders than this view's.
    """
    image_id = torch.as_tensor(samples["image_id"]).cpu().tolist()
    owners, pictures = list(image_id), list(image_id)
    if texts_drawn := bool(samples.get("candidate_text")):
        owners += torch.as_tensor(samples["candidate_image_id"]).flatten().tolist()
    if pictures_drawn := samples.get("candidate_picture_id") is not None:
        pictures += torch.as_tensor(samples["candidate_picture_id"]).flatten().tolist()
    captions = list(zip(_texts(view_of(samples)), owners, strict=True))
    own = view_of(samples, view)
    if view != MAIN_VIEW and own.get("text_features") is not None:
        raise UserError("run.cache_features: the kept features serve the student's encoders; set it to off")
    image_first, image_rows = distinct(pictures)
    text_first, text_rows = distinct(captions)
    images = _encoded_images(matcher, own, image_first)
    texts = _encoded_texts(matcher, own, text_first)
    ranks, device, queries = ProcessGroup.here(), images.device, (len(image_id),)
    images_of, texts_of = [pictures[i] for i in image_first], [captions[i] for i in text_first]
    if not ranks.alone:
        told = gather_objects((len(image_id), pictures, captions), ranks)
        queries, of_pictures, of_captions = zip(*told, strict=True)
        images, images_of, image_rows = _joined(images, of_pictures, queries, ranks)
        texts, texts_of, text_rows = _joined(texts, of_captions, queries, ranks)
    size, rows, seen = sum(queries), torch.tensor(text_rows, device=device), torch.tensor(image_rows, device=device)
    return BatchFeatures(
        images=images,
        texts=texts,
        image_ids=torch.tensor(images_of, device=device),
        text_image_ids=torch.tensor([owner for _, owner in texts_of], device=device),
        match_pairs=torch.stack([seen[:size], rows[:size]], dim=1),
        extra_texts=rows[size:].view(size, -1) if texts_drawn else None,
        extra_images=seen[size:].view(size, -1) if pictures_drawn else None,
        queries=queries,
        ranks=ranks,
    )


def _joined(
    features: F, of_ranks: Sequence[list[Hashable]], queries: Sequence[int], ranks: ProcessGroup
) -> tuple[F, list[Any], list[int]]:
    """The global batch's distinct items, as one process would number them.

    Args:
        features: of this process's distinct items, in order of their first occurrence.
        of_ranks: every process's items: of its samples, then those drawn for them.
        queries: how many samples each process has.

    Returns:
        Features of the distinct items; the items; the row of each of: all samples', then all those drawn.
    """
    items = [item for own, size in zip(of_ranks, queries, strict=True) for item in own[:size]]
    items += [item for own, size in zip(of_ranks, queries, strict=True) for item in own[size:]]
    first, rows = distinct(items)
    place: dict[Hashable, int] = {}
    start = 0
    for own in of_ranks:
        encoded = [own[i] for i in distinct(own)[0]]
        for row, item in enumerate(encoded):
            place.setdefault(item, start + row)
        start += len(encoded)
    found = [items[i] for i in first]
    return gather_features(features, ranks)[[place[item] for item in found]], found, rows


def _texts(samples: Mapping[str, Any]) -> list[str]:
    return [*samples["text_input"], *(samples.get("candidate_text") or ())]


def _encoded_images(matcher: Matcher, samples: Mapping[str, Any], first: list[int]) -> ImageFeatures:
    images, more = samples["image"], samples.get("candidate_image")
    if isinstance(images, ImageFeatures):
        # kept features come as they are kept; picked first, then widened: half the memory to move. Rows come in
        # ascending order, so as many of them as there are is all of them
        return (images if len(first) == len(images) else images[first]).float()
    size = len(images)
    picked = images[[i for i in first if i < size]]
    further = [i - size for i in first if i >= size]
    # the first occurrences stand in ascending order
    return matcher.encode_images(torch.cat([picked, more[further]]) if further else picked)


def _encoded_texts(matcher: Matcher, samples: Mapping[str, Any], first: list[int]) -> TextFeatures:
    cached = samples.get("text_features")
    if cached is not None:
        return cached[first].trimmed().float()
    texts = _texts(samples)
    wanted = [texts[i] for i in first]
    string_first, string_rows = distinct(wanted)
    return matcher.encode_texts([wanted[i] for i in string_first])[string_rows]


def distinct(items: list[Any]) -> tuple[list[int], list[int]]:
    """Positions of first occurrences, and for every item the row of its first occurrence."""
    row_of: dict[Any, int] = {}
    first: list[int] = []
    rows = []
    for position, item in enumerate(items):
        if item not in row_of:
            row_of[item] = len(first)
            first.append(position)
        rows.append(row_of[item])
    return first, rows


def info_nce(logits: Tensor, batch: BatchFeatures) -> Tensor:
    """Symmetric InfoNCE on ``logits [I, T]`` over the batch's samples; other captions of a picture are left out."""
    image, text = batch.match_pairs.unbind(dim=1)
    same = batch.image_ids[:, None] == batch.text_image_ids[None, :]

    def one_way(rows: Tensor, same_rows: Tensor, target: Tensor) -> Tensor:
        others = same_rows.clone()
        others[torch.arange(len(target), device=target.device), target] = False
        return nnf.cross_entropy(rows.masked_fill(others, torch.finfo(rows.dtype).min), target)

    forward = one_way(logits[image], same[image], text)
    backward = one_way(logits.T[text], same.T[text], image)
    return (forward + backward) / 2


# ----------------------------------------------------------------------------------------------------
# A batch over several processes: each works on its own queries, against the candidates of all; the loss is of all.
#
# Weights of queries, and whatever else a loss takes over its rows, are of the global batch: every process gathers the
# tables of scores and computes the same loss, whose value and gradient are then those of one process.


def own_rows(batch: BatchFeatures, pools: list[CandidatePool]) -> list[CandidatePool]:
    """The pools ``[Q, 1+C]`` cut to the queries that this process brought."""
    if batch.ranks.alone:
        return pools
    own = batch.own
    return [CandidatePool(p.image_rows[own], p.text_rows[own], p.valid[own], p.direction) for p in pools]


def whole_batch(
    batch: BatchFeatures, selections: list[Selection], student_scores: list[Tensor]
) -> tuple[list[Selection], list[Tensor]]:
    """What every process selected and scored for its queries, in every process; all must call.

    Args:
        selections, student_scores: per direction, tables ``[q, 1+K]`` of this process's queries. Columns that only
            other processes have are masked.

    Returns:
        The same of all queries, ``[Q, 1+K]``; gradients flow back to the process that scored.
    """
    if batch.ranks.alone:
        return selections, student_scores
    widths = gather_objects([selection.valid.shape[1] for selection in selections], batch.ranks)
    found, scores = [], []
    for selection, own, of_ranks in zip(selections, student_scores, zip(*widths, strict=True), strict=True):
        gather = _Gather(batch.ranks, batch.queries, max(of_ranks))
        teacher = selection.teacher_scores
        found.append(
            Selection(
                gather(selection.image_rows),
                gather(selection.text_rows),
                None if teacher is None else gather(teacher.detach()),
                gather(selection.valid),
            )
        )
        scores.append(gather(own))
    return found, scores


class _Gather:
    def __init__(self, ranks: ProcessGroup, queries: Sequence[int], width: int) -> None:
        self._ranks, self._queries, self._width = ranks, queries, width

    def __call__(self, table: Tensor) -> Tensor:
        return gather_rows(nnf.pad(table, (0, self._width - table.shape[1])), self._ranks, self._queries)
