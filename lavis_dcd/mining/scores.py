"""Embeddings of a whole training set for the shortlist, and the teachers' scores of a shard's pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lavis_dcd.banks.encoding import encode_captions, encode_pictures, reported, scoring_mode
from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.tree import plain_sets
from lavis_dcd.datasets.views import View, alike, with_views
from lavis_dcd.evaluation.exhaustive import ScoringSettings, match_pairs, ready
from lavis_dcd.matching.contract import MAIN_VIEW, Matcher, view_of
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.mining.pools import Pairing

# ----------------------------------------------------------------------------------------------------
# A training set as the matchers of a mining read it: pictures decoded once, without random changes.


@dataclass(frozen=True)
class Reader:
    """A matcher with its evaluation processors (``view.vis_eval`` and ``view.text_eval``, both given)."""

    matcher: Matcher
    view: View

    def served_by(self, other: Reader) -> bool:
        """Whether the other's features are this one's too."""
        return (
            alike(self.view.vis_eval, other.view.vis_eval)
            and alike(self.view.text_eval, other.view.text_eval)
            and self.matcher.shares_encoders_with(other.matcher)
        )


class ReadSet:
    """The rows of a training set through the processors of several readers.

    Args:
        train_set: a LAVIS retrieval training set or a concatenation of some.
        readers: each is addressed by its place in this list.

    Raises:
        UserError: a set without processors.
    """

    def __init__(self, train_set: Any, readers: Sequence[Reader]) -> None:
        self._names = [MAIN_VIEW, *(f"reader.{i}" for i in range(1, len(readers)))]
        views = {
            name: View(vis_train=reader.view.vis_eval, text_train=reader.view.text_eval)
            for name, reader in zip(self._names, readers, strict=True)
        }
        self._set = with_views(train_set, views)
        self._rows = [(leaf, row) for leaf in plain_sets(self._set, "").values() for row in leaf.annotation]

    def captions(self, reader: int, rows: Sequence[int]) -> list[str]:
        """The captions of these rows."""
        found = (leaf.text_processor(row["caption"]) for leaf, row in (self._rows[i] for i in rows))
        return [made.get(self._names[reader], made[MAIN_VIEW]) if isinstance(made, Mapping) else made for made in found]

    def batches(self, rows: list[list[int]], num_workers: int) -> DataLoader:
        """Batches of the pictures of these rows, for :meth:`pictures`."""
        return DataLoader(_Pictures(self._set), batch_sampler=rows, num_workers=num_workers)

    def pictures(self, reader: int, batch: Mapping[str, Any]) -> Tensor:
        """``[B, 3, H, W]``."""
        return view_of(batch, self._names[reader])["image"]


def pairing_of(train_set: Any) -> Pairing:
    """Who belongs to whom in a training set; captions that training reads alike are one."""
    rows = [(leaf, row) for leaf in plain_sets(train_set, "").values() for row in leaf.annotation]
    ids = [leaf.img_ids[row["image_id"]] for leaf, row in rows]
    return Pairing.of(ids, [leaf.text_processor(row["caption"]) for leaf, row in rows])


class _Pictures(Dataset):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": self.source[row]["image"]}


@dataclass(frozen=True)
class Means:
    """What the machine gives: the keys of ``run:`` of like names."""

    batch_size: int = 64
    num_workers: int = 0
    amp: str = "off"
    memory_mb: float = 1024


def embed_all(read: ReadSet, place: int, reader: Reader, pairing: Pairing, means: Means) -> tuple[Tensor, Tensor]:
    """Joint-space vectors of all distinct pictures and captions, float32 ``[I, E]`` (or ``[I, N, E]``), ``[T, E]``.

    Args:
        place: of the reader in ``read``.
    """
    matcher = reader.matcher
    batches = [part.tolist() for part in pairing.row_of_image.split(means.batch_size)]
    of_images, of_texts = [], []
    with scoring_mode(matcher, means.amp) as device:
        loader = read.batches(batches, means.num_workers)
        for batch in reported(loader, len(batches), "batches of pictures embedded for the shortlist"):
            features = matcher.encode_images(read.pictures(place, batch).to(device))
            of_images.append(matcher.embed_images(ready(features, device)).float().cpu())
        captions = read.captions(place, pairing.row_of_text.tolist())
        by_length = torch.tensor([len(caption) for caption in captions]).argsort(stable=True)
        for part in by_length.split(4 * means.batch_size):
            features = matcher.encode_texts([captions[i] for i in part.tolist()])
            of_texts.append(matcher.embed_texts(ready(features, device)).float().cpu())
    return torch.cat(of_images), torch.cat(of_texts)[by_length.argsort()]


class PairScorer:
    """Scores pairs with every teacher; what two teachers share is encoded once.

    Args:
        teachers: the readers of ``read``, in its order.
    """

    def __init__(self, read: ReadSet, teachers: Sequence[Reader], pairing: Pairing, means: Means) -> None:
        self._read, self._teachers, self._pairing, self._means = read, list(teachers), pairing, means
        self._encoder = [
            next(j for j, other in enumerate(self._teachers) if reader is other or reader.served_by(other))
            for reader in self._teachers
        ]
        # captions that are few stay encoded; of many, each shard encodes its own
        self._all_texts = {i: self._encoded_if_few(i) for i in sorted(set(self._encoder))}

    def scores(self, keys: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
        """Float32 ``[P]`` per teacher, on the CPU.

        Args:
            keys: sorted, of the pairs (see ``Pairing.keys``).
            batch: their pictures, in order.

        Raises:
            UserError: a score that is not a finite number.
        """
        _, image_of_pair = torch.unique(keys // self._pairing.texts, return_inverse=True)
        texts, text_of_pair = torch.unique(keys % self._pairing.texts, return_inverse=True)
        local = image_of_pair * len(texts) + text_of_pair
        features = {i: self._features(i, batch, texts) for i in self._all_texts}
        found = []
        for reader, encoder in zip(self._teachers, self._encoder, strict=True):
            found.append(self._matched(reader, *features[encoder], local))
        return found

    def _features(self, place: int, batch: Mapping[str, Any], texts: Tensor) -> tuple[ImageFeatures, TextFeatures]:
        matcher, amp = self._teachers[place].matcher, self._means.amp
        images = encode_pictures(matcher, self._read.pictures(place, batch).split(self._means.batch_size), amp=amp)
        kept = self._all_texts[place]
        if kept is not None:
            return images, kept[texts.to(kept.device)]
        return images, self._encode_texts(place, texts)

    def _encode_texts(self, place: int, texts: Tensor) -> TextFeatures:
        captions = self._read.captions(place, self._pairing.row_of_text[texts].tolist())
        matcher, means = self._teachers[place].matcher, self._means
        return encode_captions(matcher, captions, 4 * means.batch_size, amp=means.amp)

    def _encoded_if_few(self, place: int) -> TextFeatures | None:
        captions = self._read.captions(place, self._pairing.row_of_text.tolist())
        longest = torch.tensor([max(range(len(captions)), key=lambda i: len(captions[i]))])
        size = self._encode_texts(place, longest).nbytes * len(captions)
        if size > self._means.memory_mb * 2**20:
            return None
        return self._encode_texts(place, torch.arange(len(captions)))

    def _matched(self, reader: Reader, images: ImageFeatures, texts: TextFeatures, keys: Tensor) -> Tensor:
        # half precision would tell a dual encoder's cosines apart by the third digit only
        matcher, amp = reader.matcher, "off" if reader.matcher.family == "dual" else self._means.amp
        found = match_pairs(matcher, images, texts, keys, ScoringSettings(self._means.memory_mb, amp))
        bad = int((~torch.isfinite(found)).sum())
        if bad:
            raise UserError(
                f"model.teacher: {bad} of {len(found)} scores of {type(matcher).__name__} are not finite numbers; "
                "check its weights" + ("" if amp == "off" else f", or mine with run.amp=off instead of {amp}")
            )
        return found
