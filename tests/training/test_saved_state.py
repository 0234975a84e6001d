"""Checkpoints whose values were edited together with all sums: each ends in a line, never in a traceback."""

import copy
import shutil

import pytest
import torch
from checkpoints import content, edit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_dcd.common.errors import UserError
from lavis_dcd.training import checkpoint
from lavis_dcd.training.saved_state import check_best, check_content, check_finite

DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
HOSTILE = [
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(10**400), 10**400),
    *(float("nan"), float("inf"), -0.5, 1e308, 1e-320, "", "x", "1", "\0", "x" * 10_000),
    *([], {}, (), [[]], {"a": 1}, {1: 2}, [None], DEEP),
    *(torch.ones(0), torch.ones(()), torch.ones(3, 2), torch.ones(2, dtype=torch.int8)),
    *(torch.full((), float("nan")), torch.ones((), dtype=torch.float64), torch.zeros(624, dtype=torch.int64)),
]


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def with_value(value, path, change):
    if not path:
        return change(value)
    copied = list(value) if isinstance(value, tuple) else copy.copy(value)
    copied[path[0]] = with_value(value[path[0]], path[1:], change)
    return tuple(copied) if isinstance(value, tuple) else copied


def without_first(value):
    if isinstance(value, dict):
        return dict(list(value.items())[1:])
    return value[1:] if isinstance(value, (list, tuple)) else value


def with_more(value):
    if isinstance(value, dict):
        return {**value, "foreign": 1, 99: None}
    if isinstance(value, (list, tuple)):
        return type(value)([*value, 1])
    return [value]


def turned(value):
    if isinstance(value, torch.Tensor):
        return -value.float() if value.dtype != torch.uint8 else value.flip(0)
    return -value if isinstance(value, (int, float)) and not isinstance(value, bool) else value


CHANGES = [*((lambda _, new=new: new) for new in HOSTILE), without_first, with_more, turned]


@st.composite
def edits(draw, of):
    # sections first, so that the 625 numbers of a generator are not most of the places
    all_places = places(of)
    section = draw(st.sampled_from(sorted(of)))
    path = draw(st.sampled_from([path for path in all_places if path[:1] == (section,)]))
    return path, draw(st.sampled_from(CHANGES))


@pytest.fixture(scope="module")
def finished(stubs, tmp_path_factory):
    """A job of ten steps with checkpoints at each epoch, and the content of the one in its middle."""
    trainer = stubs.job(tmp_path_factory.mktemp("finished"), max_epoch=2)
    trainer.train()
    shutil.rmtree(checkpoint.step_file(trainer.output_dir, 10))
    path = checkpoint.step_file(trainer.output_dir, 5)
    return trainer.output_dir, checkpoint.load(path).content


def continued(stubs, folder, resume):
    """The fault of a job that continues the folder's checkpoint, None where it ends well."""
    try:
        stubs.job(folder, max_epoch=2, resume=resume).train()
    except UserError as error:
        return error.faults
    return None


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_edited_value_ends_in_a_traceback(stubs, finished, tmp_path_factory, data):
    folder, sound = finished
    path, change = data.draw(edits(sound))
    copied = tmp_path_factory.mktemp("edited")
    shutil.copytree(folder, copied / "stub" / folder.name)
    edited = checkpoint.step_file(copied / "stub" / folder.name, 5)
    edit(edited, lambda content: with_value(content, path, change))
    faults = continued(stubs, copied, str(edited))
    assert faults is None or all("\n" not in line and "run.resume" in line for line in faults), faults
    shutil.rmtree(copied)


def test_a_sound_content_is_taken():
    check_content(content(3), 3)
    window = {"sums": {"loss": torch.tensor(float("nan"), dtype=torch.float64)}, "counts": {"loss": 2}}
    check_content(content(3, window=window, best={"step": 2, "metric": -1.5}))
    check_content(content(3, neighbours="ab12"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"position": {"epoch": 0, "step_in_epoch": 3, "global_step": -3, "world_size": 1}},
            "position.global_step: -3",
        ),
        ({"neighbours": 3}, "neighbours: 3 is no text"),
        ({"position": {"epoch": 4, "step_in_epoch": 3, "global_step": 3, "world_size": 1}}, "position.epoch: 4"),
        ({"position": {"epoch": 0, "step_in_epoch": 3, "global_step": True, "world_size": 1}}, "position.global_step"),
        ({"position": {"epoch": 0, "step_in_epoch": 3, "global_step": 3, "world_size": 0}}, "position.world_size: 0"),
        ({"position": {"global_step": 3}}, "position lacks epoch"),
        ({"position": None}, "position: None is no section"),
        ({"model": {"w": [1.0]}}, r"model.'w': \[1.0\] is no tensor"),
        ({"best": {"step": 4, "metric": 1.0}}, "best.step: 4 is no whole number from 0 to 3"),
        ({"best": {"step": 2, "metric": float("nan")}}, "best.metric: nan"),
        ({"health": {"skipped": 1, "in_row": 2, "last_taken": None}}, "health.in_row: 2"),
        ({"health": {"skipped": 1, "in_row": 1, "last_taken": "x"}}, "health.last_taken: 'x'"),
        ({"window": {"sums": {"loss": 1.0}, "counts": {"loss": 1}}}, "window.sums.'loss': 1.0 is no tensor"),
        ({"window": {"sums": {}, "counts": {"loss": 1}}}, "window: its sums and counts"),
        ({"optimizer": 3}, "optimizer: 3 is no section"),
        ({"config": {"model": {}, "datasets": {}}}, "config.run: None is no section"),
        ({"config": {"model": 3, "run": {}}}, "config.model: 3 is no section"),
        ({"config": {"run": {}, "environment": {"model.x": 3}}}, "config.environment: 'model.x' and 3"),
        ({"config": {"model": {}, "datasets": {}, "run": {1: 2}}}, "config.run: its keys must be text"),
        ({"teacher_fingerprint": 1}, "teacher_fingerprint: 1 is no text"),
        ({"rows": {"train": -1}}, "rows.'train': -1"),
        ({"rng": {}}, "rng is no state of the generators"),
    ],
)
def test_values_that_no_job_leaves(changes, words):
    with pytest.raises(ValueError, match=words):
        check_content(content(3, **changes))


def test_best_weights():
    check_best({"model": {"w": torch.ones(1)}, "step": 3, "metric": 1.0}, 3)
    for changes, words in (({"step": 4}, "step: 4"), ({"metric": None}, "metric: None"), ({"model": 1}, "model: 1")):
        with pytest.raises(ValueError, match=words):
            check_best({"model": {}, "step": 3, "metric": 1.0, **changes}, 3)


def test_infinities_where_the_model_has_none():
    mask = {"mask": torch.tensor([0.0, -torch.inf]), "w": torch.ones(2)}
    check_finite(mask, mask)
    with pytest.raises(ValueError, match=r"model\.w has NaN or infinite values"):
        check_finite({**mask, "w": torch.tensor([1.0, torch.nan])}, mask)


EDITS = [
    ("a moment of another shape", ("optimizer", "state", 0, "exp_avg"), lambda _: torch.ones(1)),
    ("a negative square", ("optimizer", "state", 0, "exp_avg_sq"), lambda value: value - 1),
    ("an infinite moment", ("optimizer", "state", 0, "exp_avg"), lambda value: value / 0),
    ("a parameter that is not there", ("optimizer", "state"), lambda value: {**value, 99: value[0]}),
    ("another rate", ("optimizer", "param_groups", 0, "lr"), lambda _: 1e30),
    ("other betas", ("optimizer", "param_groups", 0, "betas"), lambda _: [0.0, 0.0]),
    ("a group less", ("optimizer", "param_groups"), lambda value: value[1:]),
    ("a schedule ahead", ("scheduler", "last_epoch"), lambda _: 1000),
    ("an attribute of the schedule", ("scheduler",), lambda value: {**value, "optimizer": None}),
    ("a NaN weight", ("model", "student.head.weight"), lambda value: value * torch.nan),
    ("a generator's state", ("rng", "torch"), lambda value: value[:-1]),
    ("a negative position", ("position", "step_in_epoch"), lambda _: -1),
]


@pytest.mark.parametrize(("path", "change"), [edit[1:] for edit in EDITS], ids=[edit[0] for edit in EDITS])
def test_an_edited_checkpoint_is_refused_when_named_and_passed_over_by_auto(stubs, tmp_path, caplog, path, change):
    first = stubs.job(tmp_path, max_epoch=2)
    first.train()
    newest = checkpoint.step_file(first.output_dir, 10)
    edit(newest, lambda content: with_value(content, path, change))
    (line,) = continued(stubs, tmp_path, str(newest))
    assert line.startswith(f"run.resume: {newest}: {path[0]}")
    assert continued(stubs, tmp_path, "auto") is None
    assert f"passed over: {line}" in caplog.text and "resumed at step 5" in caplog.text


def test_edited_best_weights_are_chosen_anew(stubs, tmp_path, caplog):
    first = stubs.job(tmp_path, max_epoch=2)
    first.train()
    best = checkpoint.load(checkpoint.step_file(first.output_dir, 10)).content["best"]
    path = checkpoint.best_file(first.output_dir, best["step"] if best else 5)
    edit(path, lambda content: {**content, "model": {"other": torch.ones(1)}})
    assert continued(stubs, tmp_path, "auto") is None
    assert "they are another model's" in caplog.text and "the best is chosen anew" in caplog.text
