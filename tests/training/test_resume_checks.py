import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.resume_checks import check_shapes, data_fingerprint, resume_faults

CONFIG = {
    "model": {"arch": "dcd", "loss": {"alpha": 0.2}, "teacher": {"arch": "meter"}},
    "datasets": {"own": {"build_info": {"images": "x"}}},
    "run": RunConfig().to_dict(),
}
DATA = {"train": {"rows": 22, "sha256": "f" * 64}}
SAVED = {
    "config": CONFIG,
    "position": {"global_step": 3, "world_size": 1},
    "teacher_fingerprint": "abc",
    "data": DATA,
}


def with_run(**keys):
    return {**CONFIG, "run": {**CONFIG["run"], **keys}}


def test_nothing_refused_when_nothing_changed():
    changed = with_run(resume="auto", max_epoch=99, num_workers=3, resume_force=["data"], keep_best=4)
    assert resume_faults(SAVED, changed, "abc", 1, DATA) == ([], [])


def test_each_change_is_named_and_what_overrides_it():
    changed = {
        "model": {"arch": "dcd", "loss": {"alpha": 0.5}, "teacher": {"arch": "vilt"}},
        "datasets": {"own": {"build_info": {"images": "y"}}, "more": {}},
        "run": {**CONFIG["run"], "seed": 1, "accum_grad_iters": 2},
    }
    data = {"train": {"rows": 23, "sha256": "e" * 64}}
    wanted = [
        "the teacher's weights changed (fingerprint abc in the checkpoint, abd now)",
        "model.loss.alpha was 0.2 in the checkpoint, is 0.5 now",
        "model.teacher.arch was 'meter' in the checkpoint, is 'vilt' now",
        "datasets.more was None in the checkpoint, is {} now",
        "datasets.own.build_info.images was 'x' in the checkpoint, is 'y' now",
        "the rows of train.rows was 22 in the checkpoint, is 23 now",
        "the rows of train.sha256 was 'ffffffffffff' in the checkpoint, is 'eeeeeeeeeeee' now",
        "run.seed was 42 in the checkpoint, is 1 now",
        "run.accum_grad_iters was 1 in the checkpoint, is 2 now",
        "number of processes was 1 in the checkpoint, is 2 now",
    ]
    lines, passed = resume_faults(SAVED, changed, "abd", 2, data)
    assert passed == [] and lines == [
        *(f"run.resume: {line}" for line in wanted),
        "run.resume: put these back to continue the job, or start a new one without run.resume; "
        "run.resume_force=[teacher,recipe,data,world_size] continues with the change",
    ]
    lines, passed = resume_faults(SAVED, changed, "abd", 2, data, ["teacher", "recipe", "data", "world_size"])
    assert lines == [] and passed == [f"run.resume: {line} (run.resume_force)" for line in wanted]


@pytest.mark.parametrize(("kind", "number"), [("teacher", 2), ("recipe", 2), ("data", 4), ("world_size", 2)])
def test_a_flag_lets_its_own_kind_pass_only(kind, number):
    changed = {
        "model": {"arch": "dcd", "loss": {"alpha": 0.5}, "teacher": {"arch": "vilt"}},
        "datasets": {},
        "run": {**CONFIG["run"], "seed": 1, "accum_grad_iters": 2, "train_splits": ["a"]},
    }
    data = {"train": {"rows": 23, "sha256": "f" * 64}}
    everything = len(resume_faults(SAVED, changed, "abd", 2, data)[0]) - 1
    lines, passed = resume_faults(SAVED, changed, "abd", 2, data, [kind])
    if kind == "data":
        number = 3  # the data sets' section, the number of rows, the splits
    assert len(passed) == number and len(lines) - 1 == everything - number
    assert f"run.resume_force=[{kind}," in lines[-1]


@pytest.mark.parametrize("key", ["init_lr", "head_lr_multiplier", "weight_decay", "betas", "eps", "lr_sched", "amp"])
def test_what_the_optimizer_keeps_cannot_be_forced(key):
    changed = with_run(**{key: "other"})
    lines, passed = resume_faults(SAVED, changed, "abc", 1, DATA, ["teacher", "recipe", "data", "world_size"])
    assert passed == [] and len(lines) == 2
    assert lines[0].startswith(f"run.resume: run.{key} was ") and "resume_force" not in lines[1]


class Rows(list):
    pass


def training_set(rows):
    found = Rows([None] * len(rows))
    found.annotation = rows
    return found


def test_the_fingerprint_of_rows():
    rows = [{"image": "a.jpg", "caption": "a dog", "image_id": 1}, {"image": "b.jpg", "caption": "ä", "image_id": 2}]
    found = data_fingerprint(training_set(rows))
    assert found["train"]["rows"] == 2
    assert data_fingerprint(training_set([dict(row) for row in rows])) == found
    assert data_fingerprint(training_set([dict(reversed(row.items())) for row in rows])) == found
    for changed in (rows[::-1], rows[:1], [rows[0], {**rows[1], "caption": "a"}]):
        assert data_fingerprint(training_set(changed)) != found
    joint = torch.utils.data.ConcatDataset([training_set(rows), training_set(rows[:1])])
    assert [part["rows"] for part in data_fingerprint(joint).values()] == [2, 1]
    assert data_fingerprint(Rows([1, 2, 3])) == {"train": {"rows": 3}}
    assert data_fingerprint(None) == {}


def test_another_model_is_refused_whatever_is_forced():
    own = {"a": torch.ones(2, 3), "b": torch.ones(1), "c": torch.ones(1)}
    check_shapes("x", dict(own), own)
    with pytest.raises(UserError) as caught:
        check_shapes("x", {"a": torch.ones(3, 2), "c": torch.ones(1), "d": torch.ones(1)}, own)
    assert caught.value.faults == [
        "run.resume: x: a is (3, 2) there, (2, 3) in the model",
        "run.resume: x lacks 1 weights of the model, first b",
        "run.resume: x has 1 weights that the model has not, first d",
        "run.resume: it is another model's; start a new job without run.resume",
    ]
