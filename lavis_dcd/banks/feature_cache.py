"""``run.cache_features``: a job's data sets answer from a bank of features, or the reason why they cannot."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from lavis_dcd.banks.encoding import encode_captions, encode_pictures
from lavis_dcd.banks.feature_bank import build_feature_bank, read_rows, weights_fingerprint
from lavis_dcd.banks.feature_sets import BankedEvaluationSet, BankedTrainingSet
from lavis_dcd.banks.shards import Shard
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import cache_root, update_with_tensors
from lavis_dcd.common.manifest import digest_of
from lavis_dcd.common.processes import main_process_first
from lavis_dcd.common.seeding import rng_state, seed_host, set_rng_state
from lavis_dcd.config.run_section import EvaluationProtocol, RunConfig
from lavis_dcd.datasets.tree import is_evaluation_set, plain_sets
from lavis_dcd.matching.contract import Matcher

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Draws that are compared. A processor that changes one picture in ten escapes 96 of them once in 25,000 times.
_DRAWS = 96
_QUIET_DRAWS = 4  # where nothing was taken from the common generators
_SHOWN = 16  # captions per set, the longest, by which encoders that do not tell what they are show it
_ITEMS = 4  # a change may not show in every picture: a mirrored symmetrical one


def with_kept_features(
    datasets: Mapping[str, Any], matchers: Mapping[str, Matcher], views: Collection[str], run: RunConfig
) -> dict[str, Any]:
    """``datasets`` by split, answering from a feature bank built as ``run`` says.

    Args:
        matchers: of the job, by name; all with the same encoders.
        views: names of those that read pictures in their own way.
        run: ``cache_features`` is memory or disk; ``cache_dtype``, ``evaluate`` and the evaluation protocol count too.

    Raises:
        UserError: the encoders learn, or the matchers do not share them, or read pictures differently; a training
            set's processors draw at random; the disk is too small.
    """
    matcher = one_with_shared_encoders(matchers)
    if views:
        raise UserError(
            f"run.cache_features: the {', '.join(views)} would read kept features of pictures that "
            "went through the data set's processors, not its own preprocess; take that out, or set it to off"
        )
    if run.evaluate:  # nothing will be trained on
        datasets = {split: dataset for split, dataset in datasets.items() if is_evaluation_set(dataset)}
    of_splits = [plain_sets(dataset, split) for split, dataset in datasets.items()]
    plain = {name: dataset for of_split in of_splits for name, dataset in of_split.items()}
    refuse_random_readings(plain)
    protocol, on_disk = EvaluationProtocol.of_run(run), run.cache_features == "disk"
    build = partial(
        build_feature_bank,
        matcher,
        plain,
        protocol.batch_size,
        _dtype(run.cache_dtype),
        folder=cache_root() / "dcd_features" if on_disk else None,
        fingerprint=encoders_fingerprint(matcher, plain, protocol.amp) if on_disk else "",
        num_workers=protocol.num_workers,
        amp=protocol.amp,
        picture_content=run.picture_content,
    )
    bank = main_process_first(build) if on_disk else build()
    return {
        split: BankedEvaluationSet(dataset, bank, split)
        if is_evaluation_set(dataset)
        else BankedTrainingSet(dataset, bank, split)
        for split, dataset in datasets.items()
    }


def encoders_fingerprint(matcher: Matcher, datasets: Mapping[str, Any], amp: str) -> str:
    """Return a hash of all that shapes the encoders' features.

    Encoders without a signature show what they are: settings and a tokenizer are not among their weights, so that the
    features of some pictures and captions count, too. These may differ in their last bits from one machine to another,
    which then has a bank of its own.

    Args:
        datasets: plain sets by name.
    """
    signature = matcher.encoder_signature()
    if signature is not None:
        return signature
    shown = []
    for name, dataset in datasets.items():
        captions = sorted(set(read_rows(dataset, name).captions), key=lambda caption: (len(caption), caption))
        texts = encode_captions(matcher, captions[-_SHOWN:], amp=amp)[:]
        images = encode_pictures(matcher, [dataset[0]["image"][None]], amp=amp)[:]
        shown += [Shard.of(features).named() for features in (texts, images)]
    digest = hashlib.sha256()
    update_with_tensors(digest, [item for named in shown for item in named.items()])
    return digest_of([weights_fingerprint(matcher.encoder_modules()), digest.hexdigest()])


def one_with_shared_encoders(matchers: Mapping[str, Matcher]) -> Matcher:
    """The learner, whose encoders must be those of all matchers.

    Raises:
        UserError: some matcher has encoders of its own.
    """
    learner = matchers.get("student") or next(iter(matchers.values()))
    for name, other in matchers.items():
        if other is not learner and not other.shares_encoders_with(learner):
            raise UserError(
                f"run.cache_features: the {name} has encoders of its own, and kept features serve "
                "one pair of encoders only; set run.cache_features=off, or let the student share the teacher's "
                "(model.share_encoders=true)"
            )
    return learner


def refuse_random_readings(datasets: Mapping[str, Any]) -> None:
    """Kept features are of one reading of each picture and caption, so every reading must give the same.

    Args:
        datasets: plain sets by name; those for evaluation pass.

    Raises:
        UserError: one line per training set and processor that gives several readings of an item.
    """
    faults = []
    for name, dataset in datasets.items():
        if is_evaluation_set(dataset) or not getattr(dataset, "annotation", None):
            continue
        readings = {
            "vis_processor": lambda row, of=dataset: of[row]["image"],
            "text_processor": lambda row, of=dataset: of.text_processor(of.annotation[row]["caption"]),
        }
        for kind, read in readings.items():
            if draws_at_random(read, len(dataset)):
                processor = type(getattr(dataset, kind, None)).__name__
                faults.append(
                    f"run.cache_features: the {kind} of {name} ({processor}) draws at random, and kept features are of "
                    f"one reading; take the augmentation out of datasets.*.{kind}.train (the evaluation's processor "
                    "has none), or set run.cache_features=off"
                )
    if faults:
        raise UserError(faults)


def draws_at_random(read: Callable[[int], Any], count: int) -> bool:
    """Return whether ``read(row)`` of some of ``count`` rows gives several results under several seeds.

    The generators of Python, NumPy and torch are as before afterwards.
    """
    before = rng_state()
    try:
        rows = range(0, count, -(-count // _ITEMS))
        return any(_differs(read, row, seed=number * _DRAWS) for number, row in enumerate(rows))
    finally:
        set_rng_state(before)


def _differs(read: Callable[[int], Any], row: int, seed: int) -> bool:
    seed_host(seed)
    untouched = _host_state()
    first = read(row)
    draws = _QUIET_DRAWS if _host_state() == untouched else _DRAWS // _ITEMS
    for draw in range(1, draws):
        seed_host(seed + draw)
        if not _equal(read(row), first):
            return True
    return False


def _host_state() -> tuple[Any, ...]:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(keys).tobytes(), position, torch.get_rng_state().numpy().tobytes()


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    return bool(first == second)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"run.cache_dtype: {name!r} is none of {', '.join(DTYPES)}")
    return DTYPES[name]
