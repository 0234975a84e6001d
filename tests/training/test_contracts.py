"""Models and tasks that were written without the loop's classes train all the same."""

import pytest
import torch
from torch import nn

from lavis_dcd.matching.learner import ForeignLearner, Learner, as_learner
from lavis_dcd.training.contracts import ForeignTask, TrainTask, as_task


class Some(nn.Linear):
    """A foreign model with three of the hooks."""

    needs_score_bank = True

    def head_parameter_names(self):
        return {"bias"}

    def checkpoint(self):
        return {"model": self.state_dict(), "arch": "some"}


class Mixed(Learner, nn.Linear):
    pass


def test_a_foreign_model_keeps_its_hooks_and_gets_the_defaults_of_the_others():
    model = Some(2, 1)
    learner = as_learner(model)
    assert type(learner) is ForeignLearner
    assert learner.head_parameter_names() == {"bias"} and learner.checkpoint()["arch"] == "some"
    assert learner.needs_score_bank and not learner.find_unused_parameters
    assert learner.random_captions_per_image == 0
    assert learner.matchers() == {"model": model} and learner.exported() is model
    assert learner.teacher_fingerprint() == "" and learner.sharding_units() == []
    assert learner.views() == {} and learner.view_matchers() == {}
    assert set(as_learner(nn.Linear(2, 1)).checkpoint()["model"]) == {"weight", "bias"}


def test_a_learner_is_taken_as_it_is():
    model = Mixed(2, 1)
    assert as_learner(model) is model
    assert model.matchers() == {"model": model} and model.exported() is model
    assert set(model.checkpoint()["model"]) == {"weight", "bias"}


class Plain:
    """A foreign task with the two methods that every task has."""

    def train_step(self, model, samples):
        return model(samples)

    def evaluate_matcher(self, matcher, dataset, run, device):
        return {"agg_metrics": 1.0, "r_mean": float(len(dataset))}


def test_a_foreign_task_gets_what_it_takes():
    task, sets, cpu = as_task(Plain()), {"val": [1, 2]}, torch.device("cpu")
    assert type(task) is ForeignTask and not task.evaluates_over_ranks
    assert task.prepare(nn.Identity(), sets, None, cpu) == sets
    assert task.wrap_training_set(sets["val"], nn.Identity()) is sets["val"]
    assert task.evaluate_matcher(None, [1, 2], None, cpu, folder="x")["r_mean"] == 2.0
    assert task.gallery({}, [1], None, cpu) == []
    own = TrainTask()
    assert as_task(own) is own
    with pytest.raises(NotImplementedError):
        own.evaluate_matcher(None, [], None)


class Bare(nn.Module):
    """A model without any hook."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, samples):
        return self.inner(samples)


def test_a_job_of_foreign_parts(stubs, tmp_path):
    trainer = stubs.job(tmp_path, Plain(), Bare(stubs.Learner()), max_epoch=1)
    assert trainer.train()["test"]["r_mean"] == 5.0
    assert (trainer.output_dir / "model.pth").is_file()
