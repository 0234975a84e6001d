"""Hard candidates out of a score bank, with the teacher's scores, for every training sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import BoolTensor, FloatTensor, LongTensor, Tensor
from torch.utils.data import default_collate

from lavis_dcd.banks.score_bank import BankTable, ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.random_captions import WithCandidates, flat_texts
from lavis_dcd.distillation.candidates import DIRECTIONS, IMAGE_TO_TEXT, TEXT_TO_IMAGE, CandidatePool
from lavis_dcd.distillation.selection import Selection, select
from lavis_dcd.distillation.strategies import Draws, SelectionStrategy

SCORES = {direction: f"{direction}_scores" for direction in DIRECTIONS}


@dataclass(frozen=True)
class Choice:
    """The choice of a row's hard samples among those that the bank keeps, see ``distillation.selection.select``."""

    hard_negatives: int | None = 7
    strategy: str | SelectionStrategy = "hardest"
    margin: float | None = None


class BankCandidates(WithCandidates):
    """A training set whose samples carry K candidates per direction and the teacher's scores of them.

    A sample gains, for image_to_text, ``candidate_text`` (list of K strings, by view where there are several) and
    ``candidate_image_id`` (int64 ``[K]``, of their pictures); for text_to_image, ``candidate_image`` (list of K, each
    what the set's ``image`` is) and ``candidate_picture_id`` (int64 ``[K]``); and per direction
    ``<direction>_scores`` (float32 ``[1+K]``): the teacher's of the match, then of the candidates, in their order.
    A row with fewer than K repeats its own caption or picture, which is no negative of it and is masked later.

    The choice depends on (seed, epoch, index) alone, and without chance on the index alone.

    Args:
        dataset: a LAVIS ``RetrievalDataset``, a concatenation of some, or a wrapper with ``.dataset``.
        bank: of this set.
        directions: those that are trained.

    Raises:
        UserError: a bank of another number of rows, or without one of the directions.
    """

    def __init__(self, dataset: Any, bank: ScoreBank, directions: Sequence[str], choice: Choice, seed: int) -> None:
        super().__init__(dataset, seed)
        self.choice = choice
        missing = [direction for direction in directions if direction not in bank.tables]
        if missing or len(bank) != len(dataset):
            raise UserError(
                f"model.candidates: the score bank has {len(bank)} rows for {' and '.join(sorted(bank.tables))}, the "
                f"job needs {len(dataset)} for {' and '.join(directions)}; run: python -m lavis_dcd mine --cfg-path F"
            )
        self._tables = {direction: bank.tables[direction] for direction in directions}
        self._ids = torch.tensor(self._image_ids())

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self.dataset[index])
        for direction, table in self._tables.items():
            rows, scores = self._chosen(direction, table, index)
            ids = self._ids[rows]
            if direction == IMAGE_TO_TEXT:
                sample["candidate_text"] = self._captions(rows.tolist())
                sample["candidate_image_id"] = ids
            else:
                sample["candidate_image"] = self._pictures(rows.tolist(), index, sample["image"])
                sample["candidate_picture_id"] = ids
            sample[SCORES[direction]] = scores
        return sample

    def _pictures(self, rows: list[int], index: int, match: Any) -> list[Any]:
        # what only fills up is masked later, and is not worth a decoding
        return [match if row == index else self.dataset[row]["image"] for row in rows]

    def _chosen(self, direction: str, table: BankTable, index: int) -> tuple[Tensor, Tensor]:
        """Rows of the set, int64 ``[K]``, and scores, float32 ``[1+K]``."""
        candidates = table.candidates[index].long()
        rows = torch.cat([torch.tensor([index]), candidates.where(candidates >= 0, index)])
        selection = self._select(direction, rows, table.scores[index][None], index)
        columns = selection.text_rows[0]
        # a masked column points at the match
        return rows[columns[1:]], cast(Tensor, selection.teacher_scores)[0].clone()

    def _select(self, direction: str, rows: Tensor, scores: Tensor, index: int) -> Selection:
        choice, columns = self.choice, cast(LongTensor, torch.arange(len(rows))[None])
        pool = CandidatePool(columns, columns, self._valid(rows), direction)
        seeds = np.random.SeedSequence([self.seed, self.epoch, index, DIRECTIONS.index(direction)])
        draws = Draws(torch.Generator().manual_seed(int(seeds.generate_state(1)[0])))
        return select(pool, cast(FloatTensor, scores), choice.hard_negatives, choice.strategy, choice.margin, draws)

    def _valid(self, rows: Tensor) -> BoolTensor:
        """Bool ``[1, 1+C]``: the match, and rows of other pictures."""
        valid = self._ids[rows] != self._ids[rows[0]]
        valid[0] = True
        return cast(BoolTensor, valid[None])

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The inner set's batch with, flat and row-major, ``candidate_text`` (B * K strings) and ``candidate_image``
        (``[B * K, 3, H, W]``, or int64 ``[B * K]`` where pictures are rows of a feature bank), each by view where there
        are several; ids int64 ``[B, K]`` and scores float32 ``[B, 1+K]``.
        """
        tensors = {"candidate_image_id", "candidate_picture_id", *SCORES.values()}
        batch = self._inner_batch(samples, tensors | {"candidate_text", "candidate_image"})
        for key in sorted(tensors & set(samples[0])):
            batch[key] = torch.stack([sample[key] for sample in samples])
        if IMAGE_TO_TEXT in self._tables:
            batch["candidate_text"] = flat_texts(samples)
        if TEXT_TO_IMAGE in self._tables:
            batch["candidate_image"] = default_collate([p for sample in samples for p in sample["candidate_image"]])
        return batch
