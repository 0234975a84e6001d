"""Run folders with damaged files: a report, or one line that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_dcd.common.errors import UserError
from lavis_dcd.reporting.report import write_report
from lavis_dcd.reporting.results import Results

PICTURE = "data:image/jpeg;base64,/9j/4AAQ"
RESULTS = {
    "title": "a job", "split": "test",
    "rows": [
        {"name": "teacher", "txt_r1": 60.0, "img_r1": 50.0, "r_sum": 400.0, "1k_r_sum": 500.0, "fusion_parameters": 40,
         "ms_per_pair": 0.5, "how": "exhaustive"},
        {"name": "student", "txt_r1": 50.0, "img_r1": 40.0, "r_sum": 300.0, "r_sum_std": 1.0, "fusion_parameters": 20,
         "ms_per_pair": 0.2, "how": "shortlist k=3"},
    ],
    "gallery": [
        {"direction": "text_to_image", "query": {"text": "a dog"}, "ranks": {"teacher": 1, "student": 3},
         "results": {"teacher": [{"picture": PICTURE, "right": True, "score": 2.0}]}},
        {"direction": "image_to_text", "query": {"picture": PICTURE}, "ranks": {"teacher": 2, "student": 2},
         "results": {"teacher": [{"text": "a cat", "right": False, "score": 0.5}]}},
    ],
    "machine": {"cores": 2, "peak_memory": {"training": {"host_mb": 12, "gpu_mb": 3}}},
}  # fmt: skip
LINES = [
    {"kind": "train", "step": 1, "epoch": 0.1, "lr": 0.1, "loss": 3.0, "student_misranked": 0.4, "data_wait": 0.02,
     "skipped_steps": 1, "prescreen_found": 0.9},
    {"kind": "train", "step": 2, "epoch": 0.2, "lr": 0.1, "loss": 2.0},
    {"kind": "eval", "step": 2, "epoch": 0.2, "split": "val", "model": "student", "r_sum": 100.0, "txt_r1": 10.0},
    {"kind": "eval", "step": 4, "epoch": 0.4, "split": "val", "model": "student", "r_sum": 120.0, "txt_r1": 11.0},
    {"kind": "eval", "step": 4, "epoch": 0.4, "split": "val", "model": "teacher", "r_sum": 130.0},
]  # fmt: skip

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([[]]),
    st.sampled_from([10**400, -(10**30), 1e308, 5e-324, math.nan, "\ud800", "\u202e", "a\0b", {"a": {}}, [1, "x"]]),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def reported(folder: Path, results: bytes, lines: bytes) -> bool:
    """Whether these files of a run give a report; else one line tells of ``results.json``."""
    (folder / "report.html").unlink(missing_ok=True)
    (folder / "results.json").write_bytes(results)
    (folder / "metrics.jsonl").write_bytes(lines)
    try:
        page = write_report(folder)
    except UserError as error:
        (line,) = error.faults
        assert line.startswith(f"{folder / 'results.json'}: ") and line.isprintable() and len(line) < 600
        return False
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return True


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def as_lines(contents: list[Any]) -> bytes:
    return b"".join(as_json(line) + b"\n" for line in contents)


def test_sound_files_are_reported(folder):
    assert reported(folder, as_json(RESULTS), as_lines(LINES))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_place_of_results(folder, with_another_value, data):
    reported(folder, as_json(with_another_value(RESULTS, data, VALUES)), as_lines(LINES))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_place_of_the_lines(folder, with_another_value, data):
    content = with_another_value(LINES, data, VALUES)
    lines = as_lines(content) if isinstance(content, list) else as_json(content)
    assert reported(folder, as_json(RESULTS), lines)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_that_are_cut_or_changed(folder, data):
    results, lines = as_json(RESULTS), as_lines(LINES)
    for _ in range(data.draw(st.integers(1, 3))):
        at, with_what = data.draw(st.integers(0, len(results) - 1)), data.draw(st.binary(max_size=3))
        results = results[:at] + with_what + results[at + data.draw(st.integers(0, 20)) :] or b" "
        at = data.draw(st.integers(0, len(lines) - 1))
        lines = lines[:at] + with_what + lines[at + data.draw(st.integers(0, 20)) :] or b" "
    reported(folder, results, lines)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_foreign_bytes(folder, results, lines):
    assert not reported(folder, results, lines) or isinstance(json.loads(results), dict)


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"rows":' * 50_000, b"\xff\xfe{}", b"{}{}", b"NaN", b""])
def test_results_that_no_parser_takes_are_a_line(folder, raw):
    assert not reported(folder, raw, b"")


def test_a_folder_or_nothing_in_place_of_results_is_a_line(tmp_path):
    with pytest.raises(UserError, match=r"results\.json: cannot be read \(No such file"):
        write_report(tmp_path)
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json: cannot be read \(Is a directory"):
        write_report(tmp_path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_results_that_are_read_have_names_and_finite_figures(with_another_value, data):
    try:
        results = Results.parse(as_json(with_another_value(RESULTS, data, VALUES)), Path("results.json"))
    except UserError:
        return
    for row in results.rows:
        assert isinstance(row["name"], str)
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
