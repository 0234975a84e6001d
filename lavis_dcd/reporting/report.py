"""The report of a run: one HTML page that needs nothing else, and the table for a terminal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lavis_dcd.common.files import atomic_write
from lavis_dcd.common.texts import cut, memory_in_words, visible
from lavis_dcd.reporting.charts import DATA_WAIT, SKIPPED, Series, line_chart
from lavis_dcd.reporting.memorised import Memorised
from lavis_dcd.reporting.metrics_lines import FILE, is_number, read_lines
from lavis_dcd.reporting.results import RESULTS, Results
from lavis_dcd.reporting.table import Row, body, format_table, headline, tiles, used_columns

log = logging.getLogger(__name__)

__all__ = ["RunFiles", "chart_sections", "format_table", "write_report"]

FOLDS = "1k_"
LONGEST_TEXT = 1000  # characters
PICTURE = "picture"  # the key of a picture's address
SCORES, MISRANKED = "_score", "_misranked"
COLOURS = {"student": 1, "teacher": 2}  # the same in every chart
WORDS = {
    "loss": "total",
    "distill_loss": "distillation",
    "contrastive_loss": "contrastive",
    "fusion_loss": "fusion",
    "joint_loss": "joint space",
    "txt_r1": "picture finds caption, R@1",
    "txt_r10": "picture finds caption, R@10",
    "img_r1": "caption finds picture, R@1",
    "img_r10": "caption finds picture, R@10",
    "grad_norm": "Gradient norm, before clipping",
    "prescreen_found": "Share of the hardest that the prescreen kept",
    "prescreen_range": "Share of the range of the teacher's scores that the prescreen kept",
    "student_spread": "Spread of the student's scores of a query, of the largest score",
    "teacher_match_rank": "Share of the other candidates that the teacher puts above the match",
}


class Chart(TypedDict):
    """A chart under its title."""

    title: str
    svg: Markup


class ChartSection(TypedDict):
    """Charts under a heading."""

    title: str
    note: str
    charts: list[Chart]


@dataclass
class RunFiles:
    """The files of a run folder that a report is made from.

    As read, their texts hold visible characters alone (no marks of writing direction, which would turn what stands
    beside them), and are cut to ``LONGEST_TEXT``; pictures and the configuration are whole.

    Args:
        results: of ``results.json``.
        config: the text of ``config.yaml``.
        train: the training lines of ``metrics.jsonl``.
        evals: its lines of evaluations.
    """

    results: Results
    config: str = ""
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path) -> RunFiles:
        """Read ``results.json`` and, where they exist, ``config.yaml`` and ``metrics.jsonl``.

        Raises:
            UserError: ``results.json`` is missing or broken.
        """
        folder = Path(folder)
        results = Results.read(folder / RESULTS)
        lines, left_out = read_lines(folder / FILE)
        if left_out:
            log.warning("%s: the report leaves out %d lines of another form", folder / FILE, left_out)
        lines.sort(key=lambda line: line["step"])  # an evaluation that was repeated stands behind later ones
        return cls(
            Results(**_readable(vars(results))),
            visible(_text(folder / "config.yaml")),
            [_readable(line) for line in lines if line["kind"] == "train"],
            [_readable(line) for line in lines if line["kind"] == "eval"],
        )


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        run_dir: holds ``results.json``, and ``config.yaml`` and ``metrics.jsonl`` where the run trained.

    Returns:
        The page's path.

    Raises:
        UserError: ``results.json`` is missing or broken.
    """
    run = RunFiles.read(run_dir)
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows: Sequence[Row] = run.results.rows
    folds = [_fold_row(row) for row in rows if f"{FOLDS}r_sum" in row]
    page = environment.get_template("report.html.j2").render(
        title=run.results.title or "Retrieval report",
        split=run.results.split,
        headline=headline(rows),
        tiles=tiles(rows),
        table=body(rows, used_columns(rows, hide_same_how=True)),
        columns=used_columns(rows, hide_same_how=True),
        how=_same_how(rows),
        memorised=str(Memorised.parse(run.results.memorised)) if run.results.memorised else "",
        folds=body(folds, used_columns(folds)),
        fold_columns=used_columns(folds),
        sections=chart_sections(run),
        gallery=_gallery(run.results.gallery),
        machine={**_machine(run), **_waiting(run), **_prescreened(run), **_skipped(run)},
        config=run.config,
    )
    path = Path(run_dir) / "report.html"
    with atomic_write(path, "w") as handle:
        handle.write(page)
    return path


def chart_sections(run: RunFiles) -> list[ChartSection]:
    """Return the charts under their headings; empty charts and sections are left out."""
    learning = [
        ("Training loss", _chart([_train_series(run, key) for key in _losses(run)])),
        *_validation(run),
        ("Learning rate", _chart([_train_series(run, "lr")])),
    ]
    planned = [
        ("Learning", "Training figures are means over the steps since the point before.", learning),
        ("Diagnostics", "Seen on the training batches, pictures and captions together.", _diagnostics(run)),
    ]
    sections: list[ChartSection] = []
    for title, note, charts in planned:
        drawn: list[Chart] = [{"title": name, "svg": Markup(svg)} for name, svg in charts if svg]
        if drawn:
            sections.append({"title": title, "note": note, "charts": drawn})
    return sections


def _validation(run: RunFiles) -> list[tuple[str, str]]:
    """Return charts per split: the R-sum of the learner with its teacher's as a level, and the single recalls."""
    charts = []
    for split in dict.fromkeys(line["split"] for line in run.evals):
        lines = [line for line in run.evals if line["split"] == split]
        learner = [line for line in lines if line["model"] != "teacher"]
        if len({line["step"] for line in learner}) < 2:
            continue
        levels = [line.get("r_sum") for line in lines if line["model"] == "teacher"]
        teacher = next((level for level in levels if is_number(level)), None)
        name = learner[0]["model"]
        r_sum = [
            Series(name, _points(learner, "r_sum")),
            Series("teacher", level=teacher, colour=COLOURS["teacher"]),
        ]
        charts.append((f"R-sum on {split}", _chart(r_sum)))
        recalls = ("txt_r1", "img_r1", "txt_r10", "img_r10")
        charts.append(
            (
                f"Recalls on {split}, in percent",
                _chart([Series(WORDS[k], _points(learner, k)) for k in recalls]),
            )
        )
    return charts


def _diagnostics(run: RunFiles) -> list[tuple[str, str]]:
    """Return charts of all else that the model reported, teacher and student side by side."""
    known = {"kind", "step", "epoch", "lr", DATA_WAIT, SKIPPED, *_losses(run)}
    keys = list(dict.fromkeys(k for line in run.train for k, v in line.items() if k not in known and is_number(v)))
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_chart_title(key), []).append(key)
    return [
        (
            title,
            _chart([_train_series(run, key) for key in of_group], percent=of_group[0].endswith(MISRANKED)),
        )
        for title, of_group in groups.items()
    ]


def _chart_title(key: str) -> str:
    """Return the title of the chart that a diagnostic is a line of."""
    of_top = key.endswith((f"_top{SCORES}", f"_others{SCORES}", f"_top{MISRANKED}"))
    if key.endswith(SCORES):
        pair = (
            "the teacher's top candidate and of the best other" if of_top else "the match and of the hardest negative"
        )
        return f"Scores of {pair}"
    if key.endswith(MISRANKED):
        return f"Queries whose {'top candidate by the teacher' if of_top else 'match'} is ranked below " + (
            "another" if of_top else "a negative"
        )
    return WORDS.get(key, _words(key).capitalize())


def _machine(run: RunFiles) -> dict[str, Any]:
    """Return the machine's facts, the peaks of memory in words."""
    facts = dict(run.results.machine)
    peaks = facts.pop("peak_memory", {})
    return facts | {f"peak memory of {phase}": memory_in_words(peak) for phase, peak in peaks.items()}


def _skipped(run: RunFiles) -> dict[str, str]:
    """Return how many steps were skipped, in words; nothing where none was."""
    line = next((line for line in reversed(run.train) if is_number(line.get(SKIPPED)) and line[SKIPPED]), None)
    if line is None:
        return {}
    return {"skipped steps": f"{line[SKIPPED]} of {line['step']}: their loss or gradient was NaN or infinite"}


def _waiting(run: RunFiles) -> dict[str, str]:
    """Return the share of the training time that was spent waiting for batches, in words."""
    shares = [line[DATA_WAIT] for line in run.train if is_number(line.get(DATA_WAIT))]
    if not shares:
        return {}
    return {"waiting for data": f"{100 * sum(shares) / len(shares):.1f} % of the time of the training steps"}


def _prescreened(run: RunFiles) -> dict[str, str]:
    """Return, in words, how many of the hardest candidates the teacher saw where it scored a part of them only."""
    shares = [line["prescreen_found"] for line in run.train if is_number(line.get("prescreen_found"))]
    if not shares:
        return {}
    share = 100 * sum(shares) / len(shares)
    return {"prescreen": f"not exact: {share:.1f} % of the teacher's hardest candidates were among those it scored"}


def _gallery(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the gallery by direction, each item with the names of the matchers that were right."""
    titles = {
        "text_to_image": "Captions looking for their picture",
        "image_to_text": "Pictures looking for their captions",
    }
    sections = []
    for direction, title in titles.items():
        chosen = [{**item, "verdict": _verdict(item["ranks"])} for item in items if item["direction"] == direction]
        if chosen:
            sections.append({"title": title, "queries": chosen})
    return sections


def _verdict(ranks: Mapping[str, int]) -> str:
    right = [name for name, rank in ranks.items() if rank == 1]
    if len(ranks) == 1:
        return "right" if right else "wrong"
    if len(right) == len(ranks):
        return "both right" if len(ranks) == 2 else "all right"
    return f"only the {' and the '.join(right)} right" if right else "none right"


def _same_how(rows: Sequence[Row]) -> str:
    """Return how the rows were scored, where that is the same for all."""
    hows = {row.get("how") for row in rows}
    return str(hows.pop()) if len(hows) == 1 and None not in hows else ""


def _fold_row(row: Row) -> Row:
    return {"name": row["name"], **{k.removeprefix(FOLDS): v for k, v in row.items() if k.startswith(FOLDS)}}


def _chart(series: Sequence[Series], percent: bool = False) -> str:
    return line_chart(series, "optimizer step", percent)


def _train_series(run: RunFiles, key: str) -> Series:
    colour = next((number for name, number in COLOURS.items() if key.startswith(name)), None)
    dashed = key.endswith((f"hardest{SCORES}", f"others{SCORES}"))
    return Series(WORDS.get(key, _words(key)), _points(run.train, key), colour=colour, dashed=dashed)


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if is_number(line.get(key))]


def _words(key: str) -> str:
    key = key.removesuffix(MISRANKED).removesuffix(SCORES)
    return key.replace("_", " ")


def _losses(run: RunFiles) -> list[str]:
    """Return the names of the losses: the total, then its parts in order."""
    keys = {key for line in run.train for key in line if key == "loss" or key.endswith("_loss")}
    return sorted(keys, key=lambda key: (key != "loss", key))


def _readable(value: Any) -> Any:
    """Return results with their texts as ``RunFiles`` has them."""
    if isinstance(value, str):
        whole = value.encode("utf-8", "replace").decode()  # half a character cannot be written
        return cut(visible(whole), LONGEST_TEXT)
    if isinstance(value, Mapping):
        return {_readable(key): item if key == PICTURE else _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
