"""The benchmark scripts at their tiniest size: they end, write the figures that they print, and find equal results."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXACT = 1e-4
Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def benchmark(repo_root: Path, tmp_path: Path) -> Run:
    """``benchmark(script, *options)``: what it wrote as JSON, and what it printed."""

    def run(script: str, *options: str) -> tuple[dict[str, Any], str]:
        file = tmp_path / "figures.json"
        command = [sys.executable, str(repo_root / "projects" / "benchmarks" / f"{script}.py"), "--json", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text()), done.stdout

    return run


def check_header(content: dict[str, Any], printed: str, name: str) -> None:
    assert content["benchmark"] == name and printed.startswith(f"{name}\n")
    for fact in ("processor", "cores", "threads", "precision", "torch"):
        assert f"{fact}: {content['machine'][fact]}" in printed
    assert content["machine"]["threads"] == 1
    for key, value in content["settings"].items():
        assert f"{key}: {value}" in printed


def table_rows(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_evaluation_agrees_with_lavis_and_needs_little_memory(benchmark: Run) -> None:
    content, printed = benchmark("evaluation", "--images", "200", "--repeats", "1")
    check_header(content, printed, "evaluation")
    lavis, ours = content["rows"]
    assert (lavis["implementation"], ours["implementation"]) == ("lavis", "ours")
    assert 10 < ours["metrics"]["img_r1"] < 90
    assert ours["metrics"] == pytest.approx(lavis["metrics"], rel=1e-12)
    assert ours["tables_mb"] == 2 * 200 * 1000 * 4 / 1e6
    assert [row[0] for row in table_rows(printed)] == [lavis["name"], ours["name"]]


@pytest.mark.slow
def test_every_row_of_the_training_step_computes_the_same(benchmark: Run, tmp_path: Path) -> None:
    chart = tmp_path / "steps.svg"
    content, printed = benchmark("training_step", "--geometry", "tiny", "--extra", "--chart", str(chart))
    check_header(content, printed, "training_step")
    names = [row["row"] for row in content["rows"]]
    exact = ["plain", "once", "trimmed", "sdpa", "first_layer", "last_layer", "fresh", "features", "steady"]
    assert names == [*exact, "chunks", "checkpoint", "bf16"]
    for row in content["rows"]:
        close = row["score_difference"] < EXACT and row["gradient_difference"] < EXACT
        assert close == row["exact"] == (row["row"] != "bf16")
        assert row["s_per_image"] > 0 and row["step_mb"] >= 0 and math.isfinite(row["faster"])
    assert content["rows"][0]["faster"] == content["rows"][0]["memory_share"] == 1
    assert [row[0] for row in table_rows(printed)] == names
    texts = [element.text for element in ET.parse(chart).iter("{http://www.w3.org/2000/svg}text")]
    assert {row["label"] for row in content["rows"]} <= set(texts)


@pytest.mark.slow
def test_matching_measures_every_matcher_in_both_layouts(benchmark: Run) -> None:
    content, printed = benchmark("matching", "--geometry", "tiny")
    check_header(content, printed, "matching")
    found = {(row["matcher"], row["layout"]) for row in content["rows"]}
    matchers = {"meter", "meter-student", "vilt", "vilt-student", "albef", "blip", "blip2", "clip", "dual"}
    assert found == {(name, layout) for name in matchers for layout in ("one image", "random")}
    fast = [row for row in content["rows"] if row["path"] == "fast"]
    assert {"meter", "meter-student"} <= {row["matcher"] for row in fast}
    assert all(row["difference"] < EXACT for row in fast)
    students = [row for row in content["rows"] if row["matcher"].endswith("-student")]
    assert all(row["to_teacher"] > 0 for row in students)
    assert len(table_rows(printed)) == len(content["rows"])


@pytest.mark.slow
def test_a_long_job_does_not_grow(benchmark: Run) -> None:
    content, printed = benchmark("steps_memory", "--steps", "150", "--every", "50", "--scenes", "24")
    check_header(content, printed, "steps_memory")
    assert [row["step"] for row in content["rows"]] == [50, 100, 150]
    assert content["rows"][0]["growth_mb"] == 0 and content["rows"][-1]["growth_mb"] < 20
    assert all(row["resident_mb"] > 100 for row in content["rows"])
    assert len(table_rows(printed)) == 3


@pytest.mark.slow
def test_sharding_halves_what_a_process_holds(benchmark: Run) -> None:
    content, printed = benchmark("sharding", "--size", "tiny")
    check_header(content, printed, "sharding")
    ddp, *fsdp = content["rows"]
    assert [row["row"] for row in content["rows"]] == [cells[0] for cells in table_rows(printed)]
    assert len(fsdp) == 2
    for row in fsdp:
        assert row["parameters"] == ddp["parameters"]
        assert 0.45 < row["held_mb"] / ddp["held_mb"] < 0.6


@pytest.mark.slow
def test_bounded_evaluations_need_less_memory_for_equal_scores(benchmark: Run, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    sizes = ("--images", "120", "--image-tokens", "64", "--eval-memory-mb", "4")
    content, printed = benchmark("evaluation_memory", *sizes, "--folder", str(files))
    check_header(content, printed, "evaluation_memory")
    rows = content["rows"]
    ways = ["fusion", "dual", "shortlist", "ensemble"]
    assert [(row["evaluation"], row["setting"]) for row in rows] == [(w, s) for w in ways for s in ("no bound", "4")]
    for unbounded, bounded in zip(rows[::2], rows[1::2], strict=True):
        assert bounded["equal"] == "equal" and bounded["sha256"] == unbounded["sha256"]
        assert unbounded["features_mb"] == 120 * (64 + 5 * 24) * 768 * 4 / 1e6
        tables = 1 if unbounded["evaluation"] in ("fusion", "dual") else 2
        assert unbounded["tables_mb"] == tables * 120 * 600 * 4 / 1e6
    assert len(table_rows(printed)) == len(rows) and not list(files.iterdir())


@pytest.mark.slow
def test_hard_batches_hold_a_pictures_nearest(benchmark: Run) -> None:
    sizes = ("--pictures", "400", "--dim", "64", "--batch", "40", "--neighbours", "100")
    content, printed = benchmark("hard_batches", *sizes)
    check_header(content, printed, "hard_batches")
    rows = {row["row"]: row for row in content["rows"]}
    assert list(rows) == ["vectors made and averaged", "neighbours", "order of an epoch", "random order"]
    assert rows["neighbours"]["kept_mb"] == 400 * 100 * 4 / 1e6
    hard, chance = rows["order of an epoch"]["hardest_share"], rows["random order"]["hardest_share"]
    assert chance == pytest.approx(40 / 400, abs=0.02) and hard > 2 * chance
    assert len(table_rows(printed)) == 4


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("evaluation_memory", ["--images", "1"], "--images, --image-tokens, --text-tokens: at least 2"),
        ("evaluation", ["--images", "4", "--texts", "7"], "--texts: 7"),
        ("training_step", ["--rows", "plain,fastest"], "--rows: unknown fastest"),
        ("matching", ["--matchers", "metre"], "--matchers: unknown metre"),
        ("steps_memory", ["--steps", "100", "--every", "60"], "--steps: 100 gives no two readings"),
        ("sharding", ["--processes", "1"], "--processes: 1"),
    ],
)
def test_wrong_options_are_told_in_a_line(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, script: str,
    options: list[str], message: str,
) -> None:  # fmt: skip
    folder = repo_root / "projects" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    main = runpy.run_path(str(folder / f"{script}.py"))["main"]
    with pytest.raises(SystemExit) as stopped:
        main(options)
    for helper in folder.glob("*.py"):  # their names are plain words
        sys.modules.pop(helper.stem, None)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
