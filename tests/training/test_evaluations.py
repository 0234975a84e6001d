import json
import math

import pytest
import torch
from checkpoints import sign

from lavis_dcd.common.manifest import Identity
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.devices import Process
from lavis_dcd.training.evaluations import FILE, Evaluations, evaluation_identity

MADE = Identity(
    {"the teacher": "a", "the settings of data sets": "b"}, {"val": "c", "test": "d"}, {"val": "e", "test": "f"}
)


class Task:
    evaluates_over_ranks = False

    def __init__(self):
        self.calls = 0

    def evaluate_matcher(self, *args, **more):
        self.calls += 1
        return {"r_sum": 100.0 + self.calls, "agg_metrics": 1.0, "how": "exhaustive", "ms_per_pair": None, "other": [1]}


def evaluations(folder, identity=MADE, resume_step=None):
    task = Task()
    return Evaluations(folder, task, RunConfig(), Process(torch.device("cpu")), identity, resume_step), task


def filled(folder):
    """Evaluations of two matchers on two splits, written."""
    made, _ = evaluations(folder)
    for split in ("val", "test"):
        made.evaluate("teacher", None, None, split, None)
        for step in (0, 4):
            made.evaluate("student", None, None, split, step)
    made.write()
    return made


WANTED = [
    (name, split, step)
    for split in ("val", "test")
    for name, step in (("teacher", None), ("student", 0), ("student", 4))
]


def kept(folder, identity=MADE, resume_step=4):
    found, _ = evaluations(folder, identity, resume_step)
    return [key for key in WANTED if found.get(*key) is not None]


def test_what_was_made_is_not_made_again(tmp_path):
    made = filled(tmp_path)
    again, task = evaluations(tmp_path, resume_step=4)
    for key in WANTED:
        name, split, step = key
        assert again.evaluate(name, None, None, split, step) == made.get(*key)
    assert task.calls == 0
    assert kept(tmp_path, resume_step=3) == [key for key in WANTED if key[2] != 4]
    assert kept(tmp_path, resume_step=None) == []


def test_an_evaluation_with_other_facts_is_made_again(tmp_path):
    made, task = evaluations(tmp_path)
    first = made.evaluate("teacher", None, None, "train", None, {"pictures": 5})
    assert first["pictures"] == 5
    assert made.evaluate("teacher", None, None, "train", None, {"pictures": 5}) == first and task.calls == 1
    made.write()
    again, task = evaluations(tmp_path, Identity({**MADE.settings}, {**MADE.rows, "train": "t"}), resume_step=0)
    assert again.evaluate("teacher", None, None, "train", None, {"pictures": 6})["pictures"] == 6
    assert task.calls == 1


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"rows": {**MADE.rows, "test": "x"}}, lambda key: key[1] == "test"),
        ({"pictures": {**MADE.pictures, "val": "x"}}, lambda key: key[1] == "val"),
        ({"settings": {**MADE.settings, "the teacher": "x"}}, lambda key: key[0] == "teacher"),
        ({"settings": {**MADE.settings, "the settings of data sets": "x"}}, lambda key: True),
        ({"settings": {}}, lambda key: True),
    ],
)
def test_what_is_of_other_data_or_settings_is_made_again(tmp_path, caplog, changes, lost):
    filled(tmp_path)
    now = Identity(**{"settings": MADE.settings, "rows": MADE.rows, "pictures": MADE.pictures, **changes})
    assert kept(tmp_path, now) == [key for key in WANTED if not lost(key)]
    assert "evaluations are not reused, for what changed since: the " in caplog.text


def test_a_split_that_was_away_for_a_while_is_evaluated_anew(tmp_path):
    filled(tmp_path)
    without, _ = evaluations(tmp_path, Identity(MADE.settings, {"val": "c"}, {"val": "e"}), 4)
    without.write()
    assert kept(tmp_path) == [key for key in WANTED if key[1] == "val"]


def test_the_protocol_counts():
    plain, again, short, folds = (
        evaluation_identity(MADE, RunConfig(**keys))
        for keys in ({}, {"max_epoch": 7}, {"k_test": 4}, {"coco_1k_folds": True})
    )
    assert plain == again and plain != short != folds != plain


FORMER = '{"val/teacher": {"step": null, "metrics": {}}}'  # as an earlier version wrote it


@pytest.mark.parametrize("text", ["", "{", "[]", FORMER, "\xff\xfe", "[" * 9999])
def test_a_damaged_file_is_passed_over_with_a_line(tmp_path, caplog, text):
    filled(tmp_path)
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    assert kept(tmp_path) == []
    assert f"{FILE} is passed over" in caplog.text


def test_every_cut_is_passed_over(tmp_path):
    filled(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / FILE).write_bytes(whole[:length])
        assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "value",
    [
        None, 5, [5], [{}], {"a": 1}, [{"name": 1, "split": "val", "step": None, "metrics": {}}],
        [{"name": "teacher", "split": "val", "step": -1, "metrics": {}}],
        [{"name": "teacher", "split": "val", "step": None, "metrics": 5}],
        [{"name": "teacher", "split": "val", "step": None, "metrics": {"r_sum": "high"}}],
        [{"name": "teacher", "split": "val", "step": None, "metrics": {"1k_r_sum": 1e200}}],
        [{"name": "teacher", "split": "val", "step": None, "metrics": {"other": 10**400}}],
        [{"name": "teacher", "split": "val", "step": None, "metrics": {"how": 5}}],
        [{"name": "teacher", "split": "val", "step": None, "metrics": {}, "more": 1}],
    ],
)  # fmt: skip
def test_an_edited_file_with_its_sum_is_passed_over(tmp_path, caplog, value):
    filled(tmp_path)
    sign(tmp_path, FILE, facts={"evaluations": value})
    assert kept(tmp_path) == []
    assert f"{FILE} is passed over" in caplog.text


def test_figures_that_are_no_numbers_come_back(tmp_path):
    made, task = evaluations(tmp_path)
    task.evaluate_matcher = lambda *_, **__: {"agg_metrics": math.nan, "ms_per_pair": None}
    made.evaluate("teacher", None, None, "val", None)
    made.write()
    found, _ = evaluations(tmp_path, resume_step=0)
    assert math.isnan(found.get("teacher", "val", None)["agg_metrics"])


def test_a_file_is_json_with_the_identity_of_its_data(tmp_path):
    filled(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    assert content["identity"]["rows"] == MADE.rows and len(content["facts"]["evaluations"]) == 6
