"""The page and the table: their figures, their independence of everything else, and what they escape."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.reporting.charts import Series, line_chart, ticks
from lavis_dcd.reporting.report import format_table, write_report
from lavis_dcd.reporting.table import body, headline, tiles, used_columns

PICTURE = "data:image/jpeg;base64,/9j/4AAQ"
EVIL = "<script>alert('x')</script> & \"more\""


def row(name: str, r_sum: float, parameters: int = 1000, ms: float = 0.5, **more: Any) -> dict[str, Any]:
    recalls = dict.fromkeys(("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10"), r_sum / 6)
    figures = {"r_sum": r_sum, "fusion_parameters": parameters, "ms_per_pair": ms, "how": "exhaustive"}
    return {"name": name, **recalls, **figures, **more}


ROWS = [
    row("teacher", 480.0, 4_000_000, 0.9),
    row("student before training", 240.0, 2_000_000, 0.45),
    row("student", 468.0, 2_000_000, 0.45),
]


def evaluated(model: str, step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "epoch": step / 10, "split": "val", "model": model, **metrics}


def run_folder(folder: Path, rows: list[dict[str, Any]] = ROWS, **more: Any) -> Path:
    gallery = [
        {
            "direction": "text_to_image",
            "query": {"text": EVIL},
            "ranks": {"teacher": 1, "student": 3},
            "results": {
                "teacher": [{"picture": PICTURE, "right": True, "score": 2.0}],
                "student": [{"picture": "https://example.org/spy.png", "right": False, "score": 1.0}],
            },
        },
        {
            "direction": "image_to_text",
            "query": {"picture": PICTURE},
            "ranks": {"teacher": 2, "student": 2},
            "results": {n: [{"text": EVIL, "right": False, "score": 0.5}] for n in ("teacher", "student")},
        },
    ]
    results = {
        "title": EVIL, "split": "test", "rows": rows, "gallery": gallery,
        "machine": {"cores": 2, "processor": EVIL}, **more,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(f"model:\n  arch: {EVIL}\n")
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": s, "epoch": s / 10, "lr": 0.1, "loss": 3.0 / s, "distill_loss": 2.0 / s,
         "student_misranked": 0.4, "teacher_misranked": 0.1, "student_match_score": 1.0 * s, EVIL: 1.0,
         "data_wait": 0.02 * s}
        for s in range(1, 6)
    ]  # fmt: skip
    for step in (2, 4):
        recalls = {"txt_r1": 10.0, "img_r1": 9.0, "txt_r10": 50.0, "img_r10": 40.0}
        lines.append(evaluated("student", step, r_sum=100.0 * step, **recalls))
    lines.append(evaluated("teacher", 5, r_sum=470.0))
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "step": 6, "lo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


class Page(HTMLParser):
    """Tags, the addresses that a browser would fetch, and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "line", "polyline", "circle"):
            self.open.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_the_figures_the_curves_and_the_gallery(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path))
    assert path == tmp_path / "report.html"
    html = path.read_text()
    page = Page(html)
    assert not page.open  # well nested
    for text in ("480.0", "468.0", "240.0", "4 M", "2 M", "0.45", "97.5 %", "student before training"):
        assert text in page.text, text
    for title in ("Training loss", "R-sum on val", "Learning rate", "Queries whose match is ranked below"):
        assert title in page.text, title
    assert "stroke-dasharray" in html  # the teacher's level
    assert "only the teacher right" in page.text and "none right" in page.text
    assert "Captions looking for their picture" in page.text and "Pictures looking for" in page.text
    assert page.tags.count("svg") == 7
    assert "6.0 % of the time of the training steps" in page.text and "Data wait" not in page.text


def test_the_page_tells_what_the_teacher_has_memorised(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path)).read_text()
    assert "training set" not in html
    memorised = {"split": EVIL, "pictures": 1000, "train_r1": 75.0, "split_r1": 24.0}
    text = Page(write_report(run_folder(tmp_path, memorised=memorised)).read_text()).text
    assert "first for 75.0 (among 1,000)" in text and "It has memorised" in text
    with pytest.raises(UserError, match=r"memorised: .* has not split, pictures"):
        write_report(run_folder(tmp_path, memorised={"split": "val"}))


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path)).read_text()
    page = Page(html)
    assert page.addresses and set(page.addresses) == {PICTURE}
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_every_text_is_escaped(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path)).read_text()
    assert "<script" not in html
    # title twice, machine, config, two captions twice, a diagnostic
    assert html.count("&lt;script&gt;") >= 7


TURNED = "\u202egnp.toh\u2066s\u200f \x1b[31m"  # marks of writing direction, and a terminal's command
PLAIN = "gnp.tohs [31m"


def _with_texts(folder: Path, text: str) -> Path:
    """A run folder in which every text of the user's is this one."""
    rows = [row("teacher", 480.0), row(text, 300.0, how=text), row("student", 468.0)]
    answers = [{"text": text, "right": False, "score": 0.5}]
    gallery = [{"direction": "image_to_text", "query": {"picture": PICTURE}, "ranks": {text: 2},
                "results": {text: answers}},
               {"direction": "text_to_image", "query": {"text": text}, "ranks": {text: 2},
                "results": {text: [{"picture": PICTURE, "right": False, "score": 0.5}]}}]  # fmt: skip
    run_folder(folder, rows, title=text, split=text, machine={text: text}, gallery=gallery)
    (folder / "config.yaml").write_text(f"title: {text}\n")
    lines = [{"kind": "train", "step": s, "epoch": 0.1, "loss": 1.0 * s, text: 1.0} for s in (1, 2)]
    lines += [evaluated(text, s, r_sum=1.0, txt_r1=1.0) | {"split": text} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_no_text_turns_the_page_or_commands_the_terminal(tmp_path: Path) -> None:
    html = write_report(_with_texts(tmp_path, TURNED)).read_text()
    assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\x1b]", html)
    title = re.search("<title>(.*)</title>", html)
    assert title is not None and title[1] == f"{PLAIN} · {PLAIN}"
    # title and heading, split, row and how, machine, gallery, configuration, charts
    assert Page(html).text.count(PLAIN) >= 12
    assert format_table([row(TURNED, 1.0)]).splitlines()[2].startswith(PLAIN)


def test_texts_of_a_megabyte_are_cut(tmp_path: Path) -> None:
    text = "a caption " * 100_000
    html = write_report(_with_texts(tmp_path, text)).read_text()
    assert len(html) < 100_000 + len(text)  # the configuration is shown whole
    assert "a caption…" in Page(html).text
    assert max(map(len, format_table([row(text, 1.0)]).splitlines())) < 250
    assert html.count(PICTURE) == 2


def test_a_picture_is_kept_whole_and_a_caption_like_one_is_not(tmp_path: Path) -> None:
    long = PICTURE + "A" * 50_000
    gallery = [{"direction": "image_to_text", "query": {"picture": long}, "ranks": {"m": 2},
                "results": {"m": [{"text": long, "right": False, "score": 0.5}]}}]  # fmt: skip
    html = write_report(run_folder(tmp_path, gallery=gallery)).read_text()
    assert html.count("A" * 50_000) == 1


def test_a_run_without_training_or_gallery_still_reports(tmp_path: Path) -> None:
    results = {"title": "plain", "split": "val", "rows": [row("model", 300.0)]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = Page(write_report(tmp_path).read_text())
    assert "The model reaches an R-sum of 300.0 (of 600 at most)." in page.text
    assert "svg" not in page.tags and "Gallery" not in page.text


def test_the_1k_protocol_has_its_own_table(tmp_path: Path) -> None:
    rows = [row("teacher", 480.0, **{"1k_r_sum": 515.0, "1k_txt_r1": 77.7})]
    page = Page(write_report(run_folder(tmp_path, rows)).read_text())
    assert "1K protocol" in page.text and "515.0" in page.text and "77.7" in page.text


def test_a_prescreen_is_told_as_not_exact(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    lines = [{"kind": "train", "step": step, "epoch": 0.1, "loss": 1.0, **more}
             for step, more in ((1, {"prescreen_found": 0.5}), (2, {}), (3, {"prescreen_found": 0.75}))]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(folder).read_text()).text
    assert "not exact: 62.5 % of the teacher's hardest candidates were among those it scored" in page


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)


def test_the_headline_says_only_what_was_measured() -> None:
    assert headline(ROWS) == (
        "The student keeps 97.5 % of its teacher's R-sum with 50 % of the fusion parameters, and scores a "
        "pair 2.0\N{MULTIPLICATION SIGN} as fast. Before training it stood at 50.0 %."
    )
    bare = [{"name": "teacher", "r_sum": 400.0}, {"name": "student", "r_sum": 404.0}]
    assert headline(bare) == "The student reaches 101.0 % of its teacher's R-sum."
    assert [tile["value"] for tile in tiles(bare)] == ["101.0 %"]
    assert headline([]) == "Nothing was evaluated."
    assert tiles([row("model", 1.0)]) == []


def test_best_values_are_marked_among_the_rows_that_compare() -> None:
    rows = [*ROWS, row("student, ground truth alone", 470.0, 2_000_000, 0.45, r_sum_std=1.25)]
    marked = {line.name: {c.key for c in line.cells if c.best} for line in body(rows, used_columns(rows))}
    assert marked["teacher"] == marked["student"] == set()
    assert {"txt_r1", "r_sum"} <= marked["student, ground truth alone"]
    assert "fusion_parameters" not in marked["student, ground truth alone"]  # all equal: nothing is best
    pair = [ROWS[0], ROWS[2]]
    marked = {line.name: {c.key for c in line.cells if c.best} for line in body(pair, used_columns(pair))}
    assert "r_sum" in marked["teacher"] and marked["student"] == {"fusion_parameters", "ms_per_pair"}


def test_the_terminal_table_is_aligned() -> None:
    lines = format_table([*ROWS, {"name": "half", "r_sum": 12.0, "r_sum_std": 0.5}]).splitlines()
    heads = "txt R@1 txt R@5 txt R@10 img R@1 img R@5 img R@10 R-sum fusion params ms / pair scored"
    assert re.sub(" +", " ", lines[0]).strip() == heads
    assert lines[2].split()[-6:] == ["80.0", "480.0", "4", "M", "0.9", "exhaustive"]
    r_sums = {2: "480.0", 3: "240.0", 5: "12.0 \N{PLUS-MINUS SIGN} 0.5"}
    assert len({lines[number].index(text) + len(text) for number, text in r_sums.items()}) == 1
    assert format_table([]).splitlines()[0] == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.1, 0.42, [0.1, 0.2, 0.3, 0.4, 0.5]), (-3, 7, [-4, -2, 0, 2, 4, 6, 8])],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 5.0, -2e-9])
def test_ticks_of_a_single_value(value: float) -> None:
    found = ticks(value, value)
    assert len(found) > 1 and found[0] <= value <= found[-1]


def test_charts_stay_inside_and_leave_out_what_is_no_number() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)] + [(3.0, float("nan")), (float("inf"), 1.0)]
    svg = line_chart([Series("a < b", points), Series("level", level=9.0)], "step")
    path = re.search(r'points="([^"]+)"', svg).group(1).split()
    assert len(path) <= 240
    places = [tuple(map(float, place.split(","))) for place in path]
    assert all(0 <= x <= 480 and 0 <= y <= 270 for x, y in places)
    assert "a &lt; b" in svg and "a < b" not in svg and "nan" not in svg
    assert line_chart([Series("empty", [(0.0, float("nan"))])], "step") == ""
