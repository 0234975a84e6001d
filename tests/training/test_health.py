"""Steps that are not finite: skipped as if they had not been, counted, and after too many in a row the end."""

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.reporting.report import write_report
from lavis_dcd.training.devices import Process
from lavis_dcd.training.health import Blame, Health, ScoreWatch, blame, last_good, picture_names
from lavis_dcd.training.step import Stepper
from lavis_dcd.training.strategy import Strategy

CPU = Process(torch.device("cpu"))
NAN, INF = float("nan"), float("inf")


def batches(stubs, *numbers, **marks):
    found = []
    for number in numbers:
        image = torch.randn(4, stubs.WIDTH, generator=torch.Generator().manual_seed(number))
        ids = torch.arange(4) + 10 * number
        found.append({"image": image, "target": image.mean(dim=1), "image_id": ids})
    for row, value in marks.get("spoilt", {}).items():
        found[row]["image"][2, 0] = value
    return iter(found)


def stepper(stubs, **run):
    model = stubs.Learner()
    keys = {"init_lr": 0.05, "batch_size_train": 4, "device": "cpu", **run}
    return model, Stepper(stubs.Task(), Strategy(model, CPU), RunConfig(**keys), total_steps=10)


def everything(model, stepped):
    state = {key: value for key, value in stepped.state_dict().items() if key != "health"}
    return copy.deepcopy({"model": model.state_dict(), **state})


def assert_equal(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_leaves_everything_as_it_was(stubs, value, first, caplog):
    model, taken = stepper(stubs, grad_clip=1.0)
    for number in range(0 if first else 3):
        assert set(taken.step(batches(stubs, number), 1, number, {})) == {"loss", "distill_loss", "grad_norm"}
    before, rate = everything(model, taken), taken.lr
    # the second of two micro-batches: the first one's gradient goes with it
    with caplog.at_level(logging.WARNING):
        assert taken.step(batches(stubs, 7, 8, spoilt={1: value}), 2, 3, {}) == {}
    assert_equal(before, everything(model, taken))
    assert taken.lr == rate and all(p.grad is None for p in model.parameters())
    assert (taken.health.skipped, taken.health.in_row) == (1, 1)
    assert "step 4 skipped: NaN or infinite: distill_loss; pictures 80, 81, 82, 83" in caplog.text
    assert taken.step(batches(stubs, 9), 1, 4, {})["loss"] > 0
    assert (taken.health.skipped, taken.health.in_row) == (1, 0)


def test_training_goes_on_as_if_the_batch_had_not_come(stubs):
    results = []
    for spoilt in ({}, {0: NAN}):
        model, taken = stepper(stubs)
        if spoilt:
            taken.step(batches(stubs, 5, spoilt=spoilt), 1, 99, {})
        for number in range(4):
            taken.step(batches(stubs, number), 1, number, {})
        results.append(everything(model, taken))
    assert_equal(*results)


def test_a_gradient_that_is_not_finite_names_its_group(stubs, caplog):
    model, taken = stepper(stubs)
    hook = model.head.bias.register_hook(lambda gradient: gradient * INF)
    before = everything(model, taken)
    assert taken.step(batches(stubs, 1, 2), 2, 0, {}) == {}
    assert_equal(before, everything(model, taken))
    assert "the gradient of head/no_decay; pictures 10, 11, 12, 13, 20, 21, 22, 23" in caplog.text
    hook.remove()
    assert taken.step(batches(stubs, 1), 1, 1, {})


def test_causes_come_first_and_a_sound_micro_batch_is_not_blamed():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    sound = {"loss": 1.0, "teacher_match_score": NAN}  # no query had a negative
    broken = {
        "loss": NAN, "contrastive_loss": 1.0, "distill_loss": NAN, "in_batch_loss": INF, "student_loss": 2.0,
        "teacher_match_score": INF, "student_match_score": 0.5, "teacher_misranked": 0.0,
    }  # fmt: skip
    reports = [{name: torch.tensor(value) for name, value in report.items()} for report in (sound, broken)]
    found = blame(reports, [torch.tensor([1, 2]), ["a", "b", "a"]], optimizer)
    assert found == Blame(("teacher scores", "distill_loss", "in_batch_loss"), ("a", "b"), in_loss=True)
    bare = blame([{"loss": torch.tensor(INF)}], [None], optimizer)
    assert bare == Blame(("loss",), (), in_loss=True)


def test_fp16_may_overflow_at_a_large_scale():
    health, found = Health(CPU), Blame(("the gradient of base/decay",), (1,), in_loss=False)
    for number in range(20):
        health.skip(number, found, scale=65536.0 / 2**number)
    assert health.skipped == 20 and health.in_row == 4  # at 1, 1/2, 1/4 and 1/8 it is no matter of scale
    lost = Health(CPU)
    lost.skip(0, Blame(("loss",), (1,), in_loss=True), scale=65536.0)
    assert lost.in_row == 1


# -- whole jobs --------------------------------------------------------------------------------------------------


def spoilt_job(stubs, folder, bad, **run):
    """A job whose training pictures have ids, and of which `bad(epoch, index)` are NaN."""

    class Spoilt(stubs.Pictures):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            epoch = self.epochs[-1] if self.epochs else 0
            image = torch.full_like(item["image"], NAN) if bad(epoch, index) else item["image"]
            return {**item, "image": image, "image_id": 100 + index}

    trainer = stubs.job(folder, **run)
    trainer.datasets["train"] = Spoilt()
    return trainer


def train_lines(trainer):
    lines = [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "data_wait": 0} for line in lines if line["kind"] == "train"]


def test_a_bad_picture_costs_its_batch_and_no_more(stubs, tmp_path):
    trainer = spoilt_job(stubs, tmp_path, lambda epoch, index: index == 3, drop_last=False)
    trainer.train()
    skipped = [line["skipped_steps"] for line in train_lines(trainer)]
    assert skipped == sorted(skipped) and skipped[-1] == 3  # once in each epoch
    assert all(torch.isfinite(value).all() for value in stubs.weights(trainer.output_dir).values())
    log = (trainer.output_dir / "log.txt").read_text()
    assert "skipped_steps 3" in log and log.count("skipped: NaN or infinite: distill_loss; pictures") == 3
    results = json.loads((trainer.output_dir / "results.json").read_text())
    (trainer.output_dir / "results.json").write_text(json.dumps({**results, "gallery": []}))  # the stub's has no shape
    page = write_report(trainer.output_dir).read_text()
    assert "3 of 18: their loss or gradient was NaN or infinite" in page and "Skipped steps" not in page
    assert "peak memory of training" in page and "peak memory of evaluation" in page


def test_too_many_in_a_row_end_the_job(stubs, tmp_path):
    trainer = spoilt_job(stubs, tmp_path, lambda epoch, index: epoch > 0, save_every=2, max_bad_steps=3)
    with pytest.raises(UserError) as stopped:
        trainer.train()
    (line,) = stopped.value.faults
    assert line.startswith(
        "run.max_bad_steps: the loss is NaN or infinite in 3 steps in a row, up to step 8; "
        "what broke: distill_loss; pictures of the last batch: 1"
    )
    # the fifth step was sound, so the weights after four are known to be; after five they are only likely to be
    assert f"last good checkpoint: {trainer.output_dir}/checkpoints/step-00000004" in line
    assert trainer.position.global_step == 8


def test_a_resumed_job_keeps_the_count(stubs, tmp_path):
    def bad(epoch, index):
        return (epoch, index) in ((0, 3), (1, 5))

    whole = spoilt_job(stubs, tmp_path / "whole", bad, drop_last=False)
    whole.train()

    def stop():
        raise OSError

    cut = spoilt_job(stubs, tmp_path / "cut", bad, drop_last=False, save_every=1)
    cut.task.at_step[14] = stop
    with pytest.raises(OSError):
        cut.train()
    again = spoilt_job(stubs, tmp_path / "cut", bad, drop_last=False, save_every=1, resume="auto")
    again.train()
    assert train_lines(again)[-1]["skipped_steps"] == 2
    assert_equal(stubs.weights(whole.output_dir), stubs.weights(again.output_dir))


def test_a_row_of_bad_steps_goes_on_over_a_resume(stubs, tmp_path):
    first = spoilt_job(stubs, tmp_path, lambda epoch, index: epoch > 0, save_every=1, max_bad_steps=4)

    def stop():
        raise OSError

    first.task.at_step[7] = stop  # after two bad steps
    with pytest.raises(OSError):
        first.train()
    options = {"save_every": 1, "max_bad_steps": 4, "resume": "auto"}
    with pytest.raises(UserError, match="in 4 steps in a row, up to step 9"):
        spoilt_job(stubs, tmp_path, lambda epoch, index: epoch > 0, **options).train()


@pytest.mark.slow
def test_all_processes_skip_together(tmp_path):
    script = Path(__file__).with_name("skip_together.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["skipped"] == 2 and found[0]["taken"] == [True, False, False, True]
    assert "pictures of the last batch: 120, 121, 122, 123;" in found[0]["error"]  # those of the second process


# -- words -------------------------------------------------------------------------------------------------------


def test_the_message_names_files_and_ten_pictures_at_most(tmp_path):
    rows = [{"image_id": f"coco_{number}", "image": f"val/{number}.jpg"} for number in range(11)]
    pictures = SimpleNamespace(img_ids={f"coco_{number}": number for number in range(12)}, annotation=rows)
    assert picture_names(pictures)[3] == "val/3.jpg"
    assert picture_names([1, 2]) == {}
    health = Health(CPU)
    health.skip(0, Blame(("distill_loss",), tuple(range(12)), in_loss=True), None)
    with pytest.raises(UserError, match=r"0 \(val/0\.jpg\), 1 .* 9 \(val/9\.jpg\) and 2 more; last good .*: none yet"):
        health.check(1, 1, tmp_path, pictures)
    health.check(2, 1, tmp_path, pictures)
    health.took(1)
    health.check(1, 2, tmp_path, pictures)


def test_the_last_good_checkpoint_is_one_whose_weights_gave_a_finite_loss(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert last_good(tmp_path, 3) is None
    for step in (4, 6, 8):
        (folder / f"step-{step:08d}.pth").touch()
    (folder / "step-00000009.pth.tmp").touch()
    for last_taken, step in ((7, 6), (6, 6), (5, 4), (8, 8), (None, 8), (3, 8)):
        assert last_good(tmp_path, last_taken) == folder / f"step-{step:08d}.pth"


def test_max_bad_steps_is_a_positive_number():
    assert RunConfig().max_bad_steps == 5
    with pytest.raises(UserError, match=r"run\.max_bad_steps: 0 must be greater than 0"):
        RunConfig(max_bad_steps=0)


# -- scores that tell of trouble ------------------------------------------------------------------------------------


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_dead_student_is_told_once_and_not_after_a_single_step(told):
    watch = ScoreWatch()
    watch.see({"student_spread": 0.0}, 4)
    watch.see({"student_spread": 0.3}, 1)  # it moved: counted anew
    watch.see({"student_spread": 0.0}, 4)
    assert told() == []
    for _ in range(3):
        watch.see({"student_spread": 5e-7}, 2)
    (line,) = told()
    assert line.startswith("the student scores all candidates of a query alike (6 steps now)")


def test_a_teacher_worse_than_chance_is_told_once(told):
    watch = ScoreWatch()
    for rank in (0.9, 0.1, 0.1, 0.1, 0.1, 0.49, 0.49, 0.49, 0.49, 0.49):
        watch.see({"teacher_match_rank": rank}, 1)
    assert told() == []
    for _ in range(3):
        watch.see({"teacher_match_rank": 0.75}, 5)
    (line,) = told()
    assert line.startswith("the teacher is worse than chance: 75 % of the other candidates stand above the match")


def test_a_model_that_says_nothing_of_them_is_left_alone(told):
    watch = ScoreWatch()
    watch.see({"loss": 1.0}, 100)
    watch.see({}, 0)
    assert told() == []


def test_a_job_of_skipped_steps_alone_is_not_finished():
    health = Health(CPU)
    broken = Blame(("loss",), (), in_loss=True)
    for number in range(3):
        health.skip(number, broken, None)
    with pytest.raises(UserError, match="every one of the 3 steps was skipped"):
        health.refuse_untaken(3)
    resumed = Health(CPU)
    resumed.load_state_dict(health.state_dict())
    with pytest.raises(UserError):
        resumed.refuse_untaken(3)
    health.took(3)
    health.refuse_untaken(4)
    Health(CPU).refuse_untaken(0)


@pytest.mark.parametrize(
    "report",
    [{"loss": torch.tensor(0.0)}, {"loss": torch.tensor(0.5), "student_spread": torch.tensor(NAN)}],
    ids=["a loss of 0", "no spread"],
)
def test_batches_without_a_negative_are_told_once(report, caplog):
    watch = ScoreWatch()
    with caplog.at_level(logging.WARNING):
        watch.note({"loss": torch.tensor(0.5), "student_spread": torch.tensor(0.1)})
        watch.note({})
        watch.see({}, 2)
        assert caplog.messages == []
        for _ in range(2):
            watch.note(report)
            watch.note({"loss": torch.tensor(0.5)})
            watch.see({}, 2)
    (line,) = caplog.messages
    assert line.startswith("1 of 2 steps had no negative at all") and "raise run.batch_size_train" in line
