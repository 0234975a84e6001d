"""Embeddings of a whole training set for the shortlist, and the teachers' scores of a shard's pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lavis_dcd.banks.encoding import encode_captions, encode_pictures, reported, scoring_mode
from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.tree import plain_sets
from lavis_dcd.datasets.views import Processor, View, alike, with_views
from lavis_dcd.evaluation.exhaustive import ScoringSettings, match_pairs
from lavis_dcd.matching.contract import MAIN_VIEW, Matcher, view_of
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.mining.pools import Pairing


@dataclass(frozen=True)
class Reader:
    """A matcher with its evaluation processors (``view.vis_eval`` and ``view.text_eval``, both given)."""

    matcher: Matcher
    view: View

    def served_by(self, other: Reader) -> bool:
        """Return whether the other's features are this one's too."""
        processors = zip(self._processors(), other._processors(), strict=True)
        return all(alike(*pair) for pair in processors) and self.matcher.shares_encoders_with(other.matcher)

    def _processors(self) -> tuple[Processor, Processor]:
        if self.view.vis_eval is None or self.view.text_eval is None:
            raise ValueError("view: a reader needs both evaluation processors")
        return self.view.vis_eval, self.view.text_eval


class ReadSet:
    """The rows of a training set through several readers' processors: pictures decoded once, without random changes.

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
        """Return the captions of these rows."""
        texts = (leaf.text_processor(row["caption"]) for leaf, row in (self._rows[i] for i in rows))
        name = self._names[reader]
        return [text.get(name, text[MAIN_VIEW]) if isinstance(text, Mapping) else text for text in texts]

    def batches(self, rows: list[list[int]], num_workers: int) -> DataLoader:
        """Load batches of the pictures of these rows, for :meth:`pictures`."""
        return DataLoader(_Pictures(self._set), batch_sampler=rows, num_workers=num_workers)

    def pictures(self, reader: int, batch: Mapping[str, Any]) -> Tensor:
        """Return a batch's pictures as the reader has them, ``[B, 3, H, W]``."""
        pictures: Tensor = view_of(batch, self._names[reader])["image"]
        return pictures


def pairing_of(train_set: Any) -> Pairing:
    """Return who belongs to whom in a training set; captions that training reads alike are one."""
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
class MiningResources:
    """Sizes, precision and memory that a mining may use: the keys of ``run:`` of like names."""

    batch_size: int = 64
    num_workers: int = 0
    amp: str = "off"
    memory_mb: float = 1024


def embed_all(read: ReadSet, reader: Reader, pairing: Pairing, resources: MiningResources) -> tuple[Tensor, Tensor]:
    """Embed all distinct pictures and captions, float32 ``[I, E]`` (or ``[I, N, E]``) and ``[T, E]``.

    Args:
        read: of this reader alone.
    """
    matcher, batch_size = reader.matcher, resources.batch_size
    batches = [rows.tolist() for rows in pairing.row_of_image.split(batch_size)]
    image_embeds, text_embeds = [], []
    with scoring_mode(matcher, resources.amp) as device:
        loader = read.batches(batches, resources.num_workers)
        for batch in reported(loader, len(batches), "batches of pictures embedded for the shortlist"):
            images = matcher.encode_images(read.pictures(0, batch).to(device))
            image_embeds.append(matcher.embed_images(images.to(device, torch.float32)).float().cpu())
        captions = read.captions(0, pairing.row_of_text.tolist())
        by_length = torch.tensor([len(caption) for caption in captions]).argsort(stable=True)
        for places in by_length.split(4 * batch_size):
            texts = matcher.encode_texts([captions[i] for i in places.tolist()])
            text_embeds.append(matcher.embed_texts(texts.to(device, torch.float32)).float().cpu())
    return torch.cat(image_embeds), torch.cat(text_embeds)[by_length.argsort()]


class PairScorer:
    """Scores pairs with every teacher; features that two teachers share are encoded once.

    Args:
        teachers: the readers of ``read``, in its order.
    """

    def __init__(self, read: ReadSet, teachers: Sequence[Reader], pairing: Pairing, resources: MiningResources) -> None:
        self._read, self._teachers, self._pairing, self._resources = read, list(teachers), pairing, resources
        # per teacher the place of the first whose features serve it, perhaps its own
        self._encoder = [
            next(j for j, other in enumerate(self._teachers) if reader is other or reader.served_by(other))
            for reader in self._teachers
        ]
        # captions that are few stay encoded; of many, each shard encodes its own
        self._all_texts = {i: self._encoded_if_few(i) for i in sorted(set(self._encoder))}

    def scores(self, keys: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
        """Score pairs, float32 ``[P]`` per teacher, on the CPU.

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
        encoders = zip(self._teachers, self._encoder, strict=True)
        return [self._matched(reader, *features[encoder], local) for reader, encoder in encoders]

    def _features(self, place: int, batch: Mapping[str, Any], texts: Tensor) -> tuple[ImageFeatures, TextFeatures]:
        pictures = self._read.pictures(place, batch).split(self._resources.batch_size)
        images = encode_pictures(self._teachers[place].matcher, pictures, amp=self._resources.amp)
        all_texts = self._all_texts[place]
        of_texts = self._encode_texts(place, texts) if all_texts is None else all_texts[texts.to(all_texts.device)]
        return cast(ImageFeatures, images), of_texts  # without a place to spill to, features stay in memory

    def _encode_texts(self, place: int, texts: Tensor) -> TextFeatures:
        captions = self._read.captions(place, self._pairing.row_of_text[texts].tolist())
        matcher, resources = self._teachers[place].matcher, self._resources
        return cast(TextFeatures, encode_captions(matcher, captions, 4 * resources.batch_size, amp=resources.amp))

    def _encoded_if_few(self, place: int) -> TextFeatures | None:
        captions = self._read.captions(place, self._pairing.row_of_text.tolist())
        longest = torch.tensor([max(range(len(captions)), key=lambda i: len(captions[i]))])
        size = self._encode_texts(place, longest).nbytes * len(captions)
        if size > self._resources.memory_mb * 2**20:
            return None
        return self._encode_texts(place, torch.arange(len(captions)))

    def _matched(self, reader: Reader, images: ImageFeatures, texts: TextFeatures, keys: Tensor) -> Tensor:
        # half precision would tell a dual encoder's cosines apart by the third digit only
        matcher, amp = reader.matcher, "off" if reader.matcher.family == "dual" else self._resources.amp
        scores = match_pairs(matcher, images, texts, keys, ScoringSettings(self._resources.memory_mb, amp))
        bad = int((~torch.isfinite(scores)).sum())
        if bad:
            raise UserError(
                f"model.teacher: {bad} of {len(scores)} scores of {type(matcher).__name__} are not finite numbers; "
                "check its weights" + ("" if amp == "off" else f", or mine with run.amp=off instead of {amp}")
            )
        return scores
