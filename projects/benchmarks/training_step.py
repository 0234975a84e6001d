"""What one distillation step costs, from the published code's way to the steady state, shortcut by shortcut.

The first row computes the step as the published code does: for each picture the teacher encodes picture and caption
anew for each of the 1 + C candidates (padded to 40 tokens) and runs its six fusion layers on all of them; the student,
three layers, does the same with its 1 + K kept pairs, forward and backward. Each further row adds one shortcut to the
row above it:

  once         pictures and captions go through the towers once per step
  trimmed      captions without their padding; pairs in chunks of a bounded memory
  sdpa         F.scaled_dot_product_attention instead of matrices of attention weights
  first_layer  the first fusion layer's self-attention once per picture and caption
  last_layer   the last fusion layer for the class tokens only
  fresh        cross-attention with short captions at low rank: all exact shortcuts, fresh candidates every step
  features     the frozen towers' features were kept: no tower runs
  steady       the teacher's scores were kept, too: no teacher at all

Each row runs in a process of its own with the same random weights and inputs. "step MB" is how far the process rises
during a step above what it holds before (models, gradients, optimizer state, kept features). The last two columns
compare the teacher's scores and the student's gradients with the first row's, without dropout: an exact shortcut shows
rounding only. Dropout is the recipe's 0.1 in what is timed; the optimizer's own step is not (once per batch).

Geometries: small (default; about two minutes on two cores) and meter-base-384 (METER-base at 384 px with the counts
of the Flickr30K recipe; several minutes and about 8 GB of memory); tiny, of a few seconds, is for tests.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from geometries import Geometry, training_geometry
from measuring import PeakMemory, bar_chart, in_child, parsed, parser, progress, report
from safetensors.torch import load_file, save_file
from step_rows import COMPILED_ROWS, EXTRA_ROWS, ROWS, Step, StepBatch, StepRow, build_models
from torch import Tensor, nn

COLUMNS = {
    "row": "row|s",
    "label": "what it adds|s",
    "s_per_image": "s/image|.3f",
    "faster": "times faster|.2f",
    "step_mb": "step MB|,.0f",
    "memory_share": "share of plain|.0%",
    "models_mb": "held before, MB|,.0f",
    "score_difference": "scores differ by|.1e",
    "gradient_difference": "gradients differ by|.1e",
}
EXACT = 1e-4


@dataclass(frozen=True)
class Plan:
    """The counts of a run."""

    geometry: Geometry
    candidates: int
    hard_negatives: int
    images: int
    repeats: int
    seed: int


def reference(plan: Plan, file: str) -> None:
    """The plain path's scores, choice and gradients on the counts of the check, without dropout, as safetensors."""
    teacher, student = build_models(plan.geometry, plan.seed)
    save_file(_checked(plan, ROWS[0], teacher, student, None), file)


def measure(plan: Plan, row: StepRow, file: str) -> dict[str, Any]:
    """One row's figures; ``file`` holds what ``reference`` wrote."""
    teacher, student = build_models(plan.geometry, plan.seed)
    student.config.fusion.grad_checkpoint = row.checkpoint
    for model in (teacher, student):
        model.config.fusion.compile = row.compiled
    differences = _differences(plan, row, teacher, student, load_file(file))
    optimizer = _optimizer(student)
    batch = StepBatch.drawn(plan.geometry, student, plan.images, plan.candidates, plan.seed)
    step = Step(row, teacher, student, batch, plan.hard_negatives)
    step.prepare()
    teacher = None  # with the scores kept, nothing holds it now
    # what only a first call pays, on as few pairs as can be
    warm = Step(row, step.teacher or student, student, StepBatch.drawn(plan.geometry, student, 1, 1, 0), 1)
    warm.prepare()
    warm.run()
    del warm
    seconds, busy = [], []
    with PeakMemory() as memory:
        for _ in range(plan.repeats):
            optimizer.zero_grad(set_to_none=False)
            start, start_busy = time.perf_counter(), time.process_time()
            step.run()
            seconds.append((time.perf_counter() - start) / plan.images)
            busy.append((time.process_time() - start_busy) / plan.images)
    return {
        "row": row.name,
        "label": row.label,
        "exact": row.exact,
        "s_per_image": statistics.median(seconds),
        "all_seconds_per_image": seconds,
        "cpu_s_per_image": statistics.median(busy),  # of all threads together
        "step_mb": memory.extra / 1e6,
        "models_mb": memory.start / 1e6,
        **differences,
    }


def _optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """AdamW with its state, and gradients in place, as from a run's second step on."""
    learning = [p for p in student.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(learning, lr=0.0)
    optimizer.step()
    return optimizer


def _differences(
    plan: Plan, row: StepRow, teacher: nn.Module, student: nn.Module, expected: dict[str, Tensor]
) -> dict[str, float]:
    """Largest differences from the plain path: of scores, as a share of their spread; of a tensor's gradient, its
    norm as a share of the gradient's, or of a hundredth of the model's largest: what is smaller is mostly rounding.
    """
    found = _checked(plan, row, teacher, student, expected["columns"])
    scores = expected["scores"]
    spread = float(scores.max() - scores.min())
    if found["scores"].shape != scores.shape:  # of the kept pairs only
        scores = scores.gather(1, found["columns"])
    gradients = {name: value for name, value in expected.items() if name.startswith("gradient.")}
    least = 1e-2 * max(float(value.norm()) for value in gradients.values())
    return {
        "score_difference": float((found["scores"] - scores).abs().max()) / spread,
        "gradient_difference": max(
            float((found[name] - value).norm()) / max(float(value.norm()), least) for name, value in gradients.items()
        ),
    }


def _checked(
    plan: Plan, row: StepRow, teacher: nn.Module, student: nn.Module, columns: Tensor | None
) -> dict[str, Tensor]:
    candidates, hard_negatives, images = plan.geometry.check
    batch = StepBatch.drawn(plan.geometry, student, images, candidates, plan.seed + 1)
    step = Step(row, teacher, student.eval(), batch, hard_negatives)
    step.prepare(columns)
    result = step.run(columns)
    gradients = {f"gradient.{name}": p.grad for name, p in student.named_parameters() if p.requires_grad}
    student.train()
    for parameter in student.parameters():
        parameter.grad = None
    return {"scores": result.teacher_scores, "columns": result.columns, **gradients}


def run_rows(plan: Plan, rows: list[StepRow]) -> list[dict[str, Any]]:
    """Each row in a process of its own, and the ratios between them."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "plain.safetensors")
        progress("the plain path's scores and gradients, to compare with ...")
        in_child(reference, plan, file)
        found = []
        for row in rows:
            found.append(in_child(measure, plan, row, file))
            progress(f"{row.name}: {found[-1]['s_per_image']:.3f} s per image, step {found[-1]['step_mb']:,.0f} MB")
    if found[0]["row"] == "plain":
        for row in found:
            row["faster"] = found[0]["s_per_image"] / row["s_per_image"]
            row["memory_share"] = row["step_mb"] / max(found[0]["step_mb"], 1e-3)
    return found


def _options(argv: list[str] | None) -> tuple[argparse.Namespace, list[StepRow]]:
    known = {row.name: row for row in (*ROWS, *EXTRA_ROWS, *COMPILED_ROWS)}
    options_of = parser(__doc__)
    options_of.add_argument("--geometry", choices=("small", "meter-base-384", "tiny"), default="small")
    options_of.add_argument("--candidates", type=int, metavar="C", help="drawn captions per picture (63; tiny: 7)")
    options_of.add_argument("--hard-negatives", type=int, metavar="K", help="of them, for the student (7; tiny: 3)")
    options_of.add_argument("--images", type=int, metavar="N", help="pictures of a step (1; tiny: 2)")
    options_of.add_argument("--repeats", type=int, help="timed steps; the median is shown (small: 2; else 1)")
    rows_help = f"only these rows, of {', '.join(known)}; those with torch.compile take minutes"
    options_of.add_argument("--rows", metavar="A,B", help=rows_help)
    options_of.add_argument("--extra", action="store_true", help="also rows that trade time for memory or precision")
    options_of.add_argument("--chart", type=Path, metavar="PATH", help="draw a bar chart into this SVG file")
    options = parsed(options_of, argv)
    names = [row.name for row in (*ROWS, *(EXTRA_ROWS if options.extra else ()))]
    if options.rows:
        names = options.rows.split(",")
    if unknown := [name for name in names if name not in known]:
        options_of.error(f"--rows: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return options, [row for name, row in known.items() if name in names]


def main(argv: list[str] | None = None) -> None:
    options, rows = _options(argv)
    geometry = training_geometry(options.geometry)
    counts = {
        name: getattr(geometry if getattr(options, name) is None else options, name)
        for name in ("candidates", "hard_negatives", "images", "repeats")
    }
    if min(counts.values()) < 1 or counts["hard_negatives"] > counts["candidates"]:
        raise SystemExit("--candidates, --hard-negatives, --images and --repeats must be at least 1, and K at most C")
    found = run_rows(Plan(geometry, seed=options.seed, **counts), rows)
    settings = {"geometry": options.geometry, **counts, "seed": options.seed, "dropout": 0.1}
    report("training_step", settings, found, COLUMNS, options.json)
    if options.chart is not None:
        panels = {"seconds per image": [r["s_per_image"] for r in found], "step MB": [r["step_mb"] for r in found]}
        bar_chart(f"One distillation step, {options.geometry}", [r["label"] for r in found], panels, options.chart)
    worst = max((max(r["score_difference"], r["gradient_difference"]) for r in found if r["exact"]), default=0.0)
    if not worst < EXACT:
        raise SystemExit(f"a row differs from the plain path by {worst:.1e}, more than {EXACT:.0e}")


if __name__ == "__main__":
    main()
