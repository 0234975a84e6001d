"""The tool that lists recalls by the fusion's weight."""

import runpy
import sys

import pytest
import torch

from lavis_dcd.models.meter import MeterRetrieval

SIZES = {
    "vision": {"image_size": 64, "patch_size": 16, "width": 8, "layers": 1, "heads": 2},
    "text": {"family": "bert", "name": "asset:quickstart/vocab.txt",
             "config": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "intermediate_size": 16}},
    "fusion": {"width": 8, "layers": 1, "heads": 2},
    "joint_head": {"dim": 8, "hidden": 8},
}  # fmt: skip


def test_a_line_per_weight(tmp_path, repo_root, capsys, monkeypatch):
    torch.manual_seed(0)
    torch.save(MeterRetrieval.from_config(SIZES).checkpoint(), tmp_path / "model.pth")
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: {arch: meter_retrieval, model_type: null, joint_head: true, text: {name: 'asset:quickstart/vocab.txt'},"
        f" vision: {{image_size: 64}}, finetuned: {tmp_path}/model.pth}}\n"
        "datasets: {shape_scenes: {build_info: {scenes: {train: 30, val: 12, test: 12}}}}\n"
        "run: {task: dcd_retrieval, runner: runner_dcd, k_test: 3, valid_splits: [val], device: cpu}\n"
    )
    monkeypatch.setattr(sys, "argv", ["fusion_weight", "--cfg-path", str(job), "--weights", "0", "2"])
    runpy.run_path(str(repo_root / "tools" / "fusion_weight.py"))["main"]()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split() == ["weight", "txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_sum"]
    assert [line.split()[0] for line in lines] == ["0", "2"]
    for line in lines:
        *recalls, total = map(float, line.split()[1:])
        assert total == pytest.approx(sum(recalls), abs=0.4)
