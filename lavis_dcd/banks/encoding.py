"""Features of whole sets: batches through the encoders, kept where and as precisely as asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lavis_dcd.banks.row_store import RowsInMemory, Spill, SpilledRows, StreamedFeatures
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.processes import ALONE, ProcessGroup
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures, gather_features

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Features)

SECONDS_BETWEEN_REPORTS = 10
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Storage:
    """Where encoded rows wait for their pairs; ``None`` leaves them as the encoder gave them.

    Args:
        spill: in files of this folder, whatever ``device`` says; ``None`` keeps them in memory.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    spill: Spill | None = None

    @classmethod
    def half_on_host(cls) -> Storage:
        """Half precision in host memory: for galleries that an accelerator cannot hold."""
        return cls("cpu", torch.float16)

    def rows(self, count: int) -> RowsInMemory[Any] | SpilledRows[Any]:
        """Room for that many rows."""
        return RowsInMemory(count) if self.spill is None else self.spill.rows(count)


@contextmanager
def scoring_mode(matcher: Matcher, amp: str = "off") -> Iterator[torch.device]:
    """No gradients, evaluation mode, autocast if ``amp`` is bf16 or fp16; yields the matcher's device.

    Every sub-module gets its own training flag back, so a part that is pinned in eval mode stays there.

    Raises:
        UserError: ``amp`` is none of off, bf16, fp16.
    """
    if amp not in ("off", *AMP_TYPES):
        raise UserError(f"run.amp: {amp!r} is none of off, {', '.join(AMP_TYPES)}")
    device = device_of(matcher)
    modules = list(matcher.modules()) if isinstance(matcher, nn.Module) else []
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    dtype = AMP_TYPES.get(amp, torch.bfloat16)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=amp != "off"):
            yield device
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


@contextmanager
def autocast_to(device: torch.device, amp: str) -> Iterator[None]:
    """Autocast to "bf16" or "fp16"; with "off", whatever surrounds it stays as it is."""
    if amp == "off":
        yield
        return
    with torch.autocast(device.type, AMP_TYPES[amp]):
        yield


def device_of(matcher: Matcher) -> torch.device:
    """The device of the matcher's first parameter or buffer; the CPU when it has none."""
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
) -> ImageFeatures | StreamedFeatures[ImageFeatures]:
    """Features of batches of preprocessed pictures ``[B, 3, H, W]``, in their order.

    Args:
        count: pictures of all batches together; by default ``batches`` are read through before the first is encoded.
    """
    if count is None:
        batches = list(batches)
        count = sum(map(len, batches))
    kept, start = storage.rows(count), 0
    with scoring_mode(matcher, amp) as device:
        for batch in batches:
            kept.put(torch.arange(start, start + len(batch)), _stored(matcher.encode_images(batch.to(device)), storage))
            start += len(batch)
    return kept.all()


def encode_captions(
    matcher: Matcher,
    texts: list[str],
    batch_size: int = 256,
    storage: Storage = Storage(),
    amp: str = "off",
    ranks: ProcessGroup = ALONE,
) -> TextFeatures | StreamedFeatures[TextFeatures]:
    """Features of ``texts``, in their order; those of like lengths are encoded together, to spend little on padding.

    Args:
        ranks: processes that deal the batches among themselves; each gets the features of all.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    batches.reverse()  # the longest are likely among the first, so that rows seldom have to grow
    kept = storage.rows(len(texts))
    with scoring_mode(matcher, amp):
        for start in range(0, len(batches), ranks.size):
            dealt = batches[start : start + ranks.size]
            # a process without a batch of its own encodes one all the same, for the features' shape
            own = dealt[min(ranks.rank, len(dealt) - 1)]
            part = matcher.encode_texts([texts[i] for i in own])
            if not ranks.alone:
                part = gather_features(part if ranks.rank < len(dealt) else part[:0], ranks)
            kept.put(torch.tensor([i for batch in dealt for i in batch]), _stored(part, storage))
    return kept.all()


def encode_dataset(
    matcher: Matcher,
    dataset: Any,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    *,
    storage: Storage = Storage(),
    text_storage: Storage | None = None,
    amp: str = "off",
    progress: bool = False,
    ranks: ProcessGroup = ALONE,
) -> tuple[ImageFeatures | StreamedFeatures[ImageFeatures], TextFeatures | StreamedFeatures[TextFeatures]]:
    """Features of an evaluation set: its I pictures and T captions, in the set's order.

    Args:
        dataset: LAVIS's retrieval evaluation shape: items ``{"image", "index"}``, and ``text``, the captions.
            A set with ``banked_rows(matcher)`` (see ``banks.feature_sets``) answers from its bank if it can.
        device: where the rows are kept unless ``storage`` says otherwise; the matcher's device by default.
        storage: where, and how precisely, the rows are kept.
        text_storage: the same of captions; as ``storage`` by default.
        ranks: processes that share the work; each gets the pictures of ``ranks.share(I)`` only, and all captions.

    Raises:
        UserError: the set holds no picture or no caption; a disk to spill to is full.
    """
    if not len(dataset) or not len(dataset.text):
        raise UserError(f"the evaluation set {type(dataset).__name__} has no pictures or no captions")
    storage, text_storage = (
        Storage(given.device or device, given.dtype, given.spill) for given in (storage, text_storage or storage)
    )
    own = ranks.share(len(dataset))
    banked = dataset.banked_rows(matcher) if hasattr(dataset, "banked_rows") else None
    if banked is not None:
        return _from_bank(banked[0].only(own), storage), _from_bank(banked[1], text_storage)
    # without a picture of its own, a process encodes one all the same, for the features' shape
    read = dataset if ranks.alone else Subset(dataset, own or range(1))
    loader = DataLoader(read, batch_size=batch_size, num_workers=num_workers)
    batches = reported(loader, len(loader), "batches of pictures encoded", progress)
    images = encode_pictures(matcher, (batch["image"] for batch in batches), storage, amp, len(read))
    captions = encode_captions(matcher, list(dataset.text), 4 * batch_size, text_storage, amp, ranks)
    return images if own else images[:0], captions


def reported(items: Iterable[Any], total: int, what: str, progress: bool) -> Iterator[Any]:
    """``items``; with ``progress``, the log says every ten seconds how far it is."""
    told = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if progress and done < total and time.monotonic() - told > SECONDS_BETWEEN_REPORTS:
            told = time.monotonic()
            log.info("%s: %d of %d", what, done, total)


def _stored(features: F, storage: Storage) -> F:
    return features.to(storage.device, storage.dtype or features.tokens.dtype)


def _from_bank(rows: StreamedFeatures[F], storage: Storage) -> F | StreamedFeatures[F]:
    """A bank lies where it is: its rows are read from there block by block, or taken into memory."""
    return _stored(rows[:], storage) if storage.spill is None else rows.in_blocks_of(storage.spill.block_bytes)
