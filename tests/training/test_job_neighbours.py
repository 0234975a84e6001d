"""A job whose batches are neighbourhoods: exact resume, and the table that its run folder keeps."""

from __future__ import annotations

import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.batches_section import BatchesConfig
from lavis_dcd.datasets.neighbours import NeighbourTable
from lavis_dcd.training.job_neighbours import FILE

ROWS = 22  # 11 pictures, 2 rows each
BATCHES = BatchesConfig(size=3, share=0.75)


class StopError(Exception):
    """Stands for whatever ends a process."""


def stop() -> None:
    raise StopError


@pytest.fixture
def task_class(stubs):
    class Task(stubs.Task):
        """Neighbours drawn from `seed`; counts how often they were found."""

        def __init__(self, at_step=None, seed: int = 0) -> None:
            super().__init__(at_step)
            self.seed, self.found = seed, 0

        def neighbours(self, dataset, model, run) -> NeighbourTable:
            assert run.batches == BATCHES and len(dataset) == ROWS
            self.found += 1
            torch.rand(1)  # whoever finds neighbours may draw
            generator = torch.Generator().manual_seed(self.seed)
            nearest = torch.stack([torch.randperm(11, generator=generator)[:4] for _ in range(11)]).int()
            return NeighbourTable.of(torch.arange(ROWS) // 2, nearest)

    return Task


def assert_same(stubs, one, other) -> None:
    there = stubs.weights(other)
    for name, value in stubs.weights(one).items():
        assert torch.equal(value, there[name]), name


@pytest.mark.parametrize("where", [1, 7])
def test_a_resumed_job_goes_on_with_the_same_batches(stubs, tmp_path, task_class, where):
    """The table comes from the run folder: found anew, perhaps elsewhere, it might be another one."""
    whole = stubs.job(tmp_path / "whole", task_class(), save_every=1, batches=BATCHES)
    whole.train()
    with pytest.raises(StopError):
        stubs.job(tmp_path / "parted", task_class({where: stop}), save_every=1, batches=BATCHES).train()
    task = task_class(seed=1)
    resumed = stubs.job(tmp_path / "parted", task, save_every=1, resume="auto", batches=BATCHES)
    resumed.train()
    assert task.found == 0
    assert_same(stubs, resumed.output_dir, whole.output_dir)


def test_the_batches_are_others_than_without(stubs, tmp_path, task_class):
    jobs = [stubs.job(tmp_path / "a", task_class(), batches=BATCHES), stubs.job(tmp_path / "b", task_class())]
    for job in jobs:
        job.train()
    one, other = (stubs.weights(job.output_dir)["head.weight"] for job in jobs)
    assert not torch.equal(one, other)
    assert jobs[0].task.found == 1 and jobs[1].task.found == 0
    assert (jobs[0].output_dir / FILE).is_file() and not (jobs[1].output_dir / FILE).exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_table_that_is_gone_is_found_anew_and_must_be_the_same(stubs, tmp_path, task_class, damage):
    whole = stubs.job(tmp_path / "whole", task_class(), save_every=1, batches=BATCHES)
    whole.train()
    with pytest.raises(StopError):
        stubs.job(tmp_path / "parted", task_class({7: stop}), save_every=1, batches=BATCHES).train()
    (file,) = tmp_path.glob(f"parted/stub/*/{FILE}")
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        task_class(seed=2).neighbours(range(ROWS), None, whole.run).save(file)
    resume = {"save_every": 1, "resume": "auto", "batches": BATCHES}
    with pytest.raises(UserError, match=r"run\.resume: the neighbours of run\.batches changed .*resume_force=\[data\]"):
        stubs.job(tmp_path / "parted", task_class(seed=1), **resume).train()
    resumed = stubs.job(tmp_path / "parted", task_class(), **resume)
    resumed.train()
    assert resumed.task.found == 1
    assert_same(stubs, resumed.output_dir, whole.output_dir)


def test_other_neighbours_are_taken_where_that_is_forced(stubs, tmp_path, task_class, caplog):
    with pytest.raises(StopError):
        stubs.job(tmp_path, task_class({7: stop}), save_every=1, batches=BATCHES).train()
    task = task_class(seed=1)
    keys = {"save_every": 1, "resume": "auto", "resume_force": ["data"], "batches": BATCHES}
    stubs.job(tmp_path, task, **keys).train()
    assert task.found == 1
    assert any("the neighbours of run.batches changed" in line for line in caplog.messages)


def test_resume_refuses_other_batches_unless_told(stubs, tmp_path, task_class):
    with pytest.raises(StopError):
        stubs.job(tmp_path, task_class({7: stop}), save_every=1).train()
    with pytest.raises(UserError, match=r"run\.batches was None in the checkpoint, is .*") as caught:
        stubs.job(tmp_path, task_class(), save_every=1, resume="auto", batches=BATCHES)
    assert "run.resume_force=[data]" in caught.value.faults[-1]
    forced = {"resume_force": ["data"], "batches": BATCHES}
    stubs.job(tmp_path, task_class(), save_every=1, resume="auto", **forced).train()


def test_an_evaluation_finds_no_neighbours(stubs, tmp_path, task_class):
    task = task_class()
    stubs.job(tmp_path, task, batches=BATCHES, evaluate=True).train()
    assert task.found == 0


def test_a_task_without_neighbours_says_so(stubs, tmp_path):
    with pytest.raises(UserError, match=r"run\.batches\.by: teacher, but the task Task finds no neighbours"):
        stubs.job(tmp_path, batches=BATCHES).train()


def test_a_table_of_other_rows_ends_the_job(stubs, tmp_path, task_class):
    class Other(task_class):
        def neighbours(self, dataset, model, run):
            return NeighbourTable.of(torch.tensor([0, 1]), torch.tensor([[1], [0]], dtype=torch.int32))

    with pytest.raises(UserError, match="the neighbours are of 2 rows, the training set has 22"):
        stubs.job(tmp_path, Other(), batches=BATCHES).train()


def test_the_key_of_the_rows_is_the_former_batch_by(stubs, tmp_path):
    class Families(stubs.Pictures):
        annotation = [{"image_id": index, "family": index % 3} for index in range(ROWS)]  # noqa: RUF012

    jobs = []
    for name, keys in (("old", {"batch_by": "family"}), ("new", {"batches": BatchesConfig(by="family")}), ("none", {})):
        job = stubs.job(tmp_path / name, **keys)
        job.datasets["train"] = Families()
        job.train()
        jobs.append(job.output_dir)
    assert_same(stubs, jobs[0], jobs[1])
    old, none = (stubs.weights(folder)["head.weight"] for folder in (jobs[0], jobs[2]))
    assert not torch.equal(old, none)


@pytest.mark.parametrize(
    ("keys", "where"), [({"batch_by": "x"}, "batch_by"), ({"batches": BatchesConfig(by="x")}, r"batches\.by")]
)
def test_a_key_that_no_row_has_is_told_where_it_stands(stubs, tmp_path, keys, where):
    with pytest.raises(UserError, match=rf"run\.{where}: the rows have no 'x'"):
        stubs.job(tmp_path, **keys).train()
