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

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures
from lavis_dcd.matching.gather import ALONE, Ranks, gather_features

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Features)

SECONDS_BETWEEN_REPORTS = 10
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Storage:
    """Where encoded rows wait for their pairs; ``None`` leaves them as the encoder gave them."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def half_on_host(cls) -> Storage:
        """Half precision in host memory: for galleries that an accelerator cannot hold."""
        return cls("cpu", torch.float16)


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
    matcher: Matcher, batches: Iterable[Tensor], storage: Storage = Storage(), amp: str = "off"
) -> ImageFeatures:
    """Features of batches of preprocessed pictures ``[B, 3, H, W]``, in their order."""
    with scoring_mode(matcher, amp) as device:
        parts = [_stored(matcher.encode_images(batch.to(device)), storage) for batch in batches]
    return ImageFeatures.cat(parts)


def encode_captions(
    matcher: Matcher,
    texts: list[str],
    batch_size: int = 256,
    storage: Storage = Storage(),
    amp: str = "off",
    ranks: Ranks = ALONE,
) -> TextFeatures:
    """Features of ``texts``, in their order; encoded from short to long, which spends little on padding.

    Args:
        ranks: processes that deal the batches among themselves; each gets the features of all.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    dealt = [batches[rank :: ranks.size] for rank in range(ranks.size)]
    with scoring_mode(matcher, amp):
        # a process without a batch of its own encodes one all the same, for the features' shape
        parts = [
            _stored(matcher.encode_texts([texts[i] for i in batch]), storage)
            for batch in dealt[ranks.rank] or batches[:1]
        ]
    features = TextFeatures.cat(parts)
    if not ranks.alone:
        features = gather_features(features if dealt[ranks.rank] else features[:0], ranks)
        order = [i for of_rank in dealt for batch in of_rank for i in batch]
    return features[torch.tensor(order).argsort()]


def encode_dataset(
    matcher: Matcher,
    dataset: Any,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    *,
    storage: Storage = Storage(),
    amp: str = "off",
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[ImageFeatures, TextFeatures]:
    """Features of an evaluation set: its I pictures and T captions, in the set's order.

    Args:
        dataset: LAVIS's retrieval evaluation shape: items ``{"image", "index"}``, and ``text``, the captions.
            A set with ``banked_features(matcher)`` (see ``datasets.banked``) answers from its bank if it can.
        device: where the rows are kept unless ``storage`` says otherwise; the matcher's device by default.
        storage: where, and how precisely, the rows are kept.
        ranks: processes that share the work; each gets the pictures of ``ranks.share(I)`` only, and all captions.

    Raises:
        UserError: the set holds no picture or no caption.
    """
    if not len(dataset) or not len(dataset.text):
        raise UserError(f"the evaluation set {type(dataset).__name__} has no pictures or no captions")
    storage = Storage(storage.device or device, storage.dtype)
    banked = dataset.banked_features(matcher) if hasattr(dataset, "banked_features") else None
    if banked is not None:
        pictures = banked[0] if ranks.alone else banked[0][list(ranks.share(len(dataset)))]
        return _stored(pictures, storage), _stored(banked[1], storage)
    own = ranks.share(len(dataset))
    # without a picture of its own, a process encodes one all the same, for the features' shape
    read = dataset if ranks.alone else Subset(dataset, own or range(1))
    loader = DataLoader(read, batch_size=batch_size, num_workers=num_workers)
    batches = reported(loader, len(loader), "batches of pictures encoded", progress)
    images = encode_pictures(matcher, (batch["image"] for batch in batches), storage, amp)
    captions = encode_captions(matcher, list(dataset.text), 4 * batch_size, storage, amp, ranks)
    return images[: len(own)], captions


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
