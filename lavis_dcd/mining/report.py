"""The closing table of a mining: how its teacher ranks, and what to do about it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lavis_dcd.banks.score_bank import BankTable
from lavis_dcd.common.files import atomic_write

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LADDER = (0.5, 0.75, 0.9, 0.99)  # quantiles of how far above the match misranked candidates score
_TEXT, _FIGURES = "table.txt", "table.json"
FEW = 0.01  # of the queries: nothing to guard against


@dataclass
class DirectionReport:
    """One direction; a query is a row of the training set.

    Args:
        queries: those with a candidate.
        candidates: kept, of all queries.
        match, hardest: quantiles (``QUANTILES``) of the scores of the match and of the highest candidate.
        misranked: share of the queries whose hardest candidate scores at least as high as the match.
    """

    queries: int
    candidates: int
    match: list[float] = field(default_factory=list)
    hardest: list[float] = field(default_factory=list)
    misranked: float = 0.0


@dataclass
class MarginReport:
    """The cost of a ``selection.margin`` by direction: candidates dropped, and queries that lose their hardest."""

    margin: float
    candidates: dict[str, int]
    queries: dict[str, int]


@dataclass
class MiningReport:
    """All of it; ``advice`` says what to do with it, ``command`` trains from the bank."""

    directions: dict[str, DirectionReport]
    margins: list[MarginReport]
    advice: str
    command: str = ""

    def lines(self) -> list[str]:
        """Return the table as text."""
        table = []
        for direction, ranks in self.directions.items():
            per_query = ranks.candidates / max(1, ranks.queries)
            table += [f"{direction}: {ranks.queries:,} queries, {per_query:.1f} candidates each"]
            if ranks.queries:
                table += [
                    _row("  quantile", [f"{100 * q:.0f} %" for q in QUANTILES]),
                    _row("  match", [f"{value:.2f}" for value in ranks.match]),
                    _row("  hardest negative", [f"{value:.2f}" for value in ranks.hardest]),
                    f"  misranked (the hardest as high as the match or higher): {100 * ranks.misranked:.1f} % of them",
                ]
        table += ["", "what model.selection.margin would drop: candidates, and queries that would lose their hardest"]
        heads = [f"{direction} {what}" for direction in self.directions for what in ("candidates", "queries")]
        table += [_row("  margin", heads, 28)]
        table += [_row(f"  {step.margin:g}", self._dropped(step), 28) for step in self.margins]
        return [*table, "", self.advice, *([f"train from it: {self.command}"] if self.command else [])]

    def _dropped(self, step: MarginReport) -> list[str]:
        cells = []
        for direction, ranks in self.directions.items():
            cells.append(_share(step.candidates[direction], ranks.candidates))
            cells.append(_share(step.queries[direction], ranks.queries))
        return cells

    def save(self, folder: Path, scores: str = "") -> None:
        """Write ``table.txt`` and, with the same figures, ``table.json``.

        Args:
            scores: the name of the bank's scores that these are the figures of.
        """
        with atomic_write(folder / _TEXT, "w") as handle:
            handle.write("\n".join(self.lines()) + "\n")
        with atomic_write(folder / _FIGURES, "w") as handle:
            json.dump({"scores": scores, "quantiles": QUANTILES, **asdict(self)}, handle, indent=1)


def has_report(folder: Path, scores: str) -> bool:
    """Return whether the tables in ``folder`` are there and of these scores."""
    if not ((folder / _FIGURES).is_file() and (folder / _TEXT).is_file()):
        return False
    try:
        figures = json.loads((folder / _FIGURES).read_text(encoding="utf-8"))
        return bool(figures["scores"] == scores)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def report(tables: Mapping[str, BankTable], command: str = "") -> MiningReport:
    """Sum up the bank's scores.

    Args:
        tables: by direction.
        command: the line that trains from the bank.
    """
    above = {direction: _above_match(table) for direction, table in tables.items()}
    ladder = margins_of(torch.cat([excess[excess > 0] for excess in above.values()]))
    steps = [
        MarginReport(
            margin,
            {direction: int((excess > margin).sum()) for direction, excess in above.items()},
            {direction: int((excess[:, :1] > margin).sum()) for direction, excess in above.items()},
        )
        for margin in ladder
    ]
    directions = {direction: _of_direction(table) for direction, table in tables.items()}
    return MiningReport(directions, steps, _advice(directions, steps), command)


def margins_of(excess: Tensor) -> list[float]:
    """Return 0, and round numbers near the ``LADDER`` quantiles of positive differences ``excess [N]``."""
    if not len(excess):
        return [0.0]
    steps = {_rounded(float(value)) for value in _quantiles(excess, LADDER)}
    return [0.0, *sorted(steps - {0.0})]


def _above_match(table: BankTable) -> Tensor:
    """Return ``[R, K]``, how far each candidate scores above the match, -inf where there is none."""
    excess = table.scores[:, 1:] - table.scores[:, :1]
    return excess.masked_fill(table.candidates < 0, -torch.inf)


def _of_direction(table: BankTable) -> DirectionReport:
    valid = table.candidates >= 0
    some = valid.any(dim=1)
    if not some.any():
        return DirectionReport(queries=0, candidates=0)
    match, hardest = table.scores[some, 0], table.scores[some, 1]
    misranked = float((hardest >= match).double().mean())
    quantiles = _quantiles(match, QUANTILES), _quantiles(hardest, QUANTILES)
    return DirectionReport(int(some.sum()), int(valid.sum()), *quantiles, misranked)


def _advice(directions: Mapping[str, DirectionReport], steps: Sequence[MarginReport]) -> str:
    queries = sum(ranks.queries for ranks in directions.values())
    if not queries:
        return "no query has a candidate: mine a larger pool (model.candidates.bank.shortlist, .random) or more data"
    share = sum(ranks.misranked * ranks.queries for ranks in directions.values()) / queries
    start = f"the teacher ranks a candidate at least as high as the match for {100 * share:.1f} % of the queries"
    # the step next above the median: it takes the clearer part of what stands above the match
    step = steps[min(2, len(steps) - 1)]
    if share < FEW or not step.margin:
        return f"{start}: its hard negatives can be trusted, selection.margin is not needed"
    lost = sum(step.queries.values()) / queries
    return (
        f"{start}, by mistake or because nobody labelled a second match; model.selection.margin={step.margin:g} "
        f"would drop {sum(step.candidates.values()):,} candidates that it ranks far above the match, the hardest of "
        f"{100 * lost:.1f} % of the queries"
    )


def _quantiles(values: Tensor, at: Sequence[float]) -> list[float]:
    """Return nearest-rank quantiles; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    return [float(ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))]) for q in at]


def _rounded(value: float) -> float:
    """Return the nearest of 1, 2, 3, 5, 7 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    lead = min((1, 2, 3, 5, 7, 10), key=lambda known: abs(known - value / power))
    return float(f"{lead * power:.6g}")


def _row(name: str, cells: Sequence[str], width: int = 10) -> str:
    return f"{name:<20}" + "".join(f"{cell:>{width}}" for cell in cells)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(1, total):.1f} %)"
