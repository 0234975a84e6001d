import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lavis_dcd.cli import guarded
from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.locks import one_writer
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training import checkpoint
from lavis_dcd.training import trainer as trainer_module
from lavis_dcd.training.interrupt import HungUp, Terminated, terminations_raised
from lavis_dcd.training.trainer import Trainer

SCRIPT = Path(__file__).with_name("stub_job.py")


class StopError(Exception):
    pass


def stop():
    raise StopError


def lines(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def results_of(lines):
    """Log lines without what depends on the machine's mood."""
    return [{name: value for name, value in line.items() if name != "data_wait"} for line in lines]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def script(folder, *, processes=0, **options):
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
        command = [*command[:3], "--standalone", *command[3:4]]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return subprocess.run(
        [*command, str(SCRIPT), json.dumps({"folder": str(folder), **options})],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def whole(stubs, tmp_path_factory):
    """An uninterrupted job: 3 epochs of 5 steps."""
    trainer = stubs.job(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def test_what_a_run_folder_holds(whole, stubs):
    folder = whole.output_dir
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "results.json",
        "student.pth",
        "manifest.json",
    } <= names
    assert folder.parent.name == "stub"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["arch"] == "stub" and config["run"]["max_epoch"] == 3
    assert "resumed" not in (folder / "log.txt").read_text()
    student = torch.load(folder / "student.pth", weights_only=True)
    assert student["arch"] == "stub" and student["config"] == {"width": stubs.WIDTH}


def test_results(whole):
    results = json.loads((whole.output_dir / "results.json").read_text())
    assert results["split"] == "test" and results["title"] == "stub"
    assert [row["name"] for row in results["rows"]] == ["teacher", "student before training", "student"]
    assert results["rows"][2]["r_mean"] > results["rows"][1]["r_mean"]
    assert results["gallery"] == [{"query": "q", "names": ["student", "teacher"]}]
    assert results["machine"]["device"] == "cpu"
    peaks = results["machine"]["peak_memory"]
    assert set(peaks) == {"training", "evaluation"} and all(50 < peak["host_mb"] < 1e5 for peak in peaks.values())


def test_results_tell_what_the_teacher_knows_of_its_training_pictures(stubs, tmp_path, caplog):
    class KnowsTraining(stubs.Task):
        def training_sample(self, teacher, like, run):
            return stubs.Pictures(70, noise=0)

        def evaluate_matcher(self, matcher, dataset, run, device, **more):
            found = super().evaluate_matcher(matcher, dataset, run, device, **more)
            return {**found, "img_r1": float(len(dataset))}

    with caplog.at_level("INFO"):
        trainer = stubs.job(tmp_path, KnowsTraining())
        trainer.train()
    results = json.loads((trainer.output_dir / "results.json").read_text())
    assert results["memorised"] == {"split": "test", "pictures": 70, "train_r1": 70.0, "split_r1": 5.0}
    assert "of the training set, the teacher puts the picture first for 70.0 (among 70)" in caplog.text
    found = [(line["split"], line["model"]) for line in lines(trainer.output_dir, "eval") if "pictures" in line]
    assert found == [("train", "teacher")]
    assert [row["name"] for row in results["rows"]] == ["teacher", "student before training", "student"]


def test_a_teacher_that_is_not_evaluated_is_not_in_the_gallery_either(stubs, tmp_path):
    trainer = stubs.job(tmp_path, max_epoch=1, evaluate_teacher=False)
    trainer.train()
    results = json.loads((trainer.output_dir / "results.json").read_text())
    assert results["gallery"] == [{"query": "q", "names": ["student"]}]
    assert "teacher" not in [row["name"] for row in results["rows"]]


def test_metrics_log(whole):
    train = lines(whole.output_dir, "train")
    assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert set(train[0]) == {"kind", "step", "epoch", "lr", "loss", "distill_loss", "data_wait", "skipped_steps"}
    assert all(0 < line["data_wait"] < 1 and line["skipped_steps"] == 0 for line in train)
    assert f"data_wait {train[0]['data_wait']:.4g}\n" in (whole.output_dir / "log.txt").read_text()
    for line in train:
        assert line["distill_loss"] == pytest.approx(2 * line["loss"])
        assert line["epoch"] == pytest.approx(line["step"] / 5)
    found = [(line["step"], line["split"], line["model"]) for line in lines(whole.output_dir, "eval")]
    best = max(int(path.stem.split("-")[1]) for path in whole.output_dir.glob("checkpoints/best-*"))
    assert [line["weights_of_step"] for line in lines(whole.output_dir, "eval")] == [0, 5, 10, 15, best, None]
    assert found == [
        (0, "test", "student"),
        (5, "val", "student"),
        (10, "val", "student"),
        (15, "val", "student"),
        (15, "test", "student"),
        (15, "test", "teacher"),
    ]


def test_evaluation_is_in_eval_mode_and_training_is_not(stubs, tmp_path):
    modes = []
    task = stubs.Task()
    trainer = stubs.job(tmp_path, task, max_epoch=2)
    task.at_step = {number: (lambda: modes.append(trainer.model.training)) for number in (0, 5)}
    trainer.train()
    assert modes == [True, True] and not any(task.modes)
    assert task.folders == {trainer.output_dir}


def test_frozen_parameters_stay(whole, stubs):
    before = stubs.Distiller().student.state_dict()
    after = stubs.weights(whole.output_dir)
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    assert not torch.equal(before["encoder.weight"], after["encoder.weight"])


def test_accumulation_equals_the_large_batch(stubs, tmp_path):
    large = stubs.job(tmp_path / "a", model=stubs.Learner(dropout=0, norm=False), batch_size_train=8, max_epoch=2)
    small = stubs.job(
        tmp_path / "b",
        model=stubs.Learner(dropout=0, norm=False),
        batch_size_train=2,
        accum_grad_iters=4,
        max_steps=4,
        max_epoch=2,
    )
    for trainer in (large, small):
        trainer.datasets["train"].size = 16
        trainer.train()
    assert large.total_steps == small.total_steps == 4
    for name, value in stubs.weights(large.output_dir).items():
        torch.testing.assert_close(stubs.weights(small.output_dir)[name], value, atol=1e-6, rtol=0)
    for one, other in zip(lines(large.output_dir, "train"), lines(small.output_dir, "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


def test_the_last_incomplete_group_divides_by_its_own_size(stubs, tmp_path):
    # 3 batches of 4 in groups of 2: the second group has one batch, so its step is that of no accumulation.
    trainer = stubs.job(tmp_path / "a", model=stubs.Learner(dropout=0), accum_grad_iters=2, max_epoch=1, grad_clip=1e9)
    trainer.datasets["train"].size = 12
    trainer.train()
    assert trainer.total_steps == 2
    norms = []
    for batches in ([0, 1], [2]):
        norms.append(_gradient_norm(stubs, trainer, batches, norms))
    logged = lines(trainer.output_dir, "train")[0]["grad_norm"]
    assert logged == pytest.approx(sum(norms) / 2, rel=1e-5)


def _gradient_norm(stubs, trainer, batches, earlier):
    """The norm of the mean gradient over `batches` of epoch 0, at the step after the `earlier` ones."""
    from lavis_dcd.training.sampler import TrainLoader

    model = stubs.Learner(dropout=0).train()
    data = stubs.Pictures(12)
    all_batches = list(TrainLoader(data, 4, trainer.run.seed).epoch(0))
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.encoder.weight], "lr": 0.05},
            {"params": [model.encoder.bias, *model.norm.parameters()], "lr": 0.05, "weight_decay": 0},
            {"params": [model.head.weight], "lr": 0.25},
            {"params": [model.head.bias], "lr": 0.25, "weight_decay": 0},
        ],
        lr=0.05,
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.01,
    )
    if earlier:
        sum(model(all_batches[n])["loss"] for n in (0, 1)).div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
    (sum(model(all_batches[n])["loss"] for n in batches) / len(batches)).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return float(torch.nn.utils.get_total_norm(grads))


def test_best_weights_are_exported(stubs, tmp_path):
    task = stubs.Task()
    scores = iter([1.0, 5.0, 3.0])
    evaluate = task.evaluate_matcher

    def scripted(matcher, dataset, run, device, **more):
        found = evaluate(matcher, dataset, run, device, **more)
        return {**found, "agg_metrics": next(scores)} if len(dataset) == 6 else found

    task.evaluate_matcher = scripted
    trainer = stubs.job(tmp_path, task)
    trainer.train()
    best, _ = checkpoint.read(checkpoint.best_file(trainer.output_dir, 10), checkpoint.BEST_KIND)
    assert best["metric"] == 5.0
    exported = stubs.weights(trainer.output_dir)
    assert_same(exported, {k.removeprefix("student."): v for k, v in best["model"].items()})
    last = checkpoint.load(checkpoint.step_file(trainer.output_dir, 15)).content
    assert last["best"] == {"step": 10, "metric": 5.0}
    assert not torch.equal(last["model"]["student.head.weight"], exported["head.weight"])


@pytest.mark.parametrize("where", [1, 5, 7, 12])
def test_resume_after_an_exception_is_exact(stubs, tmp_path, whole, where):
    with pytest.raises(StopError):
        stubs.job(tmp_path, stubs.Task({where: stop}), save_every=3).train()
    task = stubs.Task()
    resumed = stubs.job(tmp_path, task, save_every=3, resume="auto")
    resumed.train()
    assert len(list((tmp_path / "stub").iterdir())) == 1
    assert_same(stubs.weights(resumed.output_dir), stubs.weights(whole.output_dir))
    assert results_of(lines(resumed.output_dir, "train")) == results_of(lines(whole.output_dir, "train"))
    assert lines(resumed.output_dir, "eval") == lines(whole.output_dir, "eval")


def test_resume_does_not_load_skipped_samples_nor_repeat_evaluations(stubs, tmp_path):
    with pytest.raises(StopError):
        stubs.job(tmp_path, stubs.Task({13: stop}), save_every=1, keep_last=2).train()
    task = stubs.Task()
    resumed = stubs.job(tmp_path, task, save_every=1, resume="auto")
    resumed.train()
    assert len(resumed.datasets["train"].loaded) == 2 * 4
    assert resumed.datasets["train"].epochs == [2]
    # val after epoch 3, test, teacher; not the student before training, nor val after epochs 1 and 2.
    assert task.evaluated == 3


def test_resume_with_workers_and_accumulation_is_exact(stubs, tmp_path):
    keys = {"num_workers": 1, "accum_grad_iters": 2, "max_epoch": 2, "drop_last": False, "grad_clip": 0.5}
    plain = stubs.job(tmp_path / "a", **{**keys, "num_workers": 0})
    plain.train()
    with pytest.raises(StopError):
        stubs.job(tmp_path / "b", stubs.Task({9: stop}), save_every=2, **keys).train()
    resumed = stubs.job(tmp_path / "b", resume="auto", **keys)
    resumed.train()
    assert_same(stubs.weights(resumed.output_dir), stubs.weights(plain.output_dir))


@pytest.mark.slow
def test_kill_9_and_resume_is_exact(stubs, tmp_path, whole):
    killed = script(tmp_path, kill_at=8, save_every=2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = next((tmp_path / "stub").glob("[!.]*"))
    # What a kill in the middle of a write leaves: a temporary folder, or (on a damaged disk) half a checkpoint.
    half = folder / "checkpoints" / ".step-00000009.x.tmp"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    shutil.copytree(checkpoint.step_file(folder, 8), checkpoint.step_file(folder, 9))
    damaged = checkpoint.step_file(folder, 9) / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    resumed = script(tmp_path, resume="auto", save_every=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 8" in resumed.stderr
    assert "step-00000009 is not whole: tensors.safetensors is cut short" in resumed.stderr
    assert not half.exists()
    assert_same(stubs.weights(folder), stubs.weights(whole.output_dir))


def test_resume_of_a_finished_job_changes_nothing(stubs, tmp_path):
    first = stubs.job(tmp_path)
    first.train()
    before = (first.output_dir / "metrics.jsonl").read_text()
    task = stubs.Task()
    again = stubs.job(tmp_path, task, resume="auto")
    again.train()
    assert again.output_dir == first.output_dir and task.steps == task.evaluated == 0
    assert (first.output_dir / "metrics.jsonl").read_text() == before


def test_resume_auto_without_a_checkpoint_starts_anew(stubs, tmp_path):
    trainer = stubs.job(tmp_path, resume="auto", max_epoch=1)
    trainer.train()
    assert trainer.position.global_step == 5


def test_resume_from_an_earlier_checkpoint_forgets_what_came_later(stubs, tmp_path, whole):
    first = stubs.job(tmp_path)
    first.train()
    path = checkpoint.step_file(first.output_dir, 5)
    task = stubs.Task()
    again = stubs.job(tmp_path, task, resume=str(path))
    again.train()
    assert task.steps == 10
    assert_same(stubs.weights(again.output_dir), stubs.weights(whole.output_dir))
    assert results_of(lines(again.output_dir, "train")) == results_of(lines(whole.output_dir, "train"))


def test_resume_refuses_what_changed(stubs, tmp_path):
    stubs.job(tmp_path, max_epoch=1).train()
    with pytest.raises(UserError) as caught:
        stubs.job(tmp_path, model=stubs.Distiller("t2"), resume="auto", init_lr=0.1)
    text = "\n".join(caught.value.faults)
    assert "teacher" in text and "t1" in text and "t2" in text
    assert "run.init_lr was 0.05 in the checkpoint, is 0.1 now" in text


def test_resume_refuses_other_rows_unless_told(stubs, tmp_path, caplog):
    first = stubs.job(tmp_path, max_epoch=1)
    first.train()
    with pytest.raises(UserError) as caught:
        stubs.job(tmp_path, resume="auto", rows=26)
    assert caught.value.faults[0] == "run.resume: the rows of train changed (22 in the checkpoint, 26 now)"
    assert caught.value.faults[1].endswith("run.resume_force=[data] continues with the change")
    again = stubs.job(tmp_path, resume="auto", resume_force=["data"], rows=26, max_epoch=2)
    assert "the rows of train changed (22 in the checkpoint, 26 now) (run.resume_force)" in caplog.text
    again.train()
    assert again.position.global_step == 12  # two epochs of 26 rows


def test_resume_refuses_another_model_whatever_is_forced(stubs, tmp_path):
    stubs.job(tmp_path, model=stubs.Learner(), max_epoch=1).train()
    everything = ["teacher", "data", "recipe", "world_size"]
    for keys in ({}, {"evaluate": True}):
        with pytest.raises(UserError, match="it is another model's; start a new job"):
            stubs.job(tmp_path, model=stubs.Learner(norm=False), resume="auto", resume_force=everything, **keys)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, HungUp)]
)
def test_a_signal_finishes_the_step_saves_and_raises(stubs, tmp_path, whole, number, error):
    trainer = stubs.job(tmp_path, stubs.Task({6: lambda: os.kill(os.getpid(), number)}))
    handler = signal.getsignal(number)
    with pytest.raises(error):
        trainer.train()
    assert signal.getsignal(number) is handler
    assert checkpoint.step_file(trainer.output_dir, 7).is_dir()
    resumed = stubs.job(tmp_path, resume="auto")
    resumed.train()
    assert_same(stubs.weights(resumed.output_dir), stubs.weights(whole.output_dir))


@pytest.mark.slow
def test_sigterm_to_a_job_and_its_loader_workers(stubs, tmp_path, whole):
    stopped = script(tmp_path, terminate_at=6, num_workers=2)
    assert stopped.returncode == 143, stopped.stderr
    assert "SIGTERM: finishing this step, then saving" in stopped.stderr and "Traceback" not in stopped.stderr
    folder = next((tmp_path / "stub").glob("[!.]*"))
    assert checkpoint.step_file(folder, 7).is_dir()
    resumed = script(tmp_path, resume="auto", num_workers=2)
    assert resumed.returncode == 0, resumed.stderr
    assert_same(stubs.weights(folder), stubs.weights(whole.output_dir))


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(stubs, tmp_path):
    options = {"processes": 2, "batch_size_train": 2, "max_epoch": 2}
    stopped = script(tmp_path / "a", terminate_at=3, terminate_rank=1, **options)
    assert stopped.returncode != 0 and "exitcode  : 143" in stopped.stderr, stopped.stderr
    folder = next((tmp_path / "a" / "stub").glob("[!.]*"))
    assert checkpoint.load(checkpoint.step_file(folder, 4)).content["position"]["world_size"] == 2
    for done in (script(tmp_path / "a", resume="auto", **options), script(tmp_path / "b", **options)):
        assert done.returncode == 0, done.stderr
    assert_same(stubs.weights(folder), stubs.weights(next((tmp_path / "b" / "stub").glob("[!.]*"))))


@pytest.mark.slow
def test_every_process_refuses_and_none_waits_for_another(stubs, tmp_path):
    stubs.job(tmp_path, max_epoch=1).train()
    for words, options in (
        ("number of processes was 1 in the checkpoint, is 2 now", {}),
        (f"{tmp_path}/nothing does not exist", {"resume": f"{tmp_path}/nothing"}),
    ):
        refused = script(tmp_path, **{"processes": 2, "resume": "auto", "max_epoch": 1, **options})
        assert refused.returncode != 0 and refused.stderr.count(words) == 2, refused.stderr


@pytest.mark.slow
def test_two_processes_evaluate_the_weights_of_a_job(stubs, tmp_path, whole):
    done = script(tmp_path, processes=2, evaluate=True, resume=str(whole.output_dir), job_id="mine")
    assert done.returncode == 0 and "evaluating the best weights, of step" in done.stderr, done.stderr
    results = [
        json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "stub/mine", whole.output_dir)
    ]
    assert results[0]["rows"][-1]["r_mean"] == results[1]["rows"][-1]["r_mean"]


@pytest.mark.slow
def test_a_folder_in_use_ends_every_process_of_a_job_with_the_line(stubs, tmp_path):
    stubs.job(tmp_path, job_id="mine", max_epoch=1).train()
    with one_writer(tmp_path / "stub" / "mine", "a test"):
        refused = script(tmp_path, processes=2, resume="auto", max_epoch=1)
    line = f"error: run.output_dir: the run folder {tmp_path}/stub/mine: another process (number {os.getpid()} on"
    assert refused.stderr.count(line) == 2 and "exitcode  : 2" in refused.stderr, refused.stderr
    assert refused.stderr.count("Traceback") == 1  # torchrun's own


def test_sigterm_during_an_evaluation_keeps_what_was_kept(stubs, tmp_path, whole):
    task = stubs.Task()
    evaluate = task.evaluate_matcher

    def stopped(*args, **more):
        if task.evaluated == 2:  # the second validation
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **more)

    task.evaluate_matcher = stopped
    with pytest.raises(Terminated), terminations_raised():
        stubs.job(tmp_path, task).train()
    resumed = stubs.job(tmp_path, resume="auto")
    resumed.train()
    assert_same(stubs.weights(resumed.output_dir), stubs.weights(whole.output_dir))
    assert lines(resumed.output_dir, "eval") == lines(whole.output_dir, "eval")


def test_two_jobs_in_one_process_are_independent(stubs, tmp_path, whole):
    handlers = list(logging.getLogger().handlers)
    first, second = stubs.job(tmp_path), stubs.job(tmp_path, model=stubs.Learner())
    first.train()
    second.train()
    assert first.output_dir != second.output_dir
    assert_same(stubs.weights(first.output_dir), stubs.weights(whole.output_dir))
    assert (second.output_dir / "model.pth").is_file()
    assert logging.getLogger().handlers == handlers


def test_evaluate_only(stubs, tmp_path):
    trainer = stubs.job(tmp_path, evaluate=True)
    found = trainer.train()
    results = json.loads((trainer.output_dir / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["teacher", "student"]
    assert found["test"]["r_mean"] == results["rows"][1]["r_mean"]
    assert not (trainer.output_dir / "student.pth").exists()


def test_evaluate_only_with_the_weights_of_a_job(stubs, tmp_path, whole):
    best = max(whole.output_dir.glob("checkpoints/best-*"))
    path = checkpoint.step_file(whole.output_dir, int(best.stem.split("-")[1]))
    trainer = stubs.job(tmp_path, evaluate=True, resume=str(path))
    rows = json.loads((whole.output_dir / "results.json").read_text())["rows"]
    assert trainer.train()["test"]["r_mean"] == rows[2]["r_mean"]
    assert trainer.output_dir != whole.output_dir


def test_a_job_of_the_same_name_is_not_overwritten(stubs, tmp_path):
    stubs.job(tmp_path, job_id="mine", max_epoch=1).train()
    with pytest.raises(UserError, match=r"run\.job_id"):
        stubs.job(tmp_path, job_id="mine")


def test_missing_splits_are_listed(stubs, tmp_path):
    with pytest.raises(UserError) as caught:
        stubs.job(tmp_path, valid_splits=["dev"], test_splits=["held"])
    assert len(caught.value.faults) == 2
    assert "run.valid_splits: the data sets have no split 'dev'; there are test, train, val" in caught.value.faults


def test_a_loss_that_is_not_finite_stops_the_job(stubs, tmp_path):
    trainer = stubs.job(tmp_path, init_lr=1e30, warmup=0.0)
    with pytest.raises(UserError, match="the loss is"):
        trainer.train()


def test_max_steps_ends_in_the_middle_of_an_epoch(stubs, tmp_path):
    trainer = stubs.job(tmp_path, max_steps=7)
    trainer.train()
    assert trainer.position.global_step == 7
    assert [line["step"] for line in lines(trainer.output_dir, "eval") if line["split"] == "val"] == [5, 7]


def test_bf16_autocast_trains(stubs, tmp_path):
    trainer = stubs.job(tmp_path, amp="bf16", max_epoch=1)
    trainer.train()
    assert stubs.weights(trainer.output_dir)["head.weight"].dtype == torch.float32


def test_fp16_on_a_cpu_is_refused(stubs, tmp_path):
    with pytest.raises(UserError, match=r"run\.amp"):
        stubs.job(tmp_path, amp="fp16")


@pytest.mark.slow
def test_two_processes_train_like_one(stubs, tmp_path):
    done = script(tmp_path / "two", processes=2, batch_size_train=2, max_epoch=1)
    assert done.returncode == 0, done.stderr
    folder = next((tmp_path / "two" / "stub").glob("[!.]*"))
    assert len(lines(folder, "train")) == 3
    results = json.loads((folder / "results.json").read_text())
    assert results["machine"]["processes"] == 2
    assert not any(key.startswith("module.") for key in stubs.weights(folder))


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "x" * 300, "a\0b", "", "a\nb", 7])
@pytest.mark.parametrize("which", ["project", "job_id"])
def test_no_name_leads_out_of_the_output_folder(stubs, tmp_path, name, which):
    datasets = {"train": stubs.Pictures(), "val": stubs.Pictures(6), "test": stubs.Pictures(5)}
    run = RunConfig(output_dir=str(tmp_path / "out"), device="cpu")
    with pytest.raises(UserError, match=f"run.{which}: "):
        Trainer(run, {}, stubs.Task(), stubs.Distiller(), datasets, **{which: name})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [2, 1000])
def test_a_job_of_which_every_step_is_skipped_does_not_end_well(stubs, tmp_path, most):
    class Broken(stubs.Task):
        def train_step(self, model, samples):
            return model(samples)["loss"] * float("nan")

    trainer = stubs.job(tmp_path, Broken(), max_bad_steps=most)
    assert guarded(lambda: trainer.train() and None) == 2
    assert not (trainer.output_dir / "student.pth").exists() and not (trainer.output_dir / "results.json").exists()
    text = (trainer.output_dir / "log.txt").read_text()
    assert (
        "Traceback" in text and ("every one of the 15 steps was skipped" if most > 15 else "run.max_bad_steps") in text
    )


@pytest.mark.parametrize("how", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("moved"))])
def test_a_run_folder_that_goes_is_one_line_and_no_half_a_folder(stubs, tmp_path, capsys, how):
    trainer = stubs.job(tmp_path, save_every=2)
    trainer.task.at_step[5] = lambda: how(trainer.output_dir)
    assert guarded(lambda: trainer.train() and None) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and str(trainer.output_dir) in line
    assert not trainer.output_dir.exists()


@pytest.mark.usefixtures("permissions_count")
def test_a_run_folder_that_may_not_be_written_any_more(stubs, tmp_path, capsys):
    trainer = stubs.job(tmp_path, save_every=2)
    trainer.task.at_step[5] = lambda: (trainer.output_dir / "checkpoints").chmod(0o500)
    assert guarded(lambda: trainer.train() and None) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "Permission denied" in line
    assert "Traceback" in (trainer.output_dir / "log.txt").read_text()
    (trainer.output_dir / "checkpoints").chmod(0o700)


def test_a_full_disk_at_the_exported_student(stubs, tmp_path, capsys, monkeypatch):
    """A limit on the size of files is met by torch's own writer, which wraps what the system says."""
    trainer = stubs.job(tmp_path, max_epoch=1)
    export = trainer_module.export_model

    def limited(*args):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
        try:
            return export(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(trainer_module, "export_model", limited)
    assert guarded(lambda: trainer.train() and None) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(trainer.output_dir / "student.pth") in line and "File too large" in line
    assert "Traceback" in (trainer.output_dir / "log.txt").read_text()
    assert not list(trainer.output_dir.glob(".*.tmp")) and not (trainer.output_dir / "student.pth").exists()


def test_what_comes_from_the_environment_is_in_no_file(stubs, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2-token")
    secrets.remember(OmegaConf.create({"a": "${oc.env:MY_TOKEN}"}))
    config = {"model": {"arch": "stub", "text": "hunter2-token/bert"}, "datasets": {"noise": {"root": "hunter2-token"}}}
    written = {"model": {"arch": "stub", "text": "${oc.env:MY_TOKEN}/bert"},
               "datasets": {"noise": {"root": "${oc.env:MY_TOKEN}"}}}  # fmt: skip

    class Task(stubs.Task):
        def gallery(self, *args):
            return []

    class Student(stubs.Learner):
        def checkpoint(self):
            return {**super().checkpoint(), "config": {"text": {"name": "hunter2-token/bert"}, "width": 6}}

    def job(value=None, **more):
        datasets = {"train": stubs.Pictures(), "val": stubs.Pictures(6, noise=0), "test": stubs.Pictures(5, noise=0)}
        keys = {"output_dir": str(tmp_path / "hunter2-token"), "max_epoch": 1, "device": "cpu", "valid_splits": ["val"],
                "batch_size_train": 4, "job_id": "x", **more}  # fmt: skip
        run = RunConfig(**keys)
        stored = {**written, "run": run.to_dict()}
        values = config if value is None else {**config, "datasets": {"noise": {"root": value}}}
        return Trainer(run, values, Task(), Student(), datasets, "stub", written=stored)

    try:
        trainer = job()
        trainer.train()
        files = [path for path in trainer.output_dir.rglob("*") if path.is_file()]
        assert len(files) > 6 and [path for path in files if b"hunter2" in path.read_bytes()] == []
        model = torch.load(trainer.output_dir / "model.pth", weights_only=True)
        assert model["config"] == {"text": {"name": "${oc.env:MY_TOKEN}/bert"}, "width": 6}
        assert "${oc.env:MY_TOKEN}/bert" in (trainer.output_dir / "config.yaml").read_text()
        job(resume="auto")
        with pytest.raises(
            UserError, match=r"datasets.noise.root was .*MY_TOKEN}' in the checkpoint, is .*another value"
        ):
            job("another-value", resume="auto")
    finally:
        secrets.forget()
