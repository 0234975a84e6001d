import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_dcd.reporting.metrics_lines import is_number, read_lines
from lavis_dcd.reporting.report import write_report

TRAIN = {"kind": "train", "step": 2, "epoch": 0.5, "loss": 1.5, "lr": 0.1}
EVAL = {"kind": "eval", "step": 5, "epoch": 1.0, "split": "val", "model": "student", "weights_of_step": 5, "r_sum": 9.0}
WHOLE = json.dumps(TRAIN).encode()

FOREIGN = {
    "torn": WHOLE[:-9],
    "torn in a number, yet with a brace": b'{"kind": "tr}',
    "a list": b"[1, 2]",
    "a number": b"3",
    "text": b'"train"',
    "null": b"null",
    "another encoding": json.dumps({**TRAIN, "note": "x"}).encode("utf-16"),
    "no UTF-8": b'{"kind": "train", "step": 2, "epoch": 1, "note": "\xff"}',
    "binary": bytes(range(1, 10)) + b"\x80\x81",
    "deep": b"[" * 100_000,
    "no kind": b'{"step": 3, "epoch": 1.0}',
    "another kind": json.dumps({**TRAIN, "kind": "note"}).encode(),
    "no step": b'{"kind": "train", "epoch": 1.0}',
    "a step of text": json.dumps({**TRAIN, "step": "2"}).encode(),
    "a half step": json.dumps({**TRAIN, "step": 2.5}).encode(),
    "a step that is true": json.dumps({**TRAIN, "step": True}).encode(),
    "a negative step": json.dumps({**TRAIN, "step": -1}).encode(),
    "a huge step": json.dumps({**TRAIN, "step": 10**400}).encode(),
    "an epoch of text": json.dumps({**TRAIN, "epoch": "1"}).encode(),
    "a split of numbers": json.dumps({**EVAL, "split": 5}).encode(),
    "no model": json.dumps({key: value for key, value in EVAL.items() if key != "model"}).encode(),
    "weights of no step": json.dumps({**EVAL, "weights_of_step": "x"}).encode(),
}


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_ours_is_kept_wherever_a_foreign_line_stands(tmp_path, foreign, place):
    ours = [WHOLE, json.dumps(EVAL).encode()]
    ours.insert({"first": 0, "middle": 1, "last": 2}[place], foreign)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(ours))
    lines, left_out = read_lines(tmp_path / "metrics.jsonl")
    assert lines == [TRAIN, EVAL]
    assert left_out >= 1  # UTF-16 has line ends of its own


def test_empty_lines_are_nothing_and_a_missing_file_has_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n\r\n" + WHOLE + b"\r\n\n")
    assert read_lines(tmp_path / "metrics.jsonl") == ([TRAIN], 0)
    assert read_lines(tmp_path / "other") == ([], 0)
    os.mkfifo(tmp_path / "pipe")
    assert read_lines(tmp_path / "pipe") == ([], 0)


def test_numbers_that_a_chart_can_show():
    assert all(map(is_number, (0, -1.5, 10**30, 1e-300)))
    assert not any(map(is_number, (True, None, "1", float("nan"), float("inf"), 1e300, 10**400, [1])))


values = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        10**400,
        1e300,
        1e-320,
        5e-324,
        float("nan"),
        float("inf"),
        "",
        "x",
        "<b>",
        [],
        {},
        [1],
        1e99,
    ]
)
names = st.sampled_from(
    ["step", "epoch", "loss", "lr", "data_wait", "skipped_steps", "prescreen_found", "r_sum", "txt_r1", "model",
     "split",
     "a_score", "b_misranked", "x<y", "kind"]
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.booleans(), st.dictionaries(names, values, max_size=4)), max_size=6))
def test_a_report_is_written_whatever_the_lines_hold(tmp_path, edits):
    (tmp_path / "results.json").write_text(json.dumps({"title": "t", "split": "test", "rows": [], "gallery": []}))
    lines = [json.dumps({**(TRAIN if train else EVAL), "step": n, **edit}) for n, (train, edit) in enumerate(edits)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert "</html>" in write_report(tmp_path).read_text()
