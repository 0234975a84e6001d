"""Frozen encoders run once: features of every distinct picture and caption of a job, in memory or on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lavis_dcd.banks.bank_records import FORMAT, BankRecords, read_finished
from lavis_dcd.banks.encoding import encode_captions, encode_pictures, reported
from lavis_dcd.banks.row_store import StreamedFeatures
from lavis_dcd.banks.shards import KINDS, Shard, ShardedRows, ShardWriter, one_kind, open_shard, shard_files
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import update_with_tensors
from lavis_dcd.common.locks import one_writer
from lavis_dcd.common.manifest import DamagedError, Identity, Manifest, digest_of
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.datasets.identity import Content, pictures_digests, rows_digests
from lavis_dcd.datasets.tree import is_evaluation_set
from lavis_dcd.datasets.views import alike
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Features)

_SHOWN = 4  # pictures per set that show a changed processor
_LARGE = 1 << 30  # bytes whose sums take so long that the log says so


@dataclass(frozen=True)
class Rows:
    """The content of a retrieval set, read without decoding a picture.

    Args:
        pictures: a key for each row's picture.
        captions: one per row in training sets.
    """

    pictures: list[str]
    captions: list[str]


def read_rows(dataset: Any, name: str) -> Rows:
    """The rows of a LAVIS retrieval set, for training or evaluation.

    A picture's key is its path; where the set reads no files, the picture's name in the set ``name``.

    Raises:
        UserError: the set has neither shape.
    """
    annotation = getattr(dataset, "annotation", None)
    evaluation = is_evaluation_set(dataset)
    if not annotation or (not evaluation and not hasattr(dataset, "img_ids")):
        raise UserError(
            f"run.cache_features: the data set {name!r} ({type(dataset).__name__}) is not of LAVIS's "
            "retrieval shape (annotation, and img_ids or text); set run.cache_features=off"
        )
    root = getattr(dataset, "vis_root", None)
    scope = str(root) if root and os.path.isdir(root) else f"{name}:"
    pictures = [os.path.join(scope, str(row["image"])) for row in annotation]
    if evaluation:
        return Rows(pictures, list(dataset.text))
    return Rows(pictures, [dataset.text_processor(row["caption"]) for row in annotation])


@dataclass
class BankContents:
    """The pictures and captions of some sets, of which a feature bank holds the features.

    Args:
        places: set and index of each picture to encode.
        picture_rows: as in ``FeatureBank``.
        captions: distinct ones, in an order that has nothing to do with what they say: any of them are a fair sample.
        rows: of the sets.
    """

    places: list[tuple[str, int]]
    picture_rows: dict[str, list[int]]
    captions: list[str]
    rows: dict[str, Rows]

    @classmethod
    def of(cls, datasets: Mapping[str, Dataset]) -> BankContents:
        """The distinct pictures and captions of ``datasets``.

        Raises:
            UserError: a set has neither of LAVIS's retrieval shapes.
        """
        rows = {name: read_rows(dataset, name) for name, dataset in datasets.items()}
        readers = _readers(datasets)
        row_of: dict[tuple[str, str], int] = {}
        places: list[tuple[str, int]] = []
        picture_rows: dict[str, list[int]] = {}
        for name, of_set in rows.items():
            for index, picture in enumerate(of_set.pictures):
                if row_of.setdefault((readers[name], picture), len(places)) == len(places):
                    places.append((name, index))
            picture_rows[name] = [row_of[readers[name], picture] for picture in of_set.pictures]
        captions = {caption for of_set in rows.values() for caption in of_set.captions}
        return cls(places, picture_rows, sorted(captions, key=_shuffled), rows)

    def identity(
        self, datasets: Mapping[str, Dataset], encoders: Mapping[str, Any], content: Content = "sample"
    ) -> Identity:
        """Return the identity of a bank of these sets.

        Args:
            encoders: all that shapes the features but the sets, by the words for it.
            content: which pictures' contents count, see :mod:`lavis_dcd.datasets.identity`.
        """
        shown = hashlib.sha256()  # a changed processor shows, whatever it is
        for name, of_set in self.rows.items():
            count = len(of_set.pictures)
            for index in range(0, count, max(1, count // _SHOWN)):
                shown.update(datasets[name][index]["image"].float().contiguous().numpy().tobytes())
        settings = {words: digest_of(value) for words, value in encoders.items()} | {
            "the format": digest_of(FORMAT),
            "the processors of pictures": shown.hexdigest(),
            "the captions": digest_of(self.captions),
            "the pictures that are one": digest_of(self.picture_rows),
        }
        return Identity(settings, rows_digests(datasets), pictures_digests(datasets, content))

    def __str__(self) -> str:
        return f"{len(self.places):,} pictures and {len(self.captions):,} captions"


def _readers(datasets: Mapping[str, Any]) -> dict[str, str]:
    """By set, the first set whose pictures surely go through the same processor."""
    readers: dict[str, str] = {}
    for name, dataset in datasets.items():
        processor = getattr(dataset, "vis_processor", None)
        twins = (n for n in readers.values() if processor is not None and alike(processor, datasets[n].vis_processor))
        readers[name] = next(twins, name)
    return readers


def _shuffled(caption: str) -> tuple[bytes, str]:
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest(), caption


@dataclass
class FeatureBank:
    """Features by picture and by caption, none with padding.

    Args:
        matcher: whose encoders made the features; ``None`` in loader processes, which need none.
        image_store, text_store: the features.
        picture_rows: by data set, the row in ``image_store`` of each of its rows' pictures.
        caption_rows: row in ``text_store`` of each caption, by its text.
    """

    matcher: Matcher | None
    image_store: ShardedRows
    text_store: ShardedRows
    picture_rows: dict[str, list[int]]
    caption_rows: dict[str, int]

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "matcher": None}

    def images(self, rows: Tensor | Sequence[int]) -> ImageFeatures:
        """Features of the pictures ``rows`` (see ``picture_rows``) as they are kept, with these numbers."""
        return replace(self.image_store.gather(rows, ImageFeatures), rows=torch.as_tensor(rows, dtype=torch.long))

    def texts(self, captions: Sequence[str]) -> TextFeatures:
        """Features of ``captions`` as they are kept, padded to the longest of them, with their rows' numbers.

        Raises:
            KeyError: a caption that was in none of the sets the bank was built from.
        """
        return self.texts_at([self.caption_rows[caption] for caption in captions])

    def texts_at(self, rows: Tensor | Sequence[int]) -> TextFeatures:
        """Features of the captions ``rows`` (see ``caption_rows``), as :meth:`texts` has them."""
        features = self.text_store.gather(rows, TextFeatures)
        return replace(features, mask=features.full_mask(), rows=torch.as_tensor(rows, dtype=torch.long))

    def image_rows(self, rows: Sequence[int]) -> StreamedFeatures[ImageFeatures]:
        """``images(rows)`` in float32, read when they are indexed."""
        return self.image_store.streamed(rows, ImageFeatures)

    def text_rows(self, captions: Sequence[str]) -> StreamedFeatures[TextFeatures]:
        """``texts(captions)`` in float32, read when they are indexed; raises as that does."""
        return self.text_store.streamed([self.caption_rows[c] for c in captions], TextFeatures, masked=True)

    def serves(self, matcher: Matcher) -> bool:
        """Return whether ``matcher`` would make the same features."""
        return self.matcher is not None and (matcher is self.matcher or matcher.shares_encoders_with(self.matcher))

    @property
    def nbytes(self) -> int:
        """The bytes of the features."""
        return self.image_store.nbytes + self.text_store.nbytes


def build_feature_bank(
    matcher: Matcher,
    datasets: Mapping[str, Dataset],
    batch_size: int = 64,
    dtype: torch.dtype = torch.float16,
    folder: str | Path | None = None,
    *,
    fingerprint: str = "",
    num_workers: int = 0,
    amp: str = "off",
    picture_content: Content = "sample",
) -> FeatureBank:
    """Encodes every distinct picture and caption of ``datasets`` once.

    The pictures go through each set's own processor, which must be deterministic. A picture of two sets whose
    processors differ has a row for each.

    Args:
        datasets: training and evaluation sets of LAVIS's retrieval shapes, by name.
        dtype: how the features are kept.
        folder: where banks are kept and looked for, each in a folder named by a hash of everything that shapes it:
            files of about 64 MB, read without loading them. Their bytes are compared with the bank's manifest once,
            here; a file that is not as it was written is made again. An interrupted build goes on at the file it was
            in. ``None`` keeps the bank in memory only.
        fingerprint: of the encoders (see :meth:`~lavis_dcd.matching.contract.Matcher.encoder_signature`, and
            :func:`weights_fingerprint`).
        picture_content: pictures whose contents tell a bank from others, see ``run.picture_content``.

    Raises:
        UserError: the encoders learn, a set has another shape, features do not fit ``dtype``, or the disk is too small.
    """
    if not matcher.encoders_frozen():
        raise UserError(
            f"run.cache_features: the encoders of {type(matcher).__name__} learn, so features cannot be "
            "kept; freeze them (vision.freeze and text.freeze, freeze_embeddings, or freeze: [encoders], as the model "
            "has it) or set run.cache_features=off"
        )
    wanted = BankContents.of(datasets)
    build = _Build(matcher, datasets, wanted, batch_size, dtype, num_workers, amp)
    if folder is None:
        stores = build.run(None)
    else:
        made_by = {"the encoders": fingerprint, "the features' type": str(dtype), "run.amp": amp}
        identity = wanted.identity(datasets, made_by, picture_content)
        path = Path(folder) / identity.key[:32]
        stores = build.kept(path, identity)
        log.info("features of %s: %s", wanted, path)
    caption_rows = {caption: row for row, caption in enumerate(wanted.captions)}
    return FeatureBank(matcher, *stores, wanted.picture_rows, caption_rows)


def weights_fingerprint(modules: Iterable[nn.Module]) -> str:
    """A hash of the modules' tensors, the same wherever they lie."""
    digest = hashlib.sha256()
    for module in modules:
        update_with_tensors(digest, module.state_dict().items())
    return digest.hexdigest()


class _PicturesAt(Dataset):
    """The pictures at (set name, index), through their sets' processors."""

    def __init__(self, datasets: Mapping[str, Dataset], places: Sequence[tuple[str, int]]) -> None:
        self.datasets, self.places = datasets, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        name, row = self.places[index]
        return self.datasets[name][row]["image"]


@dataclass
class _Build:
    """The encoders at work; arguments as those of :func:`build_feature_bank`."""

    matcher: Matcher
    datasets: Mapping[str, Dataset]
    wanted: BankContents
    batch_size: int
    dtype: torch.dtype
    num_workers: int
    amp: str

    def kept(self, folder: Path, identity: Identity) -> tuple[ShardedRows, ShardedRows]:
        """The stores of the bank in ``folder``, which is finished first if it is not, and mended if it is damaged."""
        with suppress(DamagedError):
            return self._opened(folder, identity)
        with one_writer(folder, "the features", wait=True):
            with suppress(DamagedError):
                return self._opened(folder, identity)  # another process has made it meanwhile
            return self.run(BankRecords(folder, identity))

    def _opened(self, folder: Path, identity: Identity) -> tuple[ShardedRows, ShardedRows]:
        """The stores of a finished bank, every byte of which is as it was written.

        Raises:
            DamagedError: there is no such bank.
        """
        manifest = read_finished(folder, identity)
        size = sum(record.bytes for record in manifest.files.values())
        if size > _LARGE:
            log.info("%s: comparing %s of features with their sums", folder, size_in_words(size))
        manifest.check_files(folder)
        stores = []
        for kind, count in zip(KINDS, (len(self.wanted.places), len(self.wanted.captions)), strict=True):
            store = self._opened_kind(folder, kind, manifest)
            if len(store) != count:
                raise DamagedError(f"it has {len(store):,} rows of {kind}, {count:,} are needed")
            stores.append(store)
        return stores[0], stores[1]

    def _opened_kind(self, folder: Path, kind: str, manifest: Manifest) -> ShardedRows:
        paths = shard_files(folder, kind)
        if strangers := [path.name for path in paths if path.name not in manifest.files]:
            raise DamagedError(f"{strangers[0]} is not one of the bank's files")
        try:
            return ShardedRows(one_kind([open_shard(path) for path in paths]), (folder, kind))
        except OSError as error:
            raise DamagedError(f"a file cannot be read ({error.strerror or error})") from error

    def run(self, records: BankRecords | None) -> tuple[ShardedRows, ShardedRows]:
        """The stores of pictures and captions; on disk, from where an interrupted build was."""
        folder = None if records is None else records.folder
        images = ShardWriter(records, "images", len(self.wanted.places))
        texts = ShardWriter(records, "texts", len(self.wanted.captions))
        if images.rows or texts.rows:
            log.info("an interrupted build goes on after %d pictures, %d captions", images.rows, texts.rows)
        first_texts, all_texts = _peeked(self._texts(texts.rows))
        first_images, all_images = _peeked(self._images(images.rows))
        rest = len(self.wanted.places) - images.rows, len(self.wanted.captions) - texts.rows
        self._announce(folder, _size(first_images, rest[0]), _size(first_texts, rest[1]))
        for image_features in all_images:
            images.add(image_features)
        for text_features in all_texts:
            texts.add(text_features)
        stores = images.store(), texts.store()
        if records is not None:
            facts = {"pictures": len(stores[0]), "captions": len(stores[1]), "dtype": str(self.dtype)}
            records.finish({**facts, "matcher": type(self.matcher).__name__})
        return stores

    def _announce(self, folder: Path | None, images: float, texts: float) -> None:
        """Log what will be written.

        Raises:
            UserError: the disk has no room for it.
        """
        kind, need = str(self.dtype).removeprefix("torch."), images + texts
        sizes = f"pictures {size_in_words(images)}, captions {size_in_words(texts)}"
        announcement = f"features of {self.wanted}: {size_in_words(need)} as {kind} ({sizes})"
        if folder is None:
            log.info("%s in memory", announcement)
            return
        there = next(parent for parent in folder.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(there).free
        if need > free:
            smaller = "" if self.dtype != torch.float32 else "halve it with run.cache_dtype=float16, "
            raise UserError(
                f"run.cache_features: the features of {self.wanted} need about {size_in_words(need)} of disk, and "
                f"{there} has {size_in_words(free)} free; make room, choose another place with LAVIS_CACHE, "
                f"{smaller}or set run.cache_features=off"
            )
        log.info("%s to be written to %s (%s free)", announcement, folder, size_in_words(free))

    def _images(self, start: int) -> Iterator[ImageFeatures]:
        source = _PicturesAt(self.datasets, self.wanted.places[start:])
        loader = DataLoader(source, batch_size=self.batch_size, num_workers=self.num_workers)
        for batch in reported(loader, len(loader), "batches of pictures encoded"):
            yield self._converted(encode_pictures(self.matcher, [batch], amp=self.amp))

    def _texts(self, start: int) -> Iterator[TextFeatures]:
        captions, size = self.wanted.captions, 4 * self.batch_size
        starts = range(start, len(captions), size)
        for first in reported(starts, len(starts), "batches of captions encoded"):
            yield self._converted(encode_captions(self.matcher, captions[first : first + size], size, amp=self.amp))

    def _converted(self, features: F | StreamedFeatures[F]) -> F:
        """In memory, as precise as they will be kept."""
        converted = features[:].to("cpu", self.dtype)
        real = converted.tokens if converted.mask is None else converted.tokens[converted.mask]
        for tensor in (real, converted.embeds):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise UserError(
                    f"run.cache_features: {type(converted).__name__} do not fit {self.dtype}; set run.cache_dtype="
                    "bfloat16 or float32, or run.cache_features=off"
                )
        return converted


def _peeked(items: Iterable[F]) -> tuple[F | None, Iterator[F]]:
    """The first item (``None`` where there is none), and all of them."""
    iterator = iter(items)
    first = next(iterator, None)

    def all_items() -> Iterator[F]:
        if first is not None:
            yield first
        yield from iterator

    return first, all_items()


def _size(first: Features | None, rows: int) -> float:
    """Bytes of ``rows`` rows like the first ones: exact where all are of one length, else estimated from these."""
    return 0.0 if first is None else Shard.of(first).nbytes / len(first) * rows
