"""The results of a run for people: a table of its rows with the best values marked, and a headline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from lavis_dcd.common.texts import cut, visible

LONGEST_NAME = 80  # characters of a row's name

# of results.json: see ResultRow; a spread of several runs stands beside its figure as ``<key>_std``
Row = Mapping[str, Any]


class ResultRow(TypedDict, total=False):
    """The keys of a row of ``results.json``: one matcher on one split; with COCO's 1K protocol, ``1k_`` keys beside.

    Recalls are in percent, ranks 1-based.
    """

    name: str
    txt_r1: float
    txt_r5: float
    txt_r10: float
    img_r1: float
    img_r5: float
    img_r10: float
    txt_r_mean: float
    img_r_mean: float
    r_mean: float
    r_sum: float
    txt_median_rank: float
    img_median_rank: float
    agg_metrics: float
    fusion_parameters: int
    ms_per_pair: float
    ms_per_search: float
    how: str


class Tile(TypedDict):
    """One figure of the headline, and what it compares."""

    value: str
    label: str
    note: str


@dataclass(frozen=True)
class Column:
    """A column of the results.

    Args:
        key: of the row; ``<key>_std`` beside it is shown as a spread.
        group: heading over neighbouring columns.
        meaning: for people who see it for the first time.
        better: "more" or "less" is better; "" where there is no better.
    """

    key: str
    title: str
    meaning: str
    group: str = ""
    better: str = "more"


_TEXT, _IMAGE = "picture → caption", "caption → picture"

COLUMNS = (
    Column("txt_r1", "R@1", "Of 100 pictures, how many have one of their own captions first.", _TEXT),
    Column("txt_r5", "R@5", "… among the first five.", _TEXT),
    Column("txt_r10", "R@10", "… among the first ten.", _TEXT),
    Column("img_r1", "R@1", "Of 100 captions, how many have their own picture first.", _IMAGE),
    Column("img_r5", "R@5", "… among the first five.", _IMAGE),
    Column("img_r10", "R@10", "… among the first ten.", _IMAGE),
    Column("r_sum", "R-sum", "The six recalls added up; 600 at most."),
    Column(
        "fusion_parameters",
        "fusion params",
        "Parameters that work once for every pair of a picture and a caption. The encoders, which work once "
        "per picture and once per caption, are not counted.",
        better="less",
    ),
    Column(
        "ms_per_pair",
        "ms / pair",
        "Median milliseconds to score one pair whose picture and caption are encoded already, on the machine below.",
        better="less",
    ),
    Column(
        "ms_per_search",
        "ms / search",
        "Median milliseconds to rank all pictures for one caption, as the last column says; pictures and caption are "
        "encoded already, and the pictures' vectors are there.",
        better="less",
    ),
    Column(
        "how",
        "scored",
        "exhaustive: every picture was scored against every caption. shortlist k: only the k best by a cheap "
        "joint space were scored; the rest kept its cheap order below them.",
        better="",
    ),
)


@dataclass(frozen=True)
class Cell:
    """One value as text; ``share`` (0..1) is the length of the bar beneath it."""

    key: str
    text: str
    spread: str = ""
    best: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Line:
    """One row of the table; ``reference`` marks the teacher, to which the others compare."""

    name: str
    cells: list[Cell]
    reference: bool = False


def used_columns(rows: Sequence[Row], hide_same_how: bool = False) -> list[Column]:
    """Return the columns for which any row has a value.

    Args:
        hide_same_how: leave out how the rows were scored where that is the same for all.
    """
    used = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    same = hide_same_how and len({row.get("how") for row in rows}) == 1
    return [column for column in used if column.key != "how" or not same]


def body(rows: Sequence[Row], columns: Sequence[Column]) -> list[Line]:
    """Return the rows, the best value of each column marked: among all but the teacher where those are several."""
    compared = [row for row in rows if row.get("name") != "teacher"]
    compared = compared if len(compared) > 1 else list(rows)
    best = {column.key: _best(compared, column) for column in columns}
    return [
        Line(
            cut(" ".join(visible(str(row.get("name", ""))).split()), LONGEST_NAME),
            [_cell(row, column, row in compared and row.get(column.key) == best[column.key]) for column in columns],
            row.get("name") == "teacher",
        )
        for row in rows
    ]


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text for a terminal: recalls both ways, R-sum, fusion parameters, times."""
    columns = used_columns(rows)
    lines = body(rows, columns)
    heads = ["", *(f"{_short_group(column)}{column.title}" for column in columns)]
    table = [[line.name, *(cell.text + cell.spread for cell in line.cells)] for line in lines]
    widths = [max(len(row[i]) for row in [heads, *table]) for i in range(len(heads))]
    aligned = []
    for row in [heads, *table]:
        texts = [
            text.ljust(width) if i == 0 or columns[i - 1].key == "how" else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        aligned.append("  ".join(texts).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([aligned[0], rule, *aligned[1:]])


def number(key: str, value: Any) -> str:
    """Return a value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key == "fusion_parameters":
        return _count(value)
    if key in ("ms_per_pair", "ms_per_search"):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{value:.1f}"


def _cell(row: Row, column: Column, best: bool) -> Cell:
    value = row.get(column.key)
    std = row.get(f"{column.key}_std")
    spread = "" if std is None else f" ± {number(column.key, std)}"
    share = value / 600 if column.key == "r_sum" and value is not None else None
    return Cell(column.key, number(column.key, value), spread, best, share)


def _best(rows: Sequence[Row], column: Column) -> Any:
    """Return the best value, or ``None`` where nothing is better than anything else."""
    values = [row[column.key] for row in rows if row.get(column.key) is not None]
    if not column.better or len(set(values)) < 2:
        return None
    return max(values) if column.better == "more" else min(values)


def _short_group(column: Column) -> str:
    return {_TEXT: "txt ", _IMAGE: "img "}.get(column.group, "")


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def headline(rows: Sequence[Row]) -> str:
    """Return the result in a sentence or two, from measured numbers only."""
    teacher, student = _row(rows, "teacher"), _row(rows, "student")
    if teacher is None or student is None or not teacher.get("r_sum"):
        named = [
            f"{row['name']} reaches an R-sum of {row['r_sum']:.1f}" for row in rows if row.get("r_sum") is not None
        ]
        return f"The {'; the '.join(named)} (of 600 at most)." if named else "Nothing was evaluated."
    share = 100 * student["r_sum"] / teacher["r_sum"]
    text = f"The student {'keeps' if share < 100 else 'reaches'} {share:.1f} % of its teacher's R-sum"
    if student.get("fusion_parameters") and teacher.get("fusion_parameters"):
        parameters = 100 * student["fusion_parameters"] / teacher["fusion_parameters"]
        text += f" with {parameters:.0f} % of the fusion parameters"
    speed = _ratio(teacher, student, "ms_per_pair")
    if speed is not None:
        text += f", and scores a pair {speed:.1f}\N{MULTIPLICATION SIGN} as fast"
    before = _row(rows, "student before training")
    if before is not None and before.get("r_sum") is not None:
        text += f". Before training it stood at {100 * before['r_sum'] / teacher['r_sum']:.1f} %"
    return text + "."


def tiles(rows: Sequence[Row]) -> list[Tile]:
    """Return the headline's figures with what they compare."""
    teacher, student = _row(rows, "teacher"), _row(rows, "student")
    if teacher is None or student is None:
        return []
    figures: list[Tile] = []
    for key, label in (
        ("r_sum", "of the teacher\N{RIGHT SINGLE QUOTATION MARK}s R-sum"),
        ("fusion_parameters", "of its fusion parameters"),
    ):
        share = _ratio(student, teacher, key)
        if share is not None:
            note = f"{number(key, student[key])} against {number(key, teacher[key])}"
            figures.append({"value": f"{100 * share:.1f} %", "label": label, "note": note})
    speed = _ratio(teacher, student, "ms_per_pair")
    if speed is not None:
        pair = [number("ms_per_pair", row["ms_per_pair"]) for row in (student, teacher)]
        figures.append(
            {
                "value": f"{speed:.2f}\N{MULTIPLICATION SIGN}",
                "label": "as fast per pair",
                "note": f"{pair[0]} against {pair[1]} ms",
            }
        )
    return figures


def _row(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row.get("name") == name and row.get("r_sum") is not None), None)


def _ratio(above: Row, below: Row, key: str) -> float | None:
    return above[key] / below[key] if above.get(key) and below.get(key) else None
