"""METER under LAVIS's own retrieval task: the same recalls as ours."""

from types import SimpleNamespace

import pytest
import torch
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask
from omegaconf import OmegaConf

from lavis_dcd.evaluation.metrics import retrieval_metrics
from lavis_dcd.models.meter import MeterRetrieval

TINY = {
    "vision": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2},
    "text": {"family": "bert", "name": "asset:quickstart/vocab.txt",
             "config": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "intermediate_size": 16}},
    "fusion": {"width": 8, "layers": 2, "heads": 2},
    "joint_head": {"dim": 4, "hidden": 8},
}  # fmt: skip


class Scenes(torch.utils.data.Dataset):
    text = ("a red ring", "a blue star", "a green plus", "a small box", "a pink circle", "two rings")
    txt2img = {t: t // 2 for t in range(6)}  # noqa: RUF012
    img2txt = {i: [2 * i, 2 * i + 1] for i in range(3)}  # noqa: RUF012

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index)), "index": index}


@pytest.mark.parametrize("k_test", [None, 2])
def test_lavis_s_task_reports_our_recalls(k_test, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = MeterRetrieval.from_config(TINY).eval()
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path))
    loader = SimpleNamespace(dataset=Scenes())
    task = RetrievalTask(OmegaConf.create({"k_test": k_test} if k_test else {}))
    model.before_evaluation(dataset=loader.dataset, task_type=RetrievalTask)
    theirs = task.evaluation(model, loader)
    scores = model.compute_sim_matrix(loader, task_cfg=task.cfg)
    ours = retrieval_metrics(*scores, Scenes.txt2img, Scenes.img2txt)
    assert scores[0].shape == (3, 6) and scores[1].shape == (6, 3)
    assert {k: theirs[k] for k in ("txt_r1", "img_r1", "r_mean")} == pytest.approx(
        {k: ours[k] for k in ("txt_r1", "img_r1", "r_mean")}
    )
