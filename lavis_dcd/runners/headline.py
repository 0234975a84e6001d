"""What came out of a run, in a sentence and a few figures, from measured numbers only."""

from __future__ import annotations

from collections.abc import Sequence

from lavis_dcd.runners.report_table import Row, number


def headline(rows: Sequence[Row]) -> str:
    """What came out, in a sentence or two, from measured numbers only."""
    teacher, student = _row(rows, "teacher"), _row(rows, "student")
    if teacher is None or student is None or not teacher.get("r_sum"):
        named = [
            f"{row['name']} reaches an R-sum of {row['r_sum']:.1f}"
            for row in rows
            if row.get("r_sum") is not None
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


def tiles(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The headline's figures with what they compare: ``value``, ``label``, ``note``."""
    teacher, student = _row(rows, "teacher"), _row(rows, "student")
    if teacher is None or student is None:
        return []
    found = []
    for key, label in (
        ("r_sum", "of the teacher\N{RIGHT SINGLE QUOTATION MARK}s R-sum"),
        ("fusion_parameters", "of its fusion parameters"),
    ):
        share = _ratio(student, teacher, key)
        if share is not None:
            note = f"{number(key, student[key])} against {number(key, teacher[key])}"
            found.append({"value": f"{100 * share:.1f} %", "label": label, "note": note})
    speed = _ratio(teacher, student, "ms_per_pair")
    if speed is not None:
        pair = [number("ms_per_pair", row["ms_per_pair"]) for row in (student, teacher)]
        found.append(
            {
                "value": f"{speed:.2f}\N{MULTIPLICATION SIGN}",
                "label": "as fast per pair",
                "note": f"{pair[0]} against {pair[1]} ms",
            }
        )
    return found


def _row(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row.get("name") == name and row.get("r_sum") is not None), None)


def _ratio(above: Row, below: Row, key: str) -> float | None:
    return above[key] / below[key] if above.get(key) and below.get(key) else None
