"""Joint-space vectors of a frozen dual teacher, computed once for every picture and caption of a feature bank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import autocast_to, device_of, reported
from lavis_dcd.banks.feature_bank import FeatureBank
from lavis_dcd.common.texts import size_in_words
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import Features, ImageFeatures, TextFeatures

log = logging.getLogger(__name__)

_BATCH = 512  # rows at a time, always the same ones together: a resumed job has the vectors of the first, bit for bit


class KeptVectors:
    """The vectors of one teacher, by the rows of a bank.

    Args:
        matcher: frozen, in evaluation mode, with ``scores_by_embeds`` and the encoders of the bank.
        bank: all of whose rows are embedded here, in their order.
        amp: "off", or the precision in which the matcher embeds ("bf16"); the vectors are float32.
    """

    def __init__(self, matcher: Matcher, bank: FeatureBank, amp: str = "off") -> None:
        self._matcher, self._amp = matcher, amp
        self._images = self._embedded(len(bank.image_store), bank.images, matcher.embed_images, "pictures")
        self._texts = self._embedded(len(bank.text_store), bank.texts_at, matcher.embed_texts, "captions")
        log.info(
            "the teacher's vectors of %s pictures and %s captions are kept: %s",
            f"{len(self._images):,}",
            f"{len(self._texts):,}",
            size_in_words(self._images.nbytes + self._texts.nbytes),
        )

    @staticmethod
    def nbytes(matcher: Matcher, bank: FeatureBank) -> int:
        """Return the bytes that the vectors of this matcher would take."""
        with torch.no_grad():
            width = matcher.embed_images(bank.images([0]).to(device_of(matcher)).float()).shape[1]
        return 4 * width * (len(bank.image_store) + len(bank.text_store))

    def scores(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Return the teacher's scores ``[I, T]`` of all pairs, float32, up to rounding those of ``match_all``.

        Raises:
            ValueError: features that come out of no bank.
        """
        return self._matcher.match_embeds(_kept(images, self._images), _kept(texts, self._texts))

    @torch.no_grad()
    def _embedded(
        self, count: int, read: Callable[[Sequence[int]], Features], embed: Callable[..., Tensor], items: str
    ) -> Tensor:
        device, table = device_of(self._matcher), None
        starts = range(0, count, _BATCH)
        for start in reported(starts, len(starts), f"batches of {items} embedded by the teacher"):
            features = read(range(start, min(start + _BATCH, count))).to(device).float()
            with autocast_to(device, self._amp):
                embeds = embed(features).float().cpu()
            if table is None:
                table = embeds.new_empty(count, embeds.shape[1])
            table[start : start + len(embeds)] = embeds
        assert table is not None
        return table


def _kept(features: Features, table: Tensor) -> Tensor:
    """Return the vectors in ``table [rows, D]`` of features out of the bank, on their device."""
    if features.rows is None:
        raise ValueError("the features come out of no bank, so no vectors of theirs are kept")
    return table[features.rows.to(table.device)].to(features.device)
