import os
from pathlib import Path

import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.checkpoint import Checkpoint
from lavis_dcd.training.resume_checks import Origin, changed_data, check_shapes, fingerprint, resume_faults, splits_of

CONFIG = {
    "model": {"arch": "dcd", "loss": {"alpha": 0.2}, "teacher": {"arch": "meter"}},
    "datasets": {"own": {"build_info": {"images": "x"}}},
    "run": RunConfig().to_dict(),
}
ROWS, PICTURES = {"train": "f", "test": "e"}, {"train": "d", "test": "c"}


def origin(config=CONFIG, teacher="abc", rows=ROWS, pictures=PICTURES, **counts):
    return Origin(config, teacher, "", {"train": 22, "test": 5, **counts}, Identity({}, rows, pictures))


def saved(now=None, world_size=1):
    """A checkpoint of a job."""
    now = now or origin()
    content = {
        "config": now.config,
        "position": {"global_step": 3, "world_size": world_size},
        "teacher_fingerprint": now.teacher_fingerprint,
        "rows": now.rows,
    }
    return Checkpoint(Path("x"), content, now.identity)


def with_run(**keys):
    return {**CONFIG, "run": {**CONFIG["run"], **keys}}


def test_nothing_refused_when_nothing_changed():
    changed = with_run(resume="auto", max_epoch=99, num_workers=3, resume_force=["data"], keep_best=4)
    assert resume_faults(saved(), origin(changed), 1) == ([], [])


def test_each_change_is_named_and_what_overrides_it():
    changed = {
        "model": {"arch": "dcd", "loss": {"alpha": 0.5}, "teacher": {"arch": "vilt"}},
        "datasets": {"own": {"build_info": {"images": "y"}}, "more": {}},
        "run": {**CONFIG["run"], "seed": 1, "accum_grad_iters": 2},
    }
    now = origin(changed, "abd", {**ROWS, "train": "g"}, {"train": "x", "test": "y"}, train=23)
    wanted = [
        "the teacher's weights changed (fingerprint abc in the checkpoint, abd now)",
        "model.loss.alpha was 0.2 in the checkpoint, is 0.5 now",
        "model.teacher.arch was 'meter' in the checkpoint, is 'vilt' now",
        "datasets.more was None in the checkpoint, is {} now",
        "datasets.own.build_info.images was 'x' in the checkpoint, is 'y' now",
        "the rows of train changed (22 in the checkpoint, 23 now)",
        "the pictures of test changed: the size, time or content of a file",
        "run.seed was 42 in the checkpoint, is 1 now",
        "run.accum_grad_iters was 1 in the checkpoint, is 2 now",
        "number of processes was 1 in the checkpoint, is 2 now",
    ]
    lines, passed = resume_faults(saved(), now, 2)
    assert passed == [] and lines == [
        *(f"run.resume: {line}" for line in wanted),
        "run.resume: put these back to continue the job, or start a new one without run.resume; "
        "run.resume_force=[teacher,recipe,data,world_size] continues with the change",
    ]
    lines, passed = resume_faults(saved(), now, 2, ["teacher", "recipe", "data", "world_size"])
    assert lines == [] and passed == [f"run.resume: {line} (run.resume_force)" for line in wanted]


@pytest.mark.parametrize(("kind", "number"), [("teacher", 2), ("recipe", 2), ("data", 3), ("world_size", 2)])
def test_a_flag_lets_its_own_kind_pass_only(kind, number):
    changed = {
        "model": {"arch": "dcd", "loss": {"alpha": 0.5}, "teacher": {"arch": "vilt"}},
        "datasets": {},
        "run": {**CONFIG["run"], "seed": 1, "accum_grad_iters": 2, "train_splits": ["a"]},
    }
    now = origin(changed, "abd", {**ROWS, "train": "g"}, train=23)
    everything = len(resume_faults(saved(), now, 2)[0]) - 1
    lines, passed = resume_faults(saved(), now, 2, [kind])
    # data: the data sets' section, the rows, the splits
    assert len(passed) == number and len(lines) - 1 == everything - number
    assert f"run.resume_force=[{kind}," in lines[-1]


@pytest.mark.parametrize("key", ["init_lr", "head_lr_multiplier", "weight_decay", "betas", "eps", "lr_sched", "amp"])
def test_what_the_optimizer_keeps_cannot_be_forced(key):
    changed = origin(with_run(**{key: "other"}))
    lines, passed = resume_faults(saved(), changed, 1, ["teacher", "recipe", "data", "world_size"])
    assert passed == [] and len(lines) == 2
    assert lines[0].startswith(f"run.resume: run.{key} was ") and "resume_force" not in lines[1]


def test_another_split_than_before_is_no_change_but_another_training_set_is():
    before = saved(origin(rows={"train.0": "f", "train.1": "g", "val": "x"}, pictures={}))
    now = origin(rows={"train.0": "f", "test": "y"}, pictures={"test": "z"})
    assert changed_data(before.identity, now.identity) == {"train.1": "rows"}
    assert changed_data(now.identity, before.identity) == {"train.1": "rows"}


def test_pictures_are_not_compared_when_other_contents_were_read():
    now = origin(with_run(picture_content="all"), pictures={"train": "x", "test": "y"})
    lines, _ = resume_faults(saved(), now, 1)
    assert lines[:-1] == ["run.resume: run.picture_content was 'sample' in the checkpoint, is 'all' now"]
    assert lines[-1].endswith("run.resume_force=[data] continues with the change")


def test_rows_of_the_same_number():
    lines, _ = resume_faults(saved(), origin(rows={**ROWS, "test": "x"}), 1)
    assert lines[0] == "run.resume: the rows of test changed (5 as before)"


def test_a_long_or_odd_value_is_one_line():
    lines, _ = resume_faults(saved(), origin({**CONFIG, "datasets": {"own\n": "x\n" * 10_000}}), 1)
    assert all(len(line) < 1100 and line.isprintable() for line in lines)


class Rows(list):
    pass


def pictured_set(rows, folder=None):
    found = Rows([None] * len(rows))
    found.annotation, found.vis_root = rows, str(folder)
    return found


def test_the_origin_of_a_job(tmp_path):
    rows = [{"image": "a.jpg", "caption": "a dog", "image_id": 1}, {"image": "b.jpg", "caption": "ä", "image_id": 2}]
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())

    def of(changed=rows, content="sample"):
        joint = torch.utils.data.ConcatDataset([pictured_set(rows, tmp_path), pictured_set(rows[:1], tmp_path)])
        return Origin.of(CONFIG, "abc", "", {"train": joint, "test": pictured_set(changed, tmp_path)}, content)

    first = of()
    assert first.rows == {"train.0": 2, "train.1": 1, "test": 2}
    assert of() == first
    assert changed_data(first.identity, of(rows[::-1]).identity) == {"test": "rows"}
    before = {name: of(content=name).identity for name in ("sample", "all")}
    (tmp_path / "b.jpg").write_bytes(b"B")
    os.utime(tmp_path / "b.jpg", ns=(1, 1))
    for content, identity in before.items():
        changed = changed_data(identity, of(content=content).identity)
        assert changed == {"train.0": "pictures", "test": "pictures"}


def test_a_model_s_fingerprint():
    model = torch.nn.Linear(2, 2)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.bias[0] += 1
    assert fingerprint(model) != before


def test_another_model_is_refused_whatever_is_forced():
    own = {"a": torch.ones(2, 3), "b": torch.ones(1), "c": torch.ones(1)}
    check_shapes("x", dict(own), own)
    with pytest.raises(UserError) as caught:
        check_shapes("x", {"a": torch.ones(3, 2), "c": torch.ones(1, dtype=torch.int8), "d": torch.ones(1)}, own)
    assert caught.value.faults == [
        "run.resume: x: a is (3, 2) there, (2, 3) in the model",
        "run.resume: x: c is torch.int8 there, torch.float32 in the model",
        "run.resume: x lacks 1 weights of the model, first b",
        "run.resume: x has 1 weights that the model has not, first d",
        "run.resume: it is another model's; start a new job without run.resume",
    ]


def test_the_splits_of_plain_sets():
    names = ["train.0", "val.2014", "vals"]
    assert splits_of(names, ["train", "val.2014", "val", "test"]) == {"train", "val.2014", "val"}
    assert splits_of(["values"], ["val"]) == set()
