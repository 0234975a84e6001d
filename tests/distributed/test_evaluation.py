"""Evaluation shared by the processes: the figures of one process, no picture twice, for any number of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TWO = ("--nproc_per_node=2",)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_pictures(processes, launch, outcome, tmp_path, meter, dual):
    asked = tmp_path / "asked.json"
    out = tmp_path / "out.json"
    asked.write_text(json.dumps({"models": [meter, dual], "counts": [1, 2, 5, 8], "out": str(out)}))
    script = Path(__file__).with_name("shared_evaluation.py")
    status, output = outcome(launch(asked, f"--nproc_per_node={processes}", script=script))
    assert status == 0, output
    cases = json.loads(out.read_text())
    assert len(cases) == 3 * 4 * 2
    for case in cases:
        assert case["difference"] <= 1e-5, case  # other batches, so other roundings
        assert case["same_on_disk"], case
        assert case["same_figures"] and "r_mean" in case["figures"], case
        if case["case"].startswith("ensemble"):
            continue  # its members read for themselves
        together = sorted(index for of_rank in case["read"] for index in of_rank)
        spare = max(0, processes - case["pictures"])  # processes without a picture look at the first for its shape
        assert together == sorted([*range(case["pictures"]), *[0] * spare]), case


def test_a_job_has_the_results_of_one_process(write_job, finished, metrics, tmp_path, teacher):
    model = {"arch": "dcd", "teacher": teacher, "student": {"init_from_teacher": {"layers": [1]}},
             "selection": {"hard_negatives": 3}}  # fmt: skip
    found = []
    for name, size, flags in (("one", 8, ()), ("two", 4, TWO)):
        splits = {"test_splits": ["test"], "valid_splits": ["val"]}
        job = write_job(name, model, batch_size_train=size, k_test=2, eps=1e-4, **splits)
        finished(job, *flags)
        folder = tmp_path / "output" / "job" / name
        rows = json.loads((folder / "results.json").read_text())["rows"]
        found.append([{k: v for k, v in row.items() if k not in ("ms_per_pair", "ms_per_search")} for row in rows])
        assert [line for line in metrics(name, "eval") if line["model"] == "teacher"]
    assert found[0] == found[1]
    assert "r_mean" in found[0][0]
