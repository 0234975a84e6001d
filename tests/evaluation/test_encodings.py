"""Features of an evaluation: kept as long as they serve, and no more of them in memory than the setting allows."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stubs import LetterMatcher as Mixer
from stubs import NoiseSet

from lavis_dcd.banks.feature_bank import build_feature_bank
from lavis_dcd.banks.feature_sets import BankedEvaluationSet
from lavis_dcd.banks.row_store import StreamedFeatures
from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation import evaluator as evaluation
from lavis_dcd.evaluation.encodings import Encodings
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.features import Features

PICTURES = 20


class Numbers(NoiseSet):
    """Noise for every number, with two captions."""

    def __init__(self, count: int = PICTURES) -> None:
        super().__init__(4, [[f"{i} " + "word " * (i % 5) + w for w in ("shown", "here")] for i in range(count)])


def unchanged(matcher: Matcher, dataset: Any) -> Any:
    return dataset


TIMES = ("milliseconds_per_pair", "milliseconds_to_match", "milliseconds_to_embed_and_compare")


def no_time(*_: Any) -> float:
    return 0.0


def both_ways(
    matcher: Any, dataset: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, limit: float, **settings: Any
) -> list[Any]:
    """Evaluated with features in memory and on disk; the second must have had some there."""
    streamed: list[bool] = []
    for name in TIMES:
        monkeypatch.setattr(evaluation, name, no_time)
    take = Encodings.take

    def watched(self: Encodings, matcher: Matcher) -> Any:
        found = take(self, matcher)
        streamed[-1] |= any(isinstance(rows, StreamedFeatures) for rows in found)
        return found

    monkeypatch.setattr(Encodings, "take", watched)
    found = []
    for mb in (4096, limit):
        streamed.append(False)
        protocol = EvaluationProtocol(eval_memory_mb=mb, spill_folder=folder, batch_size=3, memory_mb=0.01, **settings)
        found.append(Evaluator(protocol).evaluate(matcher, dataset))
    assert streamed == [False, True]
    return found


def assert_equal(found: list[Any]) -> None:
    assert torch.equal(found[0].scores_i2t, found[1].scores_i2t)
    assert torch.equal(found[0].scores_t2i, found[1].scores_t2i)
    assert found[0].metrics == found[1].metrics


@pytest.mark.parametrize("limit", [1e-6, 0.004, 0.025])  # nothing fits; two pictures do; the pictures fit
@pytest.mark.parametrize("k_test", [None, 3])
@pytest.mark.parametrize("who", ["fusion", "dual", "ensemble"])
def test_scores_are_equal_to_the_bit(who, k_test, limit, tmp_path, monkeypatch) -> None:
    matcher = Ensemble([Mixer(1), Mixer(2, "dual"), Mixer(3)]) if who == "ensemble" else Mixer(1, who)
    assert_equal(both_ways(matcher, Numbers(), tmp_path, monkeypatch, limit, k_test=k_test))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("k_test", [None, 3])
def test_features_of_a_bank_stay_in_it(place, k_test, tmp_path, monkeypatch) -> None:
    matcher, plain = Mixer(0), Numbers()
    folder = tmp_path / "bank" if place == "disk" else None
    banked = BankedEvaluationSet(plain, build_feature_bank(matcher, {"val": plain}, folder=folder), "val")
    monkeypatch.setattr(matcher, "encode_images", lambda images: pytest.fail("encoded"))
    nowhere = tmp_path / "nothing is written here"
    assert_equal(both_ways(matcher, banked, nowhere, monkeypatch, 0.004, k_test=k_test))


def test_what_fits_stays_in_memory(tmp_path, caplog) -> None:
    numbers, matcher = Numbers(), Mixer(0)
    images, texts = Encodings([matcher], numbers, unchanged, EvaluationProtocol()).take(matcher)
    total = (images.nbytes + texts.nbytes) / 2**20
    assert images.nbytes < texts.nbytes

    def kinds(limit: float) -> list[bool]:
        protocol = EvaluationProtocol(eval_memory_mb=limit, spill_folder=tmp_path)
        with Encodings([matcher], numbers, unchanged, protocol) as encodings:
            found = encodings.take(matcher)
        return [isinstance(rows, StreamedFeatures) for rows in found]

    assert kinds(1.01 * total) == [False, False]
    with caplog.at_level(logging.INFO):
        assert kinds(0.95 * total) == [False, True]  # the pictures take less than half of the limit
    assert f"captions are read block by block from temporary files in {tmp_path}" in caplog.text
    assert kinds(1.5 * images.nbytes / 2**20) == [True, True]


def test_features_are_dropped_after_their_last_use() -> None:
    towers = Mixer(0).tower
    one, apart, other = Mixer(0, towers=towers), Mixer(2), Mixer(1, towers=towers)
    numbers = Numbers(3)
    encodings = Encodings([one, apart, other], numbers, unchanged, EvaluationProtocol())
    kept = []
    for member in (one, apart, other):
        encodings.take(member)
        kept.append([entry.matcher for entry in encodings._encoded])
    assert kept == [[one], [one], []]


def test_features_that_stay_count_when_others_come(tmp_path) -> None:
    """An ensemble's members together hold no more than the limit."""
    towers, numbers = Mixer(0).tower, Numbers()
    one, apart, other = Mixer(0, towers=towers), Mixer(2), Mixer(1, towers=towers)
    limit = (
        1.5 * sum(rows.nbytes for rows in Encodings([one], numbers, unchanged, EvaluationProtocol()).take(one)) / 2**20
    )
    protocol = EvaluationProtocol(eval_memory_mb=limit, spill_folder=tmp_path)
    with Encodings([one, apart, other], numbers, unchanged, protocol) as encodings:
        assert all(isinstance(rows, Features) for rows in encodings.take(one))
        assert all(isinstance(rows, StreamedFeatures) for rows in encodings.take(apart))
        assert all(isinstance(rows, Features) for rows in encodings.take(other))


def test_nothing_is_left_after_an_error(tmp_path, monkeypatch) -> None:
    matcher = Mixer(0)
    monkeypatch.setattr(matcher, "match", lambda *_: (_ for _ in ()).throw(RuntimeError("in the middle")))
    kept = []
    take = Encodings.take
    monkeypatch.setattr(Encodings, "take", lambda self, m: kept.append(take(self, m)) or kept[-1])
    with pytest.raises(RuntimeError, match="in the middle"):
        Evaluator(EvaluationProtocol(eval_memory_mb=1e-3, spill_folder=tmp_path)).evaluate(matcher, Numbers())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed file"):
        kept[0][0][:1]


def test_too_little_room_is_told_before_the_set_is_encoded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    numbers, read = Numbers(), []
    monkeypatch.setattr(Numbers, "__getitem__", lambda self, i: read.append(i) or {"image": torch.zeros(3, 4, 4)})
    with pytest.raises(UserError, match=r"run\.eval_memory_mb: .*they need .* are free"):
        Evaluator(EvaluationProtocol(eval_memory_mb=1e-3, spill_folder=tmp_path)).evaluate(Mixer(0), numbers)
    assert read == [0]


def test_an_empty_set_is_still_the_users_fault(tmp_path) -> None:
    with pytest.raises(UserError, match="has no pictures or no captions"):
        Evaluator(EvaluationProtocol(spill_folder=tmp_path)).evaluate(Mixer(0), Numbers(0))
