"""Features of whole sets: batches go through the encoders, and their rows to where a ``Storage`` says."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lavis_dcd.banks.row_store import RowsInMemory, Spill, SpilledRows, StreamedFeatures
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures, gather_features

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Features)
T = TypeVar("T")

SECONDS_BETWEEN_REPORTS = 10
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

ImageRows = ImageFeatures | StreamedFeatures[ImageFeatures]
TextRows = TextFeatures | StreamedFeatures[TextFeatures]


class EvaluationSet(Protocol):
    """LAVIS's retrieval evaluation shape: I pictures, whose items are ``{"image", "index"}``, and T captions."""

    @property
    def text(self) -> Sequence[str]:
        """The captions."""

    @property
    def txt2img(self) -> Mapping[int, int | Sequence[int]]:
        """Each caption's picture, or pictures."""

    @property
    def img2txt(self) -> Mapping[int, int | Sequence[int]]:
        """Each picture's captions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class BankedRows(Protocol):
    """An evaluation set that may answer from a feature bank, see ``banks.feature_sets``."""

    def banked_rows(
        self, matcher: Matcher, /
    ) -> tuple[StreamedFeatures[ImageFeatures], StreamedFeatures[TextFeatures]] | None:
        """Return the features of all pictures and captions; ``None`` for other encoders than the bank's."""


@dataclass(frozen=True)
class EncodingSettings:
    """The settings of encoding a data set.

    Args:
        batch_size: pictures of a batch; four times as many captions make one.
        num_workers: processes that read pictures.
        amp: off, bf16 or fp16.
    """

    batch_size: int = 64
    num_workers: int = 0
    amp: str = "off"


@dataclass(frozen=True)
class Storage:
    """The place where encoded rows wait for their pairs.

    Args:
        device: of the rows in memory; the encoder's by default.
        dtype: of the rows; the encoder's by default.
        spill: a folder whose files hold the rows, whatever ``device`` says; ``None`` keeps them in memory.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    spill: Spill | None = None

    def rows(self, count: int) -> RowsInMemory[Any] | SpilledRows[Any]:
        """Return empty room for ``count`` rows."""
        return RowsInMemory(count) if self.spill is None else self.spill.rows(count)


@contextmanager
def evaluation_mode(matcher: Matcher) -> Iterator[torch.device]:
    """Put every sub-module into evaluation mode; yields the matcher's device.

    Every sub-module gets its own training flag back, so a part that is pinned in evaluation mode stays there.
    """
    modules = list(matcher.modules()) if isinstance(matcher, nn.Module) else []
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield device_of(matcher)
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


@contextmanager
def scoring_mode(matcher: Matcher, amp: str = "off") -> Iterator[torch.device]:
    """:func:`evaluation_mode` without gradients, under autocast if ``amp`` is bf16 or fp16.

    Raises:
        ValueError: ``amp`` is none of off, bf16, fp16.
    """
    if amp not in ("off", *AMP_TYPES):
        raise ValueError(f"amp: {amp!r} is none of off, {', '.join(AMP_TYPES)}")
    dtype = AMP_TYPES.get(amp, torch.bfloat16)
    with (
        evaluation_mode(matcher) as device,
        torch.no_grad(),
        torch.autocast(device.type, dtype, enabled=amp != "off"),
    ):
        yield device


@contextmanager
def autocast_to(device: torch.device, amp: str) -> Iterator[None]:
    """Autocast to "bf16" or "fp16"; "off" leaves the surrounding autocast as it is."""
    if amp == "off":
        yield
        return
    with torch.autocast(device.type, AMP_TYPES[amp]):
        yield


def device_of(matcher: Matcher | nn.Module) -> torch.device:
    """Return the device of the matcher's first parameter or buffer; the CPU when it has none."""
    if isinstance(matcher, nn.Module):
        for tensors in (matcher.parameters(), matcher.buffers()):
            for tensor in tensors:
                return tensor.device
    return torch.device("cpu")


def encode_pictures(
    matcher: Matcher,
    batches: Iterable[Tensor],
    storage: Storage = Storage(),
    amp: str = "off",
    count: int | None = None,
) -> ImageRows:
    """Return the features of batches of preprocessed pictures, float ``[B, 3, H, W]``, in their order.

    Args:
        count: pictures of all batches together; by default ``batches`` are read through before the first is encoded.
    """
    if count is None:
        batches = list(batches)
        count = sum(map(len, batches))
    rows, start = storage.rows(count), 0
    with scoring_mode(matcher, amp) as device:
        for batch in batches:
            rows.put(torch.arange(start, start + len(batch)), _stored(matcher.encode_images(batch.to(device)), storage))
            start += len(batch)
    return rows.all()


def encode_captions(
    matcher: Matcher,
    texts: list[str],
    batch_size: int = 256,
    storage: Storage = Storage(),
    amp: str = "off",
    ranks: ProcessGroup = ALONE,
) -> TextRows:
    """Return the features of ``texts``, in their order.

    Texts of like lengths are encoded together, to spend little on padding.

    Args:
        ranks: processes that deal the batches among themselves; each gets the features of all.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    batches.reverse()  # the longest are likely among the first, so that rows seldom have to grow
    rows = storage.rows(len(texts))
    with scoring_mode(matcher, amp):
        for start in range(0, len(batches), ranks.size):
            dealt = batches[start : start + ranks.size]
            # a process without a batch of its own encodes one all the same, for the features' shape
            batch = dealt[min(ranks.rank, len(dealt) - 1)]
            features = matcher.encode_texts([texts[i] for i in batch])
            if not ranks.alone:
                features = gather_features(features if ranks.rank < len(dealt) else features[:0], ranks)
            rows.put(torch.tensor([i for batch in dealt for i in batch]), _stored(features, storage))
    return rows.all()


def encode_dataset(
    matcher: Matcher,
    dataset: EvaluationSet,
    settings: EncodingSettings = EncodingSettings(),
    storage: Storage = Storage(),
    text_storage: Storage | None = None,
    ranks: ProcessGroup = ALONE,
) -> tuple[ImageRows, TextRows]:
    """Return the features of an evaluation set: its I pictures and T captions, in the set's order.

    Args:
        dataset: a ``BankedRows`` answers from its bank if it can.
        storage: where, and how precisely, the rows are kept.
        text_storage: the same of captions; as ``storage`` by default.
        ranks: processes that share the work; each gets the pictures of ``ranks.share(I)`` only, and all captions.

    Raises:
        UserError: the set holds no picture or no caption; a disk to spill to is full.
    """
    if not len(dataset) or not len(dataset.text):
        raise UserError(f"the evaluation set {type(dataset).__name__} has no pictures or no captions")
    text_storage = text_storage or storage
    share = ranks.share(len(dataset))
    banked = banked_rows(matcher, dataset)
    if banked is not None:
        return _from_bank(banked[0].only(share), storage), _from_bank(banked[1], text_storage)
    # without a picture of its own, a process encodes one all the same, for the features' shape
    read: Any = dataset if ranks.alone else Subset(cast(Dataset[Any], dataset), share or range(1))
    loader = DataLoader(read, batch_size=settings.batch_size, num_workers=settings.num_workers)
    batches = reported(loader, len(loader), "batches of pictures encoded")
    images = encode_pictures(matcher, (batch["image"] for batch in batches), storage, settings.amp, len(read))
    captions = encode_captions(matcher, list(dataset.text), 4 * settings.batch_size, text_storage, settings.amp, ranks)
    return images if share else images[:0], captions


def banked_rows(
    matcher: Matcher, dataset: EvaluationSet
) -> tuple[StreamedFeatures[ImageFeatures], StreamedFeatures[TextFeatures]] | None:
    """Return the set's features in a bank; ``None`` where it has no bank, or one of other encoders."""
    return dataset.banked_rows(matcher) if isinstance(dataset, BankedRows) else None


def reported(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield ``items``; the log says every ten seconds how many of ``total`` are done."""
    last_report = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if done < total and time.monotonic() - last_report > SECONDS_BETWEEN_REPORTS:
            last_report = time.monotonic()
            log.info("%s: %d of %d", what, done, total)


def _stored(features: F, storage: Storage) -> F:
    return features.to(storage.device, storage.dtype or features.tokens.dtype)


def _from_bank(rows: StreamedFeatures[F], storage: Storage) -> F | StreamedFeatures[F]:
    """Return a bank's rows: to be read from there block by block, or taken into memory."""
    return _stored(rows[:], storage) if storage.spill is None else rows.in_blocks_of(storage.spill.block_bytes)
