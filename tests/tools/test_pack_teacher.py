"""The shipped teacher's format: half precision, with its configuration and its log beside it."""

import runpy

import torch

from lavis_dcd.models.meter import MeterRetrieval

SIZES = {
    "vision": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2},
    "text": {"family": "bert", "name": "asset:quickstart/vocab.txt",
             "config": {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "intermediate_size": 16}},
    "fusion": {"width": 8, "layers": 2, "heads": 2},
}  # fmt: skip


def test_a_packed_model_opens_as_itself_in_half_the_room(tmp_path, repo_root):
    pack = runpy.run_path(str(repo_root / "tools" / "pack_teacher.py"))["pack"]
    model = MeterRetrieval.from_config(SIZES).eval()
    (tmp_path / "run").mkdir()
    torch.save(model.checkpoint(), tmp_path / "run" / "model.pth")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train"}\n')
    pack(tmp_path / "run" / "model.pth", tmp_path, tmp_path / "logs")
    assert (tmp_path / "logs" / "teacher_log.jsonl").read_text() == '{"kind": "train"}\n'
    packed = MeterRetrieval.from_config({"finetuned": str(tmp_path / "teacher.safetensors")}).eval()
    assert packed.config.fusion.layers == 2
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(packed.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
