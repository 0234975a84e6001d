"""A training batch as retrieval losses read it: every distinct picture and caption once, and who belongs to whom.

Over several processes each works on its own queries, against the candidates of all; the loss is of all. Weights of
queries, and whatever else a loss takes over its rows, are of the global batch: every process gathers the tables of
scores and computes the same loss, whose value and gradient are then those of one process.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup, gather_objects
from lavis_dcd.distillation.candidates import DIRECTIONS, BatchContext, CandidatePool
from lavis_dcd.distillation.selection import Selection
from lavis_dcd.matching.contract import MAIN_VIEW, Matcher, Samples, has_view, view_of
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures, gather_features, gather_rows

F = TypeVar("F", bound=Features)

NO_PICTURE = -(2**63)  # the owner of captions that have none


@dataclass(frozen=True)
class View:
    """The pictures and captions of a batch as one matcher reads them: the samples' first, then the candidates'.

    Args:
        images: of the B samples, float ``[B, 3, H, W]``; or kept features, which have candidates as further rows.
        texts: B captions, and those drawn for them.
        candidate_images: float ``[B * C, 3, H, W]``, or None.
        text_features: kept features of ``texts``, or None.
    """

    images: Tensor | ImageFeatures
    texts: Sequence[str]
    candidate_images: Tensor | None
    text_features: TextFeatures | None


@dataclass(frozen=True)
class Batch:
    """A training batch, parsed: the one place that reads the mapping that a model's ``forward`` receives.

    Args:
        size: B, the number of samples.
        pictures: the picture ids of the samples, then of candidate pictures.
        owners: the picture ids of the samples' captions, then of candidate captions.
        texts_drawn, pictures_drawn: whether there are candidate captions and pictures, C per sample each.
        bank_scores: by direction, a score bank's teacher scores, float ``[B, 1 + C]``; empty without a bank.
        step: number of the step in the job, from 0.
        progress: share of the job that is done, in [0, 1]; 1 where the samples do not say.
        draw_seed: of what is drawn for the queries, the same in every process; None: torch's generators draw.
        samples: the mapping itself, for :meth:`view` and :meth:`for_lavis`.
    """

    size: int
    pictures: list[int]
    owners: list[int]
    texts_drawn: bool
    pictures_drawn: bool
    bank_scores: Mapping[str, Tensor]
    step: int
    progress: float
    draw_seed: int | None
    samples: Samples

    @classmethod
    def of(cls, samples: Mapping[str, Any]) -> Batch:
        """Parse ``samples``, as :class:`lavis_dcd.matching.contract.Samples` documents them."""
        image_ids = torch.as_tensor(samples["image_id"]).cpu().tolist()
        owners, pictures = list(image_ids), list(image_ids)
        if texts_drawn := bool(samples.get("candidate_text")):
            owners += torch.as_tensor(samples["candidate_image_id"]).flatten().tolist()
        if pictures_drawn := samples.get("candidate_picture_id") is not None:
            pictures += torch.as_tensor(samples["candidate_picture_id"]).flatten().tolist()
        scores = {direction: samples.get(f"{direction}_scores") for direction in DIRECTIONS}
        epoch, steps_per_epoch = int(samples.get("epoch", 0)), int(samples.get("num_iters_per_epoch", 1))
        return cls(
            size=len(image_ids),
            pictures=pictures,
            owners=owners,
            texts_drawn=texts_drawn,
            pictures_drawn=pictures_drawn,
            bank_scores={direction: torch.as_tensor(table) for direction, table in scores.items() if table is not None},
            step=epoch * steps_per_epoch + int(samples.get("iters", 0)),
            progress=float(samples.get("progress", 1.0)),
            draw_seed=samples.get("draw_seed"),
            samples=cast(Samples, samples),
        )

    def without_owners(self) -> Batch:
        """Return the same with captions that belong to no picture; equal ones are one, whatever picture they are with.

        Nothing that reads it can tell which caption came with which picture, but for ``match_pairs``.
        """
        return replace(self, owners=[NO_PICTURE] * len(self.owners))

    def has_view(self, name: str) -> bool:
        """Return whether the view ``name`` differs from the main one."""
        return has_view(self.samples, name)

    def view(self, name: str = MAIN_VIEW) -> View:
        """Return what the matcher of the view ``name`` reads.

        Raises:
            UserError: kept features, which serve the main view's encoders, for a view of another name.
        """
        samples = view_of(self.samples, name)
        text_features = samples.get("text_features")
        if name != MAIN_VIEW and text_features is not None:
            raise UserError("run.cache_features: the kept features serve the student's encoders; set it to off")
        texts = [*samples["text_input"], *(samples.get("candidate_text") or ())]
        return View(samples["image"], texts, samples.get("candidate_image"), text_features)

    def for_lavis(self) -> dict[str, Any]:
        """Return the samples of the main view, as the ``forward`` of a LAVIS model reads them."""
        return view_of(self.samples)


@dataclass
class BatchFeatures:
    """A training batch, every distinct picture and caption encoded once.

    Under torchrun this is the global batch, the same in every process.

    Args:
        images, texts: features of the I distinct pictures and of the T distinct captions.
        image_ids: int64 ``[I]``, the id of each picture.
        text_image_ids: int64 ``[T]``, the id of the picture that each caption belongs to.
        match_pairs: int64 ``[Q, 2]``, the (image row, text row) of each sample.
        extra_texts: int64 ``[Q, C]``, rows of the captions that come with each sample, or None.
        extra_images: int64 ``[Q, C]``, rows of the pictures that come with each sample, or None.
        queries: how many of the Q samples each process brought, in the order of the processes.
        ranks: the processes, and which of them this one is.
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
    def own_queries(self) -> slice:
        """The samples that this process brought; all of them where it is alone."""
        if self.ranks.alone:
            return slice(None)
        start = sum(self.queries[: self.ranks.rank])
        return slice(start, start + self.queries[self.ranks.rank])

    def context(self) -> BatchContext:
        """Return the same without the features, as the candidate pools read it."""
        return BatchContext(
            image_ids=self.image_ids,
            text_image_ids=self.text_image_ids,
            match_pairs=self.match_pairs,
            extra_texts=self.extra_texts,
            extra_images=self.extra_images,
        )


@dataclass(frozen=True)
class EncodedBatch:
    """A batch, its features, and the matcher whose encoders made them."""

    batch: Batch
    features: BatchFeatures
    encoder: Matcher


@dataclass(frozen=True)
class _Items(Generic[F]):
    """Features of the distinct items of a batch, those items, and the row of every item with repeats."""

    features: F
    distinct: list[Any]
    rows: list[int]


def encode_batch(matcher: Matcher, batch: Batch, view: str = MAIN_VIEW) -> BatchFeatures:
    """Encode a training batch: each picture (by its id) and each caption (by text and picture) once.

    The rows follow from the main view alone, so they are the same for every matcher of a batch. Under torchrun every
    process encodes its own samples and gets the global batch, in the rows that one process would give it: all must
    call, and whether the features have gradients must be the same in all.

    Args:
        matcher: whose encoders to run, when the samples do not carry features already.
        batch: of this process.
        view: which view of the pictures and captions the matcher reads, where there are several.

    Raises:
        UserError: the samples carry features for other encoders than this view's.
    """
    captions: list[Hashable] = list(zip(batch.view().texts, batch.owners, strict=True))
    read = batch.view(view)
    image_first, image_rows = distinct(batch.pictures)
    text_first, text_rows = distinct(captions)
    image_features = _encoded_images(matcher, read, image_first)
    text_features = _encoded_texts(matcher, read, text_first)
    images = _Items(image_features, [batch.pictures[i] for i in image_first], image_rows)
    texts = _Items(text_features, [captions[i] for i in text_first], text_rows)
    ranks, queries = ProcessGroup.here(), (batch.size,)
    if not ranks.alone:
        of_ranks = gather_objects((batch.size, batch.pictures, captions), ranks)
        queries, pictures_of_ranks, captions_of_ranks = zip(*of_ranks, strict=True)
        images = _joined(image_features, pictures_of_ranks, queries, ranks)
        texts = _joined(text_features, captions_of_ranks, queries, ranks)
    return _batch_features(batch, images, texts, queries, ranks)


def _batch_features(
    batch: Batch,
    images: _Items[ImageFeatures],
    texts: _Items[TextFeatures],
    queries: Sequence[int],
    ranks: ProcessGroup,
) -> BatchFeatures:
    size, device = sum(queries), images.features.device
    image_rows, text_rows = (torch.tensor(items.rows, device=device) for items in (images, texts))
    return BatchFeatures(
        images=images.features,
        texts=texts.features,
        image_ids=torch.tensor(images.distinct, device=device),
        text_image_ids=torch.tensor([owner for _, owner in texts.distinct], device=device),
        match_pairs=torch.stack([image_rows[:size], text_rows[:size]], dim=1),
        extra_texts=text_rows[size:].view(size, -1) if batch.texts_drawn else None,
        extra_images=image_rows[size:].view(size, -1) if batch.pictures_drawn else None,
        queries=queries,
        ranks=ranks,
    )


def _joined(features: F, of_ranks: Sequence[Sequence[Any]], queries: Sequence[int], ranks: ProcessGroup) -> _Items[F]:
    """Return the global batch's items, numbered as one process would number them.

    Args:
        features: of this process's distinct items, in order of their first occurrence.
        of_ranks: every process's items: of its samples, then those drawn for them.
        queries: how many samples each process has.

    Returns:
        The rows are those of all samples' items, then of all that were drawn.
    """
    items = [item for of_rank, size in zip(of_ranks, queries, strict=True) for item in of_rank[:size]]
    items += [item for of_rank, size in zip(of_ranks, queries, strict=True) for item in of_rank[size:]]
    first, rows = distinct(items)
    place: dict[Hashable, int] = {}
    start = 0
    for of_rank in of_ranks:
        encoded = [of_rank[i] for i in distinct(of_rank)[0]]
        for row, item in enumerate(encoded):
            place.setdefault(item, start + row)
        start += len(encoded)
    distinct_items = [items[i] for i in first]
    return _Items(gather_features(features, ranks)[[place[item] for item in distinct_items]], distinct_items, rows)


def _encoded_images(matcher: Matcher, view: View, first: list[int]) -> ImageFeatures:
    images, candidates = view.images, view.candidate_images
    if isinstance(images, ImageFeatures):
        # kept features come as they are kept; picked first, then widened: half the memory to move. Rows come in
        # ascending order, so as many of them as there is are all of them
        return (images if len(first) == len(images) else images[first]).float()
    size = len(images)
    picked = images[[i for i in first if i < size]]
    further = [i - size for i in first if i >= size]
    if not further:
        return matcher.encode_images(picked)
    if candidates is None:
        raise ValueError("the samples have candidate_picture_id, but no candidate_image")
    # the first occurrences stand in ascending order
    return matcher.encode_images(torch.cat([picked, candidates[further]]))


def _encoded_texts(matcher: Matcher, view: View, first: list[int]) -> TextFeatures:
    if view.text_features is not None:
        return view.text_features[first].trimmed().float()
    texts = [view.texts[i] for i in first]
    string_first, string_rows = distinct(texts)
    return matcher.encode_texts([texts[i] for i in string_first])[string_rows]


def distinct(items: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Return the positions of first occurrences, and for every item the row of its first occurrence."""
    row_of: dict[Hashable, int] = {}
    first: list[int] = []
    rows: list[int] = []
    for position, item in enumerate(items):
        if item not in row_of:
            row_of[item] = len(first)
            first.append(position)
        rows.append(row_of[item])
    return first, rows


def info_nce(logits: Tensor, batch: BatchFeatures) -> Tensor:
    """Return the symmetric InfoNCE of a batch's samples, 0-dim: the mean of both directions' cross-entropies.

    Args:
        logits: float ``[I, T]``, of every picture with every caption.
        batch: whose ``match_pairs`` are the targets; other captions of a query's picture are left out.
    """
    image, text = batch.match_pairs.unbind(dim=1)
    same = batch.image_ids[:, None] == batch.text_image_ids[None, :]

    def one_way(rows: Tensor, same_rows: Tensor, target: Tensor) -> Tensor:
        others = same_rows.clone()
        others[torch.arange(len(target), device=target.device), target] = False
        return nnf.cross_entropy(rows.masked_fill(others, torch.finfo(rows.dtype).min), target)

    forward = one_way(logits[image], same[image], text)
    backward = one_way(logits.T[text], same.T[text], image)
    return (forward + backward) / 2


def own_rows(batch: BatchFeatures, pools: list[CandidatePool]) -> list[CandidatePool]:
    """Return the pools ``[Q, 1+C]`` cut to the queries that this process brought."""
    if batch.ranks.alone:
        return pools
    rows = batch.own_queries
    return [CandidatePool(p.image_rows[rows], p.text_rows[rows], p.valid[rows], p.direction) for p in pools]


def whole_batch(
    batch: BatchFeatures, selections: list[Selection], student_scores: list[Tensor]
) -> tuple[list[Selection], list[Tensor]]:
    """Return what every process selected and scored for its queries, in every process; all must call.

    Args:
        batch: the global batch.
        selections: per direction, this process's queries ``[q, 1+K]``.
        student_scores: per direction, float ``[q, 1+K]``. Columns that only other processes have are masked.

    Returns:
        The same of all queries, ``[Q, 1+K]``; gradients flow back to the process that scored.
    """
    if batch.ranks.alone:
        return selections, student_scores
    widths = gather_objects([selection.valid.shape[1] for selection in selections], batch.ranks)
    of_all, scores = [], []
    for selection, own_scores, of_ranks in zip(selections, student_scores, zip(*widths, strict=True), strict=True):
        gather = _Gather(batch.ranks, batch.queries, max(of_ranks))
        teacher = selection.teacher_scores
        of_all.append(
            Selection(
                gather(selection.image_rows),
                gather(selection.text_rows),
                None if teacher is None else gather(teacher.detach()),
                gather(selection.valid),
                None if selection.log_counts is None else gather(selection.log_counts),
            )
        )
        scores.append(gather(own_scores))
    return of_all, scores


class _Gather:
    """Tables ``[q, N]`` of all processes below each other, widened to one width."""

    def __init__(self, ranks: ProcessGroup, queries: Sequence[int], width: int) -> None:
        self._ranks, self._queries, self._width = ranks, queries, width

    def __call__(self, table: Tensor) -> Tensor:
        return gather_rows(nnf.pad(table, (0, self._width - table.shape[1])), self._ranks, self._queries)
