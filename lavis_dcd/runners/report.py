"""The report of a run: one HTML page that needs nothing else, and the table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write
from lavis_dcd.runners.charts import Series, line_chart
from lavis_dcd.runners.report_table import Row, body, format_table, number, used_columns

__all__ = ["RunFiles", "chart_sections", "format_table", "headline", "tiles", "write_report"]

FOLDS = "1k_"
SCORES, MISRANKED = "_score", "_misranked"
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
    "lr": "Learning rate",
}


@dataclass
class RunFiles:
    """What a run folder says of its run."""

    results: dict[str, Any]
    config: str = ""
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path) -> RunFiles:
        """From ``results.json`` and, where they exist, ``config.yaml`` and ``metrics.jsonl``.

        Raises:
            UserError: ``results.json`` is missing or broken.
        """
        folder = Path(folder)
        path = folder / "results.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"no report without {path}, which an evaluation writes: {error}") from error
        lines = [
            json.loads(line) for line in _text(folder / "metrics.jsonl").splitlines() if line.endswith("}")
        ]
        return cls(
            results,
            _text(folder / "config.yaml"),
            [line for line in lines if line.get("kind") == "train"],
            [line for line in lines if line.get("kind") == "eval"],
        )


def write_report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a run folder.

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
    rows: list[Row] = run.results.get("rows", [])
    folds = [_fold_row(row) for row in rows if f"{FOLDS}r_sum" in row]
    page = environment.get_template("report.html.j2").render(
        title=run.results.get("title") or "Retrieval report",
        split=run.results.get("split", ""),
        headline=headline(rows),
        tiles=tiles(rows),
        table=body(rows),
        columns=used_columns(rows),
        folds=body(folds),
        fold_columns=used_columns(folds),
        sections=chart_sections(run),
        gallery=_gallery(run.results.get("gallery", [])),
        machine=run.results.get("machine", {}),
        config=run.config,
    )
    path = Path(run_dir) / "report.html"
    with atomic_write(path, "w") as handle:
        handle.write(page)
    return path


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
        text += f", and scores a pair {speed:.1f}× as fast"
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
        ("r_sum", "of the teacher’s R-sum"),
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
            {"value": f"{speed:.2f}×", "label": "as fast per pair", "note": f"{pair[0]} against {pair[1]} ms"}
        )
    return found


def chart_sections(run: RunFiles) -> list[dict[str, Any]]:
    """Charts under headings: ``title``, ``note`` and ``charts``, each ``{"title", "svg"}``; empty ones left out."""
    losses = sorted(
        {k for line in run.train for k in line if k == "loss" or k.endswith("_loss")}, key=_loss_order
    )
    training = [("Training loss", _chart([_train_series(run, key) for key in losses]))]
    sections = [
        (
            "Learning",
            "Each point is the mean over the steps since the one before.",
            training + _validation(run),
        ),
        (
            "Diagnostics",
            "What the loss was made of, seen from the training batches.",
            _diagnostics(run, set(losses)),
        ),
    ]
    kept = []
    for title, note, charts in sections:
        drawn = [{"title": name, "svg": Markup(svg)} for name, svg in charts if svg]
        if drawn:
            kept.append({"title": title, "note": note, "charts": drawn})
    return kept


def _validation(run: RunFiles) -> list[tuple[str, str]]:
    """Per split: the R-sum of the learner with its teacher's as a level, and the single recalls."""
    charts = []
    for split in dict.fromkeys(line["split"] for line in run.evals):
        lines = [line for line in run.evals if line["split"] == split]
        learner = [line for line in lines if line["model"] != "teacher"]
        if len({line["step"] for line in learner}) < 2:
            continue
        teacher = next(
            (line["r_sum"] for line in lines if line["model"] == "teacher" and "r_sum" in line), None
        )
        name = learner[0]["model"]
        r_sum = [Series(name, _points(learner, "r_sum")), Series("teacher", level=teacher)]
        charts.append((f"R-sum on {split}", _chart(r_sum)))
        recalls = ("txt_r1", "img_r1", "txt_r10", "img_r10")
        charts.append(
            (
                f"Recalls on {split}, in percent",
                _chart([Series(WORDS[k], _points(learner, k)) for k in recalls]),
            )
        )
    return charts


def _diagnostics(run: RunFiles, losses: set[str]) -> list[tuple[str, str]]:
    known = {"kind", "step", "epoch", *losses}
    keys = list(
        dict.fromkeys(k for line in run.train for k, v in line.items() if k not in known and _is_number(v))
    )
    groups: dict[str, list[str]] = {}
    for key in keys:
        if key.endswith(SCORES):
            groups.setdefault("Scores of the match and of the hardest negative", []).append(key)
        elif key.endswith(MISRANKED):
            groups.setdefault("Queries whose match is ranked below a negative", []).append(key)
        else:
            groups.setdefault(WORDS.get(key, _words(key).capitalize()), []).append(key)
    return [
        (
            title,
            _chart([_train_series(run, key) for key in of_group], percent=of_group[0].endswith(MISRANKED)),
        )
        for title, of_group in groups.items()
    ]


def _gallery(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The gallery by direction, each item with a word on who was right."""
    titles = {
        "text_to_image": "Captions looking for their picture",
        "image_to_text": "Pictures looking for their captions",
    }
    found = []
    for direction, title in titles.items():
        chosen = [
            {**item, "verdict": _verdict(item["ranks"])} for item in items if item["direction"] == direction
        ]
        if chosen:
            found.append({"title": title, "queries": chosen})
    return found


def _verdict(ranks: Mapping[str, int]) -> str:
    right = [name for name, rank in ranks.items() if rank == 1]
    if len(ranks) == 1:
        return "right" if right else "wrong"
    if len(right) == len(ranks):
        return "both right" if len(ranks) == 2 else "all right"
    return f"only the {' and the '.join(right)} right" if right else "none right"


def _fold_row(row: Row) -> Row:
    return {"name": row["name"], **{k.removeprefix(FOLDS): v for k, v in row.items() if k.startswith(FOLDS)}}


def _row(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row.get("name") == name and row.get("r_sum") is not None), None)


def _ratio(above: Row, below: Row, key: str) -> float | None:
    return above[key] / below[key] if above.get(key) and below.get(key) else None


def _chart(series: Sequence[Series], percent: bool = False) -> str:
    return line_chart(series, "optimizer step", percent)


def _train_series(run: RunFiles, key: str) -> Series:
    return Series(WORDS.get(key, _words(key)), _points(run.train, key))


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if _is_number(line.get(key))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(key: str) -> str:
    key = key.removesuffix(MISRANKED).removesuffix(SCORES)
    return key.replace("_", " ")


def _loss_order(key: str) -> tuple[bool, str]:
    return key != "loss", key


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
