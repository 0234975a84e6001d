"""The pictures and captions of a whole training set in its teachers' joint spaces, each encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import reported, scoring_mode
from lavis_dcd.banks.feature_sets import BankedTrainingSet
from lavis_dcd.datasets.tree import plain_sets
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.mining.pools import Pairing
from lavis_dcd.mining.scores import MiningResources, Reader, ReadSet

_SAMPLE = 1024  # pictures whose scores tell how far a teacher's spread


class TrainingFeatures(Protocol):
    """The features of a training set's distinct pictures and captions, as each of several teachers has them."""

    def pictures(self) -> Iterator[tuple[Tensor, list[ImageFeatures]]]:
        """Yield numbers of pictures, int64 ``[B]``, with their features, one for each teacher."""

    def captions(self) -> Iterator[tuple[Tensor, list[TextFeatures]]]:
        """Yield numbers of captions, int64 ``[B]``, with their features, one for each teacher."""


class ReadFeatures:
    """Features that the teachers' encoders make; those that two teachers share are made once.

    Args:
        train_set: as the task builds it.
        readers: the teachers.
    """

    def __init__(
        self, train_set: object, readers: Sequence[Reader], pairing: Pairing, resources: MiningResources
    ) -> None:
        self._read, self._readers = ReadSet(train_set, readers), list(readers)
        self._pairing, self._resources = pairing, resources
        # per teacher the place of the first whose features serve it, perhaps its own
        self._maker = [
            next(j for j, other in enumerate(self._readers) if reader is other or reader.served_by(other))
            for reader in self._readers
        ]

    def pictures(self) -> Iterator[tuple[Tensor, list[ImageFeatures]]]:
        """Yield numbers and features of pictures, a batch at a time."""
        size, rows = self._resources.batch_size, self._pairing.row_of_image
        numbers = torch.arange(len(rows)).split(size)
        loader = self._read.batches([some.tolist() for some in rows.split(size)], self._resources.num_workers)
        for some, batch in zip(numbers, reported(loader, len(numbers), "batches of pictures embedded"), strict=True):
            made = {place: self._images(place, self._read.pictures(place, batch)) for place in set(self._maker)}
            yield some, [made[place] for place in self._maker]

    def captions(self) -> Iterator[tuple[Tensor, list[TextFeatures]]]:
        """Yield numbers and features of captions of like lengths, a batch at a time."""
        rows = self._pairing.row_of_text.tolist()
        read = {place: self._read.captions(place, rows) for place in set(self._maker)}
        batches = _by_length(read[self._maker[0]], 4 * self._resources.batch_size)
        for some in reported(batches, len(batches), "batches of captions embedded"):
            made = {place: self._texts(place, [texts[i] for i in some.tolist()]) for place, texts in read.items()}
            yield some, [made[place] for place in self._maker]

    def _images(self, place: int, pictures: Tensor) -> ImageFeatures:
        matcher = self._readers[place].matcher
        with scoring_mode(matcher, self._resources.amp) as device:
            return matcher.encode_images(pictures.to(device))

    def _texts(self, place: int, texts: list[str]) -> TextFeatures:
        matcher = self._readers[place].matcher
        with scoring_mode(matcher, self._resources.amp):
            return matcher.encode_texts(texts)


class KeptFeatures:
    """Features that a bank keeps; they serve every teacher.

    Args:
        train_set: that answers from the bank.
        teachers: their number.
        batch_size: pictures read at once; four times as many captions.
    """

    def __init__(self, train_set: BankedTrainingSet, teachers: int, pairing: Pairing, batch_size: int) -> None:
        self._bank, self._teachers, self._pairing, self._size = train_set.bank, teachers, pairing, batch_size
        sets = plain_sets(train_set, "").values()
        self._rows = torch.tensor([row for plain in sets for row in plain.rows])
        self._texts = [caption for plain in sets for caption in plain.captions]

    def pictures(self) -> Iterator[tuple[Tensor, list[ImageFeatures]]]:
        """Yield numbers and features of pictures, a batch at a time."""
        batches = torch.arange(self._pairing.images).split(self._size)
        for some in reported(batches, len(batches), "batches of kept pictures embedded"):
            features = self._bank.images(self._rows[self._pairing.row_of_image[some]])
            yield some, [features] * self._teachers

    def captions(self) -> Iterator[tuple[Tensor, list[TextFeatures]]]:
        """Yield numbers and features of captions of like lengths, a batch at a time."""
        captions = [self._texts[row] for row in self._pairing.row_of_text.tolist()]
        batches = _by_length(captions, 4 * self._size)
        for some in reported(batches, len(batches), "batches of kept captions embedded"):
            features = self._bank.texts([captions[i] for i in some.tolist()])
            yield some, [features] * self._teachers


@dataclass(frozen=True)
class JointSpace:
    """A training set of P pictures in one teacher's joint space.

    The score of a picture with the mean of several captions' vectors is, for scores that are products, the mean of its
    scores with the captions; where a picture has several vectors (BLIP-2) it stands in for that.

    Args:
        matcher: the teacher.
        images: float32 ``[P, E]``, or ``[P, N, E]`` where a picture has several vectors.
        captions: float32 ``[P, E]``, the mean vector of each picture's captions.
    """

    matcher: Matcher
    images: Tensor
    captions: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def nearness(self, rows: slice) -> Tensor:
        """Return the nearness of some pictures to all, float32 ``[B, P]``.

        It is the mean of the scores of either picture with the other's captions.
        """
        with scoring_mode(self.matcher):
            there = self.matcher.joint_scores(self.images[rows], self.captions).float()
            back = self.matcher.joint_scores(self.images, self.captions[rows]).float()
        return there.add_(back.T).div_(2)

    def own(self, rows: slice) -> Tensor:
        """Return the scores of some pictures with their own captions, float32 ``[B]``."""
        with scoring_mode(self.matcher):
            pairs = zip(self.images[rows].split(1), self.captions[rows].split(1), strict=True)
            return torch.cat([self.matcher.joint_scores(*pair).float().flatten() for pair in pairs])

    def spread(self) -> float:
        """Return the standard deviation of the scores of pictures with other ones' captions, of an even sample."""
        rows = torch.arange(0, len(self), -(-len(self) // _SAMPLE), device=self.images.device)
        with scoring_mode(self.matcher):
            scores = self.matcher.joint_scores(self.images[rows], self.captions[rows]).double()
        others = scores[~torch.eye(len(rows), dtype=torch.bool, device=scores.device)]
        return float(others.std(unbiased=False)) if len(others) else 0.0


def joint_spaces(
    matchers: Sequence[Matcher], features: TrainingFeatures, pairing: Pairing, amp: str = "off"
) -> list[JointSpace]:
    """Embed a training set, one space for each teacher, on the teacher's device.

    No more than the vectors of all pictures, and as many means of captions, is kept.

    Args:
        matchers: all with a joint space.
        features: as these matchers have them, in this order.
    """
    images: list[list[Tensor]] = [[] for _ in matchers]
    for _, of_teachers in features.pictures():
        for vectors, matcher, some in zip(images, matchers, of_teachers, strict=True):
            with scoring_mode(matcher, amp) as device:
                vectors.append(matcher.embed_images(some.to(device, torch.float32)).float())
    captions = _caption_means(matchers, features, pairing, amp)
    return [JointSpace(m, torch.cat(i), c) for m, i, c in zip(matchers, images, captions, strict=True)]


def _caption_means(matchers: Sequence[Matcher], features: TrainingFeatures, pairing: Pairing, amp: str) -> list[Tensor]:
    """Return the mean vector of each picture's captions by each teacher, float32 ``[P, E]``."""
    order = pairing.text_of_row.sort(stable=True).indices  # the rows of each caption, one caption behind the other
    counts = torch.bincount(pairing.text_of_row, minlength=pairing.texts)
    starts = counts.cumsum(0) - counts
    sums: list[Tensor | None] = [None] * len(matchers)
    for numbers, of_teachers in features.captions():
        which = torch.repeat_interleave(counts[numbers])
        first = (counts[numbers].cumsum(0) - counts[numbers])[which]
        rows = order[starts[numbers][which] + torch.arange(len(which)) - first]
        for place, (matcher, some) in enumerate(zip(matchers, of_teachers, strict=True)):
            with scoring_mode(matcher, amp) as device:
                vectors = matcher.embed_texts(some.to(device, torch.float32)).float()
            total = sums[place]
            if total is None:
                total = sums[place] = torch.zeros(pairing.images, vectors.shape[1], device=device)
            total.index_add_(0, pairing.image_of_row[rows].to(device), vectors[which.to(device)])
    of_image = torch.bincount(pairing.image_of_row, minlength=pairing.images)
    return [total.div_(of_image[:, None].to(total.device)) for total in sums if total is not None]


def _by_length(captions: Sequence[str], size: int) -> tuple[Tensor, ...]:
    return torch.tensor([len(caption) for caption in captions]).argsort(stable=True).split(size)
