"""Frozen encoders run once: features of every distinct picture and caption of a job, in memory or on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.hashing import update_with_tensors
from lavis_dcd.datasets.bank_rows import Rows, read_rows
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.encoding import encode_captions, encode_pictures, reported
from lavis_dcd.matching.features import ImageFeatures, TextFeatures, padded

log = logging.getLogger(__name__)


@dataclass
class FeatureBank:
    """Features by picture and by caption.

    Texts are kept without padding: the tokens of all captions in one row, each caption a slice of it.

    Args:
        matcher: whose encoders made the features.
        tensors: ``image_tokens [N, n, D]``, ``text_tokens [S, D]``, ``text_starts`` and ``text_lengths [M]``
            int64; optionally ``image_mask [N, n]``, ``image_embeds [N, E]``, ``text_embeds [M, E]``.
        picture_rows: row of each picture, by its key.
        caption_rows: row of each caption, by its text.
    """

    matcher: Matcher
    tensors: dict[str, Tensor]
    picture_rows: dict[str, int]
    caption_rows: dict[str, int]

    def images(self, rows: Tensor | Sequence[int]) -> ImageFeatures:
        """Features of the pictures ``rows`` (see ``picture_rows``) as they are kept, one row each."""
        rows = torch.as_tensor(rows)
        mask = self.tensors.get("image_mask")
        picked = (self.tensors["image_tokens"][rows], None if mask is None else mask[rows])
        return ImageFeatures(*picked, self._embeds("image_embeds", rows)).trimmed()

    def texts(self, captions: Sequence[str]) -> TextFeatures:
        """Features of ``captions`` as they are kept, padded to the longest of them.

        Raises:
            KeyError: a caption that was in none of the sets the bank was built from.
        """
        rows = torch.tensor([self.caption_rows[caption] for caption in captions])
        lengths = self.tensors["text_lengths"][rows]
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        where = (self.tensors["text_starts"][rows][:, None] + columns).masked_fill(~mask, 0)
        tokens = self.tensors["text_tokens"][where].masked_fill(~mask[..., None], 0)
        return TextFeatures(tokens, mask, self._embeds("text_embeds", rows))

    def serves(self, matcher: Matcher) -> bool:
        """Whether ``matcher`` would make the same features."""
        return matcher is self.matcher or matcher.shares_encoders_with(self.matcher)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def _embeds(self, name: str, rows: Tensor) -> Tensor | None:
        return self.tensors[name][rows] if name in self.tensors else None


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
) -> FeatureBank:
    """Encodes every distinct picture and caption of ``datasets`` once.

    The pictures go through each set's own processor, which must be deterministic: give training sets the
    evaluation processor first (``set_processors``).

    Args:
        datasets: training and evaluation sets of LAVIS's retrieval shapes, by name.
        dtype: how the features are kept.
        folder: where the bank is kept and looked for, in a file named by a hash of everything that shapes it;
            ``None`` keeps it in memory only.
        fingerprint: of the encoders' weights (see :func:`weights_fingerprint`).

    Raises:
        UserError: the encoders learn, a set has another shape, or features do not fit ``dtype``.
    """
    if not matcher.encoders_frozen():
        raise UserError(
            f"run.cache_features: the encoders of {type(matcher).__name__} learn, so features cannot be "
            "kept; freeze them (vision.freeze and text.freeze, freeze_embeddings, or freeze: [encoders], as the model "
            "has it) or set run.cache_features=off"
        )
    rows = {name: read_rows(dataset, name) for name, dataset in datasets.items()}
    pictures: dict[str, tuple[str, int]] = {}
    for name, row in rows.items():
        for index, key in enumerate(row.pictures):
            pictures.setdefault(key, (name, index))
    captions = sorted({caption for row in rows.values() for caption in row.captions})
    picture_rows = {key: row for row, key in enumerate(pictures)}
    caption_rows = {caption: row for row, caption in enumerate(captions)}
    path = None
    if folder is not None:
        path = Path(folder) / f"{_key(datasets, rows, captions, fingerprint, dtype, amp)}.safetensors"
        if path.is_file():
            log.info("features of %d pictures and %d captions: %s", len(pictures), len(captions), path)
            return FeatureBank(matcher, load_file(str(path)), picture_rows, caption_rows)
    source = _Pictures(datasets, list(pictures.values()))
    loader = DataLoader(source, batch_size=batch_size, num_workers=num_workers)
    tensors = _encode_all_pictures(matcher, loader, len(source), dtype, amp)
    tensors |= _encode_all_captions(matcher, captions, 4 * batch_size, dtype, amp)
    _check_finite(tensors, dtype)
    if path is not None:
        _save(tensors, path)
    return FeatureBank(matcher, tensors, picture_rows, caption_rows)


def weights_fingerprint(modules: Iterable[nn.Module]) -> str:
    """A hash of the modules' tensors, the same wherever they lie."""
    digest = hashlib.sha256()
    for module in modules:
        update_with_tensors(digest, module.state_dict().items())
    return digest.hexdigest()


class _Pictures(Dataset):
    """The pictures at (set name, index), through their sets' processors."""

    def __init__(self, datasets: Mapping[str, Dataset], places: list[tuple[str, int]]) -> None:
        self.datasets, self.places = datasets, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        name, row = self.places[index]
        return self.datasets[name][row]["image"]


def _encode_all_pictures(
    matcher: Matcher, loader: DataLoader, count: int, dtype: torch.dtype, amp: str
) -> dict[str, Tensor]:
    """The bank's image tensors, filled in place: one copy of the features at any time."""
    kept: dict[str, Tensor] = {}
    start = 0
    for batch in reported(loader, len(loader), "batches of pictures encoded", True):
        features = encode_pictures(matcher, [batch], amp=amp).to("cpu", dtype)
        named = {"tokens": features.tokens, "mask": features.mask, "embeds": features.embeds}
        for name, part in ((f"image_{name}", part) for name, part in named.items() if part is not None):
            if name not in kept:
                kept[name] = torch.empty(count, *part.shape[1:], dtype=part.dtype)
            if name != "image_embeds" and part.shape[1] != kept[name].shape[1]:  # pictures of other sizes
                longest = max(part.shape[1], kept[name].shape[1])
                kept[name], part = padded(kept[name], longest), padded(part, longest)
            kept[name][start : start + len(part)] = part
        if not start:
            log.info("features of %d pictures: %.0f MB", count, sum(t.nbytes for t in kept.values()) / 1e6)
        start += len(features)
    return kept


def _encode_all_captions(
    matcher: Matcher, captions: list[str], batch_size: int, dtype: torch.dtype, amp: str
) -> dict[str, Tensor]:
    """The bank's text tensors: the real tokens only."""
    tokens, lengths, embeds = [], [], []
    starts = range(0, len(captions), batch_size)
    for start in reported(starts, len(starts), "batches of captions encoded", True):
        features = encode_captions(matcher, captions[start : start + batch_size], batch_size, amp=amp)
        features = features.to("cpu", dtype)
        mask = features.mask
        if mask is None:
            mask = torch.ones(features.tokens.shape[:2], dtype=torch.bool)
        if (mask.int().diff(dim=1) > 0).any():
            raise UserError(
                f"run.cache_features: {type(matcher).__name__} pads its texts on the left, which the cache "
                "cannot keep; set run.cache_features=off"
            )
        tokens.append(features.tokens[mask])
        lengths.append(mask.sum(dim=1))
        if features.embeds is not None:
            embeds.append(features.embeds)
    length = torch.cat(lengths)
    starts_of_captions = length.cumsum(0) - length
    kept = {"text_tokens": torch.cat(tokens), "text_lengths": length, "text_starts": starts_of_captions}
    log.info("features of %d captions: %.0f MB", len(captions), kept["text_tokens"].nbytes / 1e6)
    return kept | ({"text_embeds": torch.cat(embeds)} if embeds else {})


def _key(
    datasets: Mapping[str, Dataset],
    rows: Mapping[str, Rows],
    captions: list[str],
    fingerprint: str,
    dtype: torch.dtype,
    amp: str,
) -> str:
    """A hash of the encoders, the pictures (with their files' sizes and times), processors and captions."""
    digest = hashlib.sha256(repr((fingerprint, str(dtype), amp, captions)).encode())
    for name, row in rows.items():
        first = datasets[name][0]["image"]  # shows a changed processor, whatever it is
        digest.update(first.float().contiguous().numpy().tobytes())
        for key in dict.fromkeys(row.pictures):
            stat = os.stat(key) if os.path.isfile(key) else None
            digest.update(repr((key, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()[:32]


def _check_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all(torch.isfinite(part).all() for part in tensor.split(1024)):
            raise UserError(f"run.cache_features: {name} do not fit {dtype}; set run.cache_features=off")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    size = sum(t.nbytes for t in tensors.values())
    log.info("keeping %.0f MB of features in %s", size / 1e6, path)
    try:
        save_file(tensors, str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
