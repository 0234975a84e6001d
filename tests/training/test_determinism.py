"""Same seed, same machine, same result bit for bit, with any number of loader workers."""

import json

import pytest
import torch
from safetensors.torch import load_file

WORKERS = (0, 1, 3)


def lines(folder):
    """metrics.jsonl but for what a clock or the memory says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    moods = {"data_wait", "ms_per_pair", "ms_per_search"}
    return [{key: value for key, value in line.items() if key not in moods} for line in found]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def stub_runs(stubs, tmp_path_factory):
    """Two epochs on noisy, augmented pictures with dropout, once per number of workers, and 0 workers again."""
    runs = []
    for workers in (*WORKERS, 0):
        torch.manual_seed(len(runs))  # whatever the process drew before
        folder = tmp_path_factory.mktemp("run")
        trainer = stubs.job(folder, max_epoch=2, num_workers=workers, accum_grad_iters=2, drop_last=False)
        trainer.train()
        runs.append((lines(trainer.output_dir), stubs.weights(trainer.output_dir)))
    return runs


@pytest.mark.parametrize("number", [1, 2, 3])
def test_workers_change_no_bit(stub_runs, number):
    (lines_of_none, weights_of_none), (found, weights) = stub_runs[0], stub_runs[number]
    assert found == lines_of_none
    assert_same(weights_of_none, weights)


def test_another_seed_changes_the_result(stubs, stub_runs, tmp_path):
    trainer = stubs.job(tmp_path, max_epoch=2, accum_grad_iters=2, drop_last=False, seed=43)
    trainer.train()
    weights = stubs.weights(trainer.output_dir)
    assert any(not torch.equal(weights[name], value) for name, value in stub_runs[0][1].items())


@pytest.mark.slow
@pytest.mark.parametrize(("cache_features", "numbers"), [("off", (0, 3)), ("memory", WORKERS)])
def test_the_quickstart_is_the_same_with_any_number_of_workers(job, cache_features, numbers):
    found = []
    for workers in numbers:
        torch.manual_seed(workers)
        run = {"job_id": f"w{workers}", "num_workers": workers, "cache_features": cache_features}
        folder = job("quickstart", {
            "model": {"selection": {"hard_negatives": 3}},
            "datasets": {"shape_scenes": {"build_info": {"scenes": {"train": 30, "val": 12, "test": 12}}}},
            "run": {**run, "max_steps": 4, "k_test": 6, "report": False},
        }).parent / f"w{workers}"  # fmt: skip
        found.append((lines(folder), exported(folder)))
    for lines_found, weights in found[1:]:
        assert lines_found == found[0][0]
        assert_same(found[0][1], weights)


def exported(folder):
    if (folder / "student.safetensors").is_file():
        return load_file(folder / "student.safetensors")
    return torch.load(folder / "student.pth", weights_only=True)["model"]
