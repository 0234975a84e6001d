"""The closing table: its figures by hand, and what it advises."""

from __future__ import annotations

import json

import torch

from lavis_dcd.banks.score_bank import BankTable
from lavis_dcd.mining.report import margins_of, report

SCORES = torch.tensor([
    [2.0, 1.0, 0.0],
    [2.0, 2.0, 1.0],  # a tie is a misranking
    [1.0, 4.0, 3.0],
    [0.0, -1.0, 0.0],  # one candidate
    [9.0, 0.0, 0.0],  # none
])  # fmt: skip
CANDIDATES = torch.tensor([[1, 2], [0, 2], [0, 1], [0, -1], [-1, -1]], dtype=torch.int32)


def tables() -> dict[str, BankTable]:
    return {"image_to_text": BankTable(CANDIDATES, SCORES),
            "text_to_image": BankTable(CANDIDATES.clone(), SCORES - 5 * torch.eye(5)[:, :3])}  # fmt: skip


def test_figures(tmp_path):
    found = report({"image_to_text": tables()["image_to_text"]}, "python -m x")
    part = found.directions["image_to_text"]
    assert (part.queries, part.candidates, part.misranked) == (4, 7, 0.5)
    assert part.match == [0.0, 1.0, 2.0, 2.0, 2.0] and part.hardest == [-1.0, 1.0, 2.0, 4.0, 4.0]
    # above the match: 3 and 2
    assert [step.margin for step in found.margins] == [0.0, 3.0]
    assert [step.candidates["image_to_text"] for step in found.margins] == [2, 0]
    assert [step.queries["image_to_text"] for step in found.margins] == [1, 0]
    found.save(tmp_path)
    text = (tmp_path / "table.txt").read_text()
    assert "50.0 % of them" in text and text.endswith("train from it: python -m x\n")
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["directions"]["image_to_text"]["misranked"] == 0.5
    assert kept["margins"][0]["candidates"] == {"image_to_text": 2}


def test_both_directions_share_the_ladder():
    found = report(tables())
    assert found.margins[0].margin == 0.0
    for step in found.margins:
        for direction, table in tables().items():
            excess = [
                float(s - row[0]) for row, names in zip(table.scores, table.candidates, strict=True)
                for s, name in zip(row[1:], names, strict=True) if name >= 0
            ]  # fmt: skip
            assert step.candidates[direction] == sum(value > step.margin for value in excess)
    assert "selection.margin=" in found.advice


def test_a_teacher_that_ranks_right_needs_no_margin():
    table = BankTable(CANDIDATES[:1], SCORES[:1])
    found = report({"image_to_text": table})
    assert [step.margin for step in found.margins] == [0.0]
    assert "0.0 % of the queries" in found.advice and "not needed" in found.advice


def test_no_candidates_at_all():
    table = BankTable(CANDIDATES[4:], SCORES[4:])
    found = report({"image_to_text": table})
    assert found.advice.startswith("no query has a candidate") and found.lines()


def test_margins_are_round_and_grow():
    assert margins_of(torch.empty(0)) == [0.0]
    ladder = margins_of(torch.linspace(0.001, 8.4, 1000))
    assert ladder == [0.0, 5.0, 7.0]  # of 4.2, 6.3, 7.6 and 8.3
