"""Recalls on a job's validation split by ``model.fusion_weight``, to choose it after a training.

    python tools/fusion_weight.py --cfg-path projects/dcd/flickr8k_fusion_teacher.yaml --options \\
        model.finetuned=output/flickr8k_fusion_teacher/model.pth

The fusion scores the shortlist once; each further weight costs nothing.
"""

from __future__ import annotations

import argparse
import logging

import lavis  # noqa: F401  registers LAVIS's own names, then ours
import torch

from lavis_dcd.cli import guarded
from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.evaluation.fusion_weights import recalls_by_weight
from lavis_dcd.job import load_config
from lavis_dcd.runners.runner_dcd import by_split
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask

FIGURES = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_sum")


def main() -> None:
    """Read the command line, print a line per weight."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--cfg-path", required=True, help="a job of a meter_retrieval with a joint head")
    words.add_argument(
        "--options", nargs="+", default=[], help="a.b=c over the file; model.finetuned names the weights"
    )
    words.add_argument("--weights", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3])
    args = words.parse_args()
    job = load_config(args.cfg_path, args.options, evaluate=True)
    if job.run.k_test is None or not job.run.valid_splits:
        raise UserError("run.k_test, run.valid_splits: give both, a shortlist of the validation split is reranked")
    if job.run.num_threads:
        torch.set_num_threads(job.run.num_threads)
    task = DcdRetrievalTask.setup_task(cfg=job)
    split = job.run.valid_splits[0]
    model = task.build_model(job).eval()
    sets = task.prepare(model, {split: by_split(task.build_datasets(job), job.run)[split]}, job.run)
    evaluator = Evaluator(EvaluationProtocol.of_run(job.run), dataset_of=task.dataset_for)
    print("weight  " + "  ".join(f"{name:>7}" for name in FIGURES))
    for weight, found in recalls_by_weight(model, sets[split], evaluator, job.run.k_test, args.weights).items():
        print(f"{weight:6g}  " + "  ".join(f"{found[name]:7.1f}" for name in FIGURES), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    raise SystemExit(guarded(main))
