"""The benchmark scripts at their tiniest size: they end, write the figures that they print, and find equal results."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry

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
def test_pairs_budget_trains_each_run_once_and_keeps_the_teachers_scores_as_they_are(
    benchmark: Run, tmp_path: Path
) -> None:
    folder, curves, lines = tmp_path / "runs", tmp_path / "curves.svg", tmp_path / "runs.csv"
    sizes = ("--quick", "--students", "dual,thinned", "--strategies", "stratified,all", "--pairs", "2")
    options = (*sizes, "--folder", str(folder), "--threads", "1", "--chart", str(curves), "--csv", str(lines))
    content, printed = benchmark("pairs_budget", *options)
    check_header(content, printed, "pairs_budget")
    found = [(row["student"], row["strategy"], row["pairs"]) for row in content["rows"]]
    assert found == [(s, *of) for s in ("dual", "thinned") for of in (("stratified", 2), ("all", None))]
    for row in content["rows"]:
        assert (row["steps"], row["seeds"], row["spread"]) == (2, 1, None) and 0 < row["r_sum"] <= 600
    teachers = {row["student"]: row["teacher_r_sum"] for row in content["rows"]}
    assert teachers["dual"] == teachers["thinned"] > 0
    with lines.open(encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert [float(run["r_sum"]) for run in runs] == [row["r_sum"] for row in content["rows"]]
    for run in runs:
        recalls = [float(run[f"{side}_r{k}"]) for side in ("txt", "img") for k in (1, 5, 10)]
        assert sum(recalls) == pytest.approx(float(run["r_sum"]))
    titles = [element.text for element in ET.parse(curves).iter("{http://www.w3.org/2000/svg}title")]
    assert f"stratified, K 2: {content['rows'][0]['r_sum']:.1f}" in titles

    # both students saw the same batches of two steps, which the teacher scored once
    kept = sorted((folder / "scores").rglob("*.npz"))
    assert len(kept) == 2
    for file in (folder / "rows").glob("scenes-dual-*.json"):
        written = json.loads(file.read_text())
        file.write_text(json.dumps({**written, "r_sum": 1.0}))
    for file in (folder / "rows").glob("scenes-thinned-stratified-*.json"):
        file.unlink()
    shutil.rmtree(folder / "pairs_budget" / "scenes-thinned-stratified-2-seed0")
    again, _ = benchmark("pairs_budget", *options)
    # runs that are done are read, and the one that is trained anew on kept scores ends where it ended on computed ones
    assert [row["r_sum"] for row in again["rows"]] == [1.0, 1.0, *(row["r_sum"] for row in content["rows"][2:])]
    kept[0].unlink()
    (folder / "rows" / "scenes-thinned-all-seed0.json").unlink()
    shutil.rmtree(folder / "pairs_budget" / "scenes-thinned-all-seed0")
    anew, _ = benchmark("pairs_budget", *options)
    assert anew["rows"][3]["r_sum"] == content["rows"][3]["r_sum"]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("pairs_budget", ["--pairs", "8,0"], "--pairs: 8,0 must be whole numbers of at least 1"),
        ("pairs_budget", ["--strategies", "hardest,softest"], "--strategies: unknown softest"),
        ("pairs_budget", ["--data", "flickr8k", "--quick"], "--quick: there are no quick jobs"),
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


@pytest.fixture
def pairs_budget(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names in ``pairs_budget.py``."""
    folder = repo_root / "projects" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield runpy.run_path(str(folder / "pairs_budget.py"))
    for helper in folder.glob("*.py"):
        sys.modules.pop(helper.stem, None)
    for arch in ("dcd_kept_scores", "dcd_fresh_student"):
        registry.mapping["model_name_mapping"].pop(arch, None)


def test_a_fresh_student_has_the_teachers_towers_and_its_own_fusion(pairs_budget: dict[str, Any]) -> None:
    make_job, budget = sys.modules["pairs_jobs"].make_job, pairs_budget["Budget"]
    importlib.import_module("kept_scores")
    models = {}
    for student in ("thinned", "fresh"):
        section = make_job("scenes", budget(student, "stratified", 2, 0)).model
        models[student] = registry.get_model_class(section.arch).from_config(section)
    thinned, fresh = models["thinned"], models["fresh"]
    assert fresh.student.vision_tower is fresh.teacher.vision_tower
    assert fresh.student.text_tower is fresh.teacher.text_tower
    assert not any(parameter.requires_grad for parameter in fresh.student.text_tower.parameters())
    ours, theirs = (dict(model.student.named_parameters()) for model in (fresh, thinned))
    assert ours.keys() == theirs.keys()
    learned = {name for name, parameter in ours.items() if parameter.requires_grad and parameter.dim() > 1}
    started = {name for name in learned if torch.equal(theirs[name], ours[name])}
    assert learned and not started
    layers = len(fresh.teacher.cross_modal_text_layers)
    assert len(fresh.student.cross_modal_text_layers) == len(thinned.student.cross_modal_text_layers) == layers // 2
    assert fresh.config.selection.strategy == "stratified" and fresh.loss_config.distill == "kl"


def test_pairs_budget_averages_over_seeds_and_draws_what_it_averaged(
    pairs_budget: dict[str, Any], tmp_path: Path
) -> None:
    sums = {("random", 4): [200.0, 210.0, 205.0], ("random", 16): [220.0, 230.0, 240.0], ("all", None): [250.0]}
    figures = [
        {"student": "dual", "strategy": strategy, "pairs": pairs, "seed": seed, "r_sum": value, "steps": 10,
         "seconds": 2.0, "cpu_seconds": 1.0, "teacher": "one",
         "teacher_r_sum": 300.0 if (strategy, seed) == ("all", 0) else None}
        for (strategy, pairs), values in sums.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    rows = pairs_budget["averaged"](figures)
    assert [(row["r_sum"], row["spread"], row["seeds"]) for row in rows] == [
        (205.0, 5.0, 3), (230.0, 10.0, 3), (250.0, None, 1)
    ]  # fmt: skip
    assert {row["teacher_r_sum"] for row in rows} == {300.0}
    file = tmp_path / "curves.svg"
    pairs_budget["draw"](pairs_budget["panels"](rows), file)
    svg = "{http://www.w3.org/2000/svg}"
    drawing = ET.parse(file)
    titles = {element.text for element in drawing.iter(f"{svg}title")}
    assert {"random, K 4: 205.0 ± 5.0", "random, K 16: 230.0 ± 10.0", "all pairs: 250.0", "teacher: 300.0"} <= titles
    (line,) = (element.get("points") for element in drawing.iter(f"{svg}polyline"))
    (x4, y4), (x16, y16) = (map(float, point.split(",")) for point in line.split())
    assert x4 < x16 and y4 > y16
    # a level's distance from a point on the same scale as two points' distance from each other
    levels = {element.find(f"{svg}title").text: float(element.get("y1")) for element in drawing.iter(f"{svg}line")
              if element.find(f"{svg}title") is not None}  # fmt: skip
    assert (y16 - levels["all pairs: 250.0"]) / (y4 - y16) == pytest.approx((250 - 230) / (230 - 205), abs=0.01)


def test_pairs_budget_plans_whole_curves_seed_by_seed(pairs_budget: dict[str, Any]) -> None:
    plan = pairs_budget["planned"](["dual"], ["random", "all"], [4, 8], [0, 1])
    expected = [f"dual-{what}-seed{seed}" for seed in (0, 1) for what in ("random-4", "random-8", "all")]
    assert [budget.name for budget in plan] == expected


def test_a_student_of_half_depth_keeps_the_first_and_the_last_layer(pairs_budget: dict[str, Any]) -> None:
    assert pairs_budget["Budget"]("dual", "all", None, 0).selection == {"hard_negatives": None}
    half_of = sys.modules["pairs_jobs"].half_of
    assert [half_of(layers) for layers in (1, 2, 4, 6, 12)] == [[0], [1], [0, 3], [0, 3, 5], [0, 2, 4, 7, 9, 11]]
