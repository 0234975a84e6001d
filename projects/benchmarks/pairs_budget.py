"""Which candidates should a student pay for? R-sum against the pairs that it scores per query, by selection strategy.

Three students of one teacher, each distilled by KL over K candidates of a batch beside the match, which are chosen at
random, as the hardest by the teacher, half of each, or evenly over the teacher's scores; and over all of the batch. All
else is equal within a panel: teacher, batches, steps, loss. A run that is done is read from --folder, not repeated.

--data flickr8k reads FLICKR8K (images/, train.json, val.json), DCD_WEIGHTS, DCD_TEACHERS (the three dual encoders of
projects/dcd/flickr8k_dual_encoder.yaml) and DCD_FUSION_TEACHER (model.pth of a METER on the same towers).
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from measuring import parsed, parser, progress, report
from pairs_figure import Curve, Panel, draw
from pairs_jobs import ALL, DATA, REWEIGHTED, STRATEGIES, STUDENTS, Budget
from pairs_run import Figures, Runs

from lavis_dcd.common.errors import UserError

DEFAULT_PAIRS = {"scenes": (2, 8), "flickr8k": (4, 8, 16, 32, 64)}
DEFAULT_SEEDS = {"scenes": (0,), "flickr8k": (0, 1, 2)}
COLUMNS = {
    "student": "student|s", "strategy": "candidates|s", "pairs": "K|,d", "r_sum": "R-sum|.1f", "spread": "spread|.1f",
    "seeds": "seeds|d", "steps": "steps|,d", "seconds": "seconds|,.0f", "cpu_seconds": "of one core|,.0f",
    "teacher_r_sum": "teacher|.1f",
}  # fmt: skip
CSV_COLUMNS = (
    "data", "student", "strategy", "pairs", "seed", "r_sum", "txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5",
    "img_r10", "steps", "seconds", "cpu_seconds",
)  # fmt: skip


def planned(students: Iterable[str], strategies: Iterable[str], pairs: Iterable[int], seeds: Iterable[int]) -> list:
    """Return all runs, seed by seed, so that whatever an interrupted benchmark has done makes whole curves."""
    runs = []
    for seed in seeds:
        for student in students:
            for strategy in strategies:
                counts: Iterable[int | None] = [None] if strategy == ALL else pairs
                runs += [Budget(student, strategy, count, seed) for count in counts]
    return runs


def averaged(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """Return a row per student, strategy and K: means over seeds, and the standard deviation of the R-sum."""
    groups: dict[tuple, list[Figures]] = defaultdict(list)
    for one in figures:
        groups[one["student"], one["strategy"], one["pairs"]].append(one)
    teachers = {one["teacher"]: one["teacher_r_sum"] for one in figures if one["teacher_r_sum"] is not None}
    rows = []
    for (student, strategy, pairs), group in groups.items():
        sums = [one["r_sum"] for one in group]
        rows.append(
            {
                **{"student": student, "strategy": strategy, "pairs": pairs, "r_sum": fmean(sums)},
                **{"spread": stdev(sums) if len(sums) > 1 else None, "seeds": len(sums)},
                **{key: round(fmean(one[key] for one in group)) for key in ("steps", "seconds", "cpu_seconds")},
                "teacher_r_sum": teachers.get(group[0]["teacher"]),
            }
        )
    return rows


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return a panel per student, with a curve per strategy."""
    found = []
    for student in dict.fromkeys(row["student"] for row in rows):
        of_student = [row for row in rows if row["student"] == student]
        levels = {"all pairs": next((row["r_sum"] for row in of_student if row["strategy"] == ALL), None)}
        levels["teacher"] = of_student[0]["teacher_r_sum"]
        strategies = dict.fromkeys(row["strategy"] for row in of_student if row["pairs"] is not None)
        curves = [
            Curve(name, sorted((r["pairs"], r["r_sum"], r["spread"]) for r in of_student if r["strategy"] == name))
            for name in strategies
        ]
        found.append(Panel(*STUDENTS[student], curves, {name: at for name, at in levels.items() if at is not None}))
    return found


def write_csv(figures: Sequence[Figures], path: Path) -> None:
    """Write a line per run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(figures)


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked options."""
    of = parser(__doc__)
    of.add_argument("--data", choices=DATA, default="scenes", help="what the students learn from (default: scenes)")
    of.add_argument("--quick", action="store_true", help="two steps a run on a few scenes: whether it works")
    of.add_argument("--students", help=f"some of {', '.join(STUDENTS)} (default: all)")
    of.add_argument(
        "--strategies", help=f"some of {', '.join(STRATEGIES)}, {ALL}, reweighted (default: without the last)"
    )
    of.add_argument("--pairs", help="K, per query beside the match, with commas")
    of.add_argument("--seeds", help="with commas; --seed is not read")
    of.add_argument("--folder", type=Path, default=Path("output"), help="for jobs and figures (default: output)")
    of.add_argument("--minutes", type=float, help="begin no further run after so many minutes")
    of.add_argument("--csv", type=Path, metavar="PATH", help="write a line per run")
    of.add_argument("--chart", type=Path, metavar="PATH", help="draw the curves as SVG")
    of.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="over the settings of every job")
    options = parsed(of, argv)
    if options.quick and options.data != "scenes":
        of.error("--quick: there are no quick jobs of flickr8k; leave out --data")
    listed = {"reweighted": REWEIGHTED}
    options.students = _some(of, "--students", options.students, list(STUDENTS))
    known = [*STRATEGIES, ALL, "reweighted"]
    options.strategies = [
        listed.get(name, name) for name in _some(of, "--strategies", options.strategies, known, known[:-1])
    ]
    options.pairs = _numbers(of, "--pairs", options.pairs, DEFAULT_PAIRS[options.data], 1)
    options.seeds = _numbers(of, "--seeds", options.seeds, DEFAULT_SEEDS[options.data], 0)
    return options


def _some(
    of: argparse.ArgumentParser, option: str, text: str | None, known: Sequence[str], default: Sequence[str] = ()
) -> list[str]:
    if text is None:
        return list(default or known)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            of.error(f"{option}: unknown {name}; known: {', '.join(known)}")
    return list(dict.fromkeys(names))


def _numbers(
    of: argparse.ArgumentParser, option: str, text: str | None, default: Sequence[int], least: int
) -> list[int]:
    if text is None:
        return list(default)
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        of.error(f"{option}: {text} must be whole numbers of at least {least}, with commas")
    return list(dict.fromkeys(int(word) for word in words))


def measured(runs: Runs, todo: Sequence[Budget], minutes: float | None) -> list[Figures]:
    """Return the figures of all runs that are done when the time is up."""
    figures, started = [], time.monotonic()
    for budget in todo:
        known = runs.known(budget)
        if known is None and minutes is not None and time.monotonic() - started > 60 * minutes:
            continue
        figures.append(known or runs.measure(budget))
        progress(f"{budget.name}: R-sum {figures[-1]['r_sum']:.1f}{' (done before)' if known else ''}")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    options = options_of(argv)
    todo = planned(options.students, options.strategies, options.pairs, options.seeds)
    try:
        runs = Runs(options.folder, options.data, options.options, options.quick)
        figures = measured(runs, todo, options.minutes)
    except UserError as error:
        sys.stderr.write("".join(f"pairs_budget: {line}\n" for line in error.faults))
        return 2
    rows = averaged(figures)
    settings = {"data": options.data, "runs": len(figures), "planned": len(todo)}
    report("pairs_budget", settings, rows, COLUMNS, options.json)
    if options.csv is not None:
        write_csv(figures, options.csv)
    if options.chart is not None:
        draw(panels(rows), options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
