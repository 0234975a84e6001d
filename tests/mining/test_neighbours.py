"""The neighbours of a training set's pictures, against every pair scored one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_sets import captioned
from stubs import LetterMatcher, StubMatcher

from lavis_dcd.banks.feature_bank import build_feature_bank
from lavis_dcd.banks.feature_sets import BankedTrainingSet
from lavis_dcd.banks.score_bank import BankTable, ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.config.batches_section import BatchesConfig
from lavis_dcd.datasets.rows import RetrievalRows
from lavis_dcd.datasets.views import View
from lavis_dcd.distillation.candidates import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.mining import neighbours
from lavis_dcd.mining.joint_space import JointSpace
from lavis_dcd.mining.neighbours import (
    nearest_by_bank,
    nearest_pictures,
    neighbours_by_bank,
    neighbours_by_teacher,
)
from lavis_dcd.mining.pools import Pairing
from lavis_dcd.mining.scores import MiningResources
from lavis_dcd.models.dcd.config import DcdConfig

COUNTS = (2, 1, 3, 2, 1, 4, 2, 1)
RESOURCES = MiningResources(batch_size=3)
TWO_TEACHERS = DcdConfig(teachers=[{"arch": "a"}, {"arch": "b"}])


class Noise(RetrievalRows):
    """Pictures of noise, by their number."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {
            "image": self.vis_processor(self.img_ids[row["image_id"]]),
            "text_input": self.text_processor(row["caption"]),
            "image_id": self.img_ids[row["image_id"]],
        }


def noise(number: int) -> torch.Tensor:
    return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(number))


class Seen:
    """A processor that makes noise of a picture's number."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def __call__(self, number: int) -> torch.Tensor:
        return noise(number + self.shift)


def training_set(counts: tuple[int, ...] = COUNTS) -> Noise:
    train = captioned(*counts, cls=Noise, text=str.lower)
    train.vis_processor = Seen()
    return train


@pytest.fixture(autouse=True)
def _views(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teachers read through the set's own processors, without sections that name a registered model."""

    def views(config: DcdConfig, datasets: dict[str, Any]) -> list[View]:
        view = View(vis_eval=datasets["train"].vis_processor, text_eval=datasets["train"].text_processor)
        return [view] * len(config.teacher_sections)

    monkeypatch.setattr(neighbours, "teacher_views", views)


def vectors_of(matcher: LetterMatcher, train: Noise) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Every picture's vector, and those of its captions, one at a time."""
    images, captions = [], []
    for number in range(len(train.img_ids)):
        images.append(matcher.embed_images(matcher.encode_images(noise(number)[None]))[0])
        texts = [row["caption"].lower() for row in train.annotation if train.img_ids[row["image_id"]] == number]
        captions.append([matcher.embed_texts(matcher.encode_texts([text]))[0] for text in texts])
    return torch.stack(images).detach(), [[vector.detach() for vector in vectors] for vectors in captions]


def slow_scores(matcher: LetterMatcher, train: Noise) -> list[list[float]]:
    """The mean score of every picture with every other one's captions."""
    images, captions = vectors_of(matcher, train)
    return [[sum(float(image @ text) for text in texts) / len(texts) for texts in captions] for image in images]


def slow_nearness(scores: list[list[float]]) -> torch.Tensor:
    return torch.tensor([[(scores[i][j] + scores[j][i]) / 2 for j in range(len(scores))] for i in range(len(scores))])


def assert_nearest(nearest: torch.Tensor, near: torch.Tensor, count: int) -> None:
    """The nearness of those that were chosen is the highest there is, in order."""
    near = near.double().clone()
    near.fill_diagonal_(-math.inf)
    expected = near.sort(dim=1, descending=True).values[:, :count]
    torch.testing.assert_close(near.gather(1, nearest.long()), expected, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == count for row in nearest.tolist())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("tile", [neighbours.TILE_MB, 1e-5])
def test_neighbours_by_a_teacher_are_those_of_all_pairs(kept, tile, monkeypatch):
    monkeypatch.setattr(neighbours, "TILE_MB", tile)
    train, matcher = training_set(), LetterMatcher(seed=1, family="dual")
    read: Any = train
    if kept:
        read = BankedTrainingSet(train, build_feature_bank(matcher, {"train": train}, 2, torch.float32))
    config = DcdConfig(teacher={"arch": "a"})
    table = neighbours_by_teacher(BatchesConfig(neighbours=4), matcher, config, {"train": train}, read, RESOURCES)
    assert matcher.pictures == 8  # each encoded once; those of kept features when they were made
    assert table.picture_of_row.tolist() == [i for i, count in enumerate(COUNTS) for _ in range(count)]
    assert table.nearest.shape == (8, 4)
    assert_nearest(table.nearest, slow_nearness(slow_scores(matcher, train)), 4)


def test_several_teachers_count_by_their_spread():
    train = training_set()
    one, two = LetterMatcher(seed=1), LetterMatcher(seed=2)
    teacher = Ensemble([one, two], [1.0, 3.0])
    table = neighbours_by_teacher(
        BatchesConfig(neighbours=7), teacher, TWO_TEACHERS, {"train": train}, train, RESOURCES
    )
    total = torch.zeros(8, 8)
    for matcher, weight in ((one, 1.0), (two, 3.0)):
        scores = torch.tensor(slow_scores(matcher, train))
        spread = scores[~torch.eye(8, dtype=torch.bool)].std(unbiased=False)
        total += weight * slow_nearness(scores.tolist()) / spread
    assert_nearest(table.nearest, total, 7)


def test_a_teacher_without_weight_has_no_say_and_is_not_run():
    train = training_set()
    one, two = LetterMatcher(seed=1), LetterMatcher(seed=2)
    teacher = Ensemble([one, two], [1.0, 0.0])
    table = neighbours_by_teacher(BatchesConfig(), teacher, TWO_TEACHERS, {"train": train}, train, RESOURCES)
    assert_nearest(table.nearest, slow_nearness(slow_scores(one, train)), 7)
    assert two.pictures == 0


def test_teachers_that_share_their_encoders_run_them_once():
    train, one = training_set(), LetterMatcher(seed=1)
    two = LetterMatcher(seed=2, towers=one.tower)
    teacher = Ensemble([one, two])
    neighbours_by_teacher(BatchesConfig(), teacher, TWO_TEACHERS, {"train": train}, train, RESOURCES)
    assert (one.pictures, two.pictures) == (8, 0)


def test_the_margin_parts_pictures_that_score_as_their_own():
    train, matcher = training_set(), LetterMatcher(seed=1)
    scores = slow_scores(matcher, train)
    near = slow_nearness(scores)
    over = torch.tensor([[near[i, j] - min(scores[i][i], scores[j][j]) for j in range(8)] for i in range(8)])
    over = (over + over.T) / 2
    margin = float(over[~torch.eye(8, dtype=torch.bool)].median()) + 1e-4
    expected = {(i, j) for i in range(8) for j in range(i + 1, 8) if over[i, j] > margin}
    assert 3 < len(expected) < 25
    batches = BatchesConfig(margin=margin, guard=False)
    config = DcdConfig(teacher={"arch": "a"})
    table = neighbours_by_teacher(batches, matcher, config, {"train": train}, train, RESOURCES)
    assert {tuple(pair) for pair in table.apart.view(-1, 2).tolist()} == expected


def test_the_guard_is_in_the_table_unless_it_is_off():
    train, matcher, config = training_set((1, 1, 1)), LetterMatcher(seed=1), DcdConfig(teacher={"arch": "a"})
    for row in train.annotation[:2]:
        row["caption"] = "Equal!" if row is train.annotation[0] else "equal"
    tables = [
        neighbours_by_teacher(BatchesConfig(guard=on), matcher, config, {"train": train}, train, RESOURCES)
        for on in (True, False)
    ]
    assert [table.apart.tolist() for table in tables] == [[0, 1], []]


def test_a_teacher_without_a_joint_space_is_sent_to_a_bank():
    with pytest.raises(UserError, match=r"run\.batches\.by: teacher, but StubMatcher has no joint space .*by=bank"):
        train = training_set()
        config = DcdConfig(teacher={"arch": "a"})
        neighbours_by_teacher(BatchesConfig(), StubMatcher(), config, {"train": train}, train, RESOURCES)


def test_scores_that_are_no_numbers_are_refused():
    train, matcher = training_set(), LetterMatcher(seed=1)
    torch.nn.init.constant_(matcher.vision.weight, math.nan)
    with pytest.raises(UserError, match="not finite numbers"):
        config = DcdConfig(teacher={"arch": "a"})
        neighbours_by_teacher(BatchesConfig(), matcher, config, {"train": train}, train, RESOURCES)


def test_a_set_without_captions_is_refused():
    with pytest.raises(UserError, match="retrieval shape"):
        config = DcdConfig(teacher={"arch": "a"})
        train = torch.utils.data.TensorDataset(torch.zeros(3))
        neighbours_by_teacher(BatchesConfig(), LetterMatcher(seed=1), config, {"train": train}, train, RESOURCES)


def test_a_picture_with_several_vectors():
    """As BLIP-2's: the best of its vectors, with the mean of the captions'."""

    class Several(StubMatcher):
        def joint_scores(self, image_embeds, text_embeds):
            return (image_embeds @ text_embeds.T).amax(dim=1)

    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(6, 3, 4, generator=generator), torch.randn(6, 4, generator=generator)
    nearest, pairs = nearest_pictures([JointSpace(Several(), images, captions)], [1.0], 5)
    scores = [[max(float(v @ captions[j]) for v in images[i]) for j in range(6)] for i in range(6)]
    assert_nearest(nearest, slow_nearness(scores), 5)
    assert pairs.shape == (0, 2)


# -- by a score bank


@st.composite
def banks(draw):
    """A pairing, and tables of random candidates of other pictures with random scores."""
    counts = draw(st.lists(st.integers(1, 3), min_size=3, max_size=7))
    image_of_row = [i for i, count in enumerate(counts) for _ in range(count)]
    pairing = Pairing.of(image_of_row, [f"caption {n}" for n in range(len(image_of_row))])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tables = {}
    for direction in (IMAGE_TO_TEXT, TEXT_TO_IMAGE):
        candidates, scores = [], []
        for row, image in enumerate(image_of_row):
            if direction == IMAGE_TO_TEXT:
                query = torch.Generator().manual_seed(image)  # the rows of a picture have the same
                others = [r for r, other in enumerate(image_of_row) if other != image]
            else:
                query = torch.Generator().manual_seed(1000 + row)
                others = [int(r) for r in pairing.row_of_image if image_of_row[int(r)] != image]
            order = torch.randperm(len(others), generator=query)[:4].tolist()
            values = torch.rand(4, generator=query).sort(descending=True).values
            candidates.append([others[o] for o in order] + [-1] * (4 - len(order)))
            scores.append([1.0, *values[: len(order)].tolist(), *[0.0] * (4 - len(order))])
        tables[direction] = BankTable(torch.tensor(candidates, dtype=torch.int32), torch.tensor(scores))
    del generator
    return pairing, tables


def slow_by_bank(pairing: Pairing, tables: dict[str, BankTable]) -> dict[tuple[int, int], float]:
    of_row = pairing.image_of_row.tolist()
    near: dict[tuple[int, int], float] = {}
    for direction, table in tables.items():
        seen = set()
        for row, (candidates, scores) in enumerate(zip(table.candidates.tolist(), table.scores.tolist(), strict=True)):
            if direction == IMAGE_TO_TEXT and of_row[row] in seen:
                continue
            seen.add(of_row[row])
            valid = [(c, s) for c, s in zip(candidates, scores[1:], strict=True) if c >= 0]
            for candidate, score in valid:
                one, other = of_row[row], of_row[candidate]
                captions = of_row.count(other if direction == IMAGE_TO_TEXT else one)
                value = (score - min(s for _, s in valid)) / captions
                for pair in ((one, other), (other, one)):
                    near[pair] = near.get(pair, 0.0) + value
    return near


@given(banks(), st.integers(1, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_neighbours_by_a_bank_are_those_of_its_scores(case, count, in_blocks):
    pairing, tables = case
    entries = neighbours._ENTRIES
    neighbours._ENTRIES = 7 if in_blocks else entries
    try:
        nearest = nearest_by_bank(tables, pairing, count)
    finally:
        neighbours._ENTRIES = entries
    near = slow_by_bank(pairing, tables)
    for image, row in enumerate(nearest.tolist()):
        found = [other for other in row if other >= 0]
        of_image = sorted((value for (one, _), value in near.items() if one == image), reverse=True)
        expected = of_image[: min(count, pairing.images - 1)]
        assert [near[image, other] for other in found] == pytest.approx(expected, abs=1e-6)
        assert row == found + [-1] * (len(row) - len(found)) and len(set(found)) == len(found)


def test_a_bank_of_other_rows_is_refused():
    table = BankTable(torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 2))
    bank = ScoreBank(Identity({}, {}, {}), {}, {IMAGE_TO_TEXT: table})
    with pytest.raises(UserError, match=r"run\.batches\.by: bank, but the score bank has 3 rows and .* set 16"):
        neighbours_by_bank(BatchesConfig(by="bank"), bank, {"train": training_set()})
