"""A script for torchrun: evaluates matchers alone and over the processes, on sets of several sizes.

Argument: a JSON file {"models": [model sections], "counts": [numbers of pictures], "out": a file}. Writes, per case,
the greatest difference of the scores (relative where the greatest score is above 1), whether the figures are the same,
whether features on disk give the same scores to the bit, and which pictures each process read.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lavis_dcd.common.processes import ProcessGroup, gather_objects
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.models.building import build_matcher

WORDS = ("a red square", "there is one blue bar on white", "a grey stripe", "green")


class Noise(torch.utils.data.Dataset):
    """Pictures of noise with two captions each; `read` lists the pictures taken."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, []
        self.text = [f"{WORDS[i % 4]} {WORDS[i % 3]}"[: 8 + i] for i in range(2 * count)]
        self.img2txt = {i: [2 * i, 2 * i + 1] for i in range(count)}
        self.txt2img = {t: t // 2 for t in range(2 * count)}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        self.read.append(index)
        return {"image": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)), "index": index}


def compare(name: str, matcher, count: int, protocol: EvaluationProtocol, ranks: ProcessGroup) -> dict:
    alone, shared = Noise(count), Noise(count)
    expected = Evaluator(protocol).evaluate(matcher, alone)
    found = Evaluator(protocol, ranks=ranks).evaluate(matcher, shared)
    on_disk = Evaluator(replace(protocol, eval_memory_mb=1e-3), ranks=ranks).evaluate(matcher, Noise(count))
    figures = {key for key in expected if key not in ("ms_per_pair", "ms_per_search")}
    return {
        "case": f"{name}, {count} pictures, {expected['how']}",
        "difference": max(
            float((one - other).abs().max() / other.abs().max().clamp_min(1))
            for one, other in (
                (found.scores_i2t, expected.scores_i2t),
                (found.scores_t2i, expected.scores_t2i),
            )
        ),
        "same_on_disk": torch.equal(on_disk.scores_i2t, found.scores_i2t)
        and torch.equal(on_disk.scores_t2i, found.scores_t2i),
        "same_figures": all(found[key] == expected[key] for key in figures),
        "figures": sorted(figures),
        # the set's first picture is read once more, to see how big features are
        "read": gather_objects(shared.read[1:], ranks),
        "pictures": count,
    }


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    ranks = ProcessGroup.here()
    matchers = {}
    for section in asked["models"]:
        torch.manual_seed(1)
        matchers[section["arch"]] = build_matcher(section, "model")
    torch.manual_seed(2)
    matchers["ensemble"] = Ensemble([*matchers.values(), build_matcher(asked["models"][0], "model")])
    cases = [
        compare(name, matcher, count, EvaluationProtocol(k_test=k_test, batch_size=2), ranks)
        for name, matcher in matchers.items()
        for count in asked["counts"]
        for k_test in (None, 2)
    ]
    if ranks.rank == 0:
        Path(asked["out"]).write_text(json.dumps(cases))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
