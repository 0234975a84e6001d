"""The `run:` section of a job."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.names import name_fault, path_fault
from lavis_dcd.common.seeding import seed_fault
from lavis_dcd.common.texts import shown
from lavis_dcd.config.batches_section import BatchesConfig

FP16_ON_CPU = "run.amp: fp16 needs CUDA; on a CPU set run.amp=bf16 or off"


@dataclass
class RunConfig:
    """Every key of `run:`, with its type and default. Values are checked on construction.

    Raises:
        UserError: one line per value that makes no sense.
    """

    task: str = "dcd_retrieval"  # LAVIS's name of the task
    runner: str = "runner_dcd"  # LAVIS's name of the runner

    # Where the outputs go: ``<output_dir>/<project>/<job_id>``
    project: str | None = None  # default: the stem of the config file
    output_dir: str = "output"  # below the current folder, unless absolute
    job_id: str | None = None  # default: the time of the start
    report: bool = True  # write report.html

    # The machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    amp: Literal["off", "bf16", "fp16"] = "off"  # fp16 needs CUDA
    strategy: Literal["ddp", "fsdp"] = "ddp"  # of several processes; fsdp shards what learns
    num_threads: int | None = None  # torch's CPU threads; default: torch's own choice
    num_workers: int = 0  # processes that load the data; 0: the training process itself
    seed: int = 42  # of everything drawn: weights, order of the data, dropout

    # The length and the size of the steps
    max_epoch: int = 10  # epochs; training ends earlier at max_steps
    max_steps: int | None = None  # optimizer steps; ends training earlier than max_epoch
    batch_size_train: int = 64  # per process
    batch_size_eval: int = 64  # items encoded at once in an evaluation
    accum_grad_iters: int = 1  # micro-batches averaged in one optimizer step
    drop_last: bool = True  # leave out an epoch's last batch where it is smaller than the others
    batches: BatchesConfig | None = None  # pictures that meet in a batch; null: any, at random
    batch_by: str | None = None  # the former way to write batches: {by: KEY}

    # The optimizer
    init_lr: float = 1e-4  # base rate
    min_lr: float = 0.0  # where the schedule ends
    head_lr_multiplier: float = 5.0  # factor on the base rate for fusion layers and heads
    weight_decay: float = 0.01  # of weights; biases and norms have none
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # AdamW's
    eps: float = 1e-8  # AdamW's
    lr_sched: Literal["linear_warmup_linear", "cosine", "constant", "linear_warmup_cosine_lr", "constant_lr"] = (
        "linear_warmup_linear"  # the last two are LAVIS's names of the two before them
    )
    warmup: float = 0.1  # a fraction of all steps
    warmup_steps: int | None = None  # the same as a number of steps; wins over warmup
    grad_clip: float | None = None  # the largest gradient norm
    max_bad_steps: int = 5  # steps with a NaN or infinite loss or gradient are skipped; so many in a row end the job

    # Evaluations: of what, and when
    train_splits: list[str] = field(default_factory=lambda: ["train"])  # joined to one training set
    valid_splits: list[str] = field(default_factory=list)  # the first one's mean recall chooses the best weights
    test_splits: list[str] = field(default_factory=list)  # of the final table; none: the validation splits
    evaluate: bool = False  # evaluate only
    evaluate_before: bool = True  # the student before its first step, on the test splits
    evaluate_teacher: bool = True  # the table's row of the teacher
    teacher_split_eval: list[str] | None = None  # the teacher's splits; default: the test splits
    # the teacher also on as many training pictures as the first of these splits has, which tells what it has memorised;
    # it takes as long as that split. null: for dual encoders, and ensembles of them, whose pairs cost nothing
    evaluate_teacher_on_train: bool | None = None
    eval_every_epochs: int = 1  # epochs between two evaluations on the validation splits
    k_test: int | None = None  # rerank only that many per query, the best by a joint space; null: score every pair
    shortlist: str | None = None  # whose joint space: the name of a matcher; null or joint: the model's own
    match_memory_mb: float = 1024  # MiB of the rows gathered for one call of a matcher
    eval_memory_mb: float = 4096  # features of one evaluation that take more are read from disk; the scores are equal
    coco_1k_folds: bool = False  # add COCO's 1K protocol to the results

    # Data
    cache_features: Literal["off", "memory", "disk"] = "off"  # frozen towers run once per item, without augmentation
    cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # how precisely features are kept
    # check pictures at the start; full decodes each one, fast reads its header
    verify: Literal["fast", "full", "off"] = "fast"
    # contents that a manifest compares: of 1000 pictures of each set, or of all
    picture_content: Literal["sample", "all"] = "sample"

    # Checkpoints and logs
    save_every: int | None = None  # optimizer steps; a checkpoint is also written at the end of each epoch
    keep_last: int = 2  # newest checkpoints that stay
    keep_best: int = 1  # best weights; those that a kept checkpoint speaks of stay in any case
    resume: str | None = None  # "auto", a checkpoint, or a run folder
    # Differences from the checkpoint that a resumed job accepts
    resume_force: list[Literal["teacher", "data", "recipe", "world_size"]] = field(default_factory=list)
    log_freq: int = 50  # steps between two lines of the log

    # Accepted so that LAVIS's own YAML files load. Derived from the environment (torchrun), hence never read
    world_size: int | None = None  # LAVIS's
    dist_url: str = "env://"  # LAVIS's
    distributed: bool | None = None  # LAVIS's
    use_dist_eval_sampler: bool | None = None  # LAVIS's

    def __post_init__(self) -> None:
        found = self.faults()
        if found:
            raise UserError(found)

    def faults(self) -> list[str]:
        """Return one line per value out of its range; empty when the section is sound."""
        if found := self._kind_faults():  # the comparisons below take numbers
            return found + self._place_faults()
        found = self._range_faults()
        if not 0 <= self.warmup <= 1:
            found.append(f"run.warmup: {self.warmup!r} is a fraction of all steps, 0 to 1 (see run.warmup_steps)")
        if self.amp == "fp16" and self.device == "cpu":
            found.append(FP16_ON_CPU)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"run.betas: {self.betas!r} must be two numbers in [0, 1)")
        if not self.train_splits and not self.evaluate:
            found.append("run.train_splits: is empty, so there is nothing to train on; run.evaluate=true evaluates")
        if self.batch_by is not None and self.batches is not None:
            found.append(
                f"run.batch_by: {shown(self.batch_by)} stands beside run.batches, which says the same; take one of the "
                "two out"
            )
        if self.min_lr > self.init_lr:
            found.append(f"run.min_lr: {self.min_lr!r} is greater than run.init_lr {self.init_lr!r}")
        return found + self._place_faults()

    def _kind_faults(self) -> list[str]:
        values = {name: getattr(self, name) for name in (*_POSITIVE, *_NOT_NEGATIVE, "warmup") if name != "seed"}
        return [
            f"run.{name}: {shown(value)} is no number"
            for name, value in values.items()
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float))
        ]

    def _range_faults(self) -> list[str]:
        found = []
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                continue
            if name in _POSITIVE and not value > 0:
                found.append(f"run.{name}: {value!r} must be greater than 0")
            elif name in _NOT_NEGATIVE and value < 0:
                found.append(f"run.{name}: {shown(value)} must not be negative")
            elif isinstance(value, int) and value > _LARGEST and name != "seed":
                found.append(f"run.{name}: {shown(value)} is more than {_LARGEST:,}")
        return found

    def _place_faults(self) -> list[str]:
        """Return one line per name or path that cannot be that of a folder, and for a seed that is none."""
        names = {"run.project": self.project, "run.job_id": self.job_id}
        lines = [name_fault(value, field) for field, value in names.items() if value is not None]
        lines.append(path_fault(self.output_dir, "run.output_dir"))
        if not (isinstance(self.seed, int) and self.seed < 0):  # which has a line already
            lines.append(seed_fault(self.seed, "run.seed"))
        return [line for line in lines if line is not None]

    @property
    def batch_key(self) -> str | None:
        """The key of the annotation's rows whose equal values come in one batch."""
        if self.batches is None:
            return self.batch_by
        return None if self.batches.of_neighbours else self.batches.by

    @property
    def neighbourhoods(self) -> BatchesConfig | None:
        """The batches that are made of neighbourhoods, where they are and the job trains."""
        wanted = self.batches
        return wanted if wanted is not None and wanted.of_neighbours and not self.evaluate else None

    @property
    def table_splits(self) -> list[str]:
        """The splits of the final table: the test splits, else the validation splits."""
        return list(self.test_splits or self.valid_splits)

    @property
    def teacher_splits(self) -> list[str]:
        """The splits on which the teacher is evaluated."""
        if not self.evaluate_teacher:
            return []
        return self.table_splits if self.teacher_split_eval is None else list(self.teacher_split_eval)

    @property
    def used_splits(self) -> list[str]:
        """The splits that the job reads, with "train" for the training splits together."""
        training = [] if self.evaluate else ["train"]
        return list(dict.fromkeys([*training, *self.valid_splits, *self.test_splits, *self.teacher_splits]))

    def missing_splits(self, available: Collection[str]) -> list[str]:
        """Return one line per split that the job needs and its data sets do not have.

        Args:
            available: the splits there are.
        """
        needed = {"run.valid_splits": self.valid_splits, "run.test_splits": self.test_splits}
        if self.evaluate_teacher and self.teacher_split_eval:
            needed["run.teacher_split_eval"] = self.teacher_split_eval
        if not self.evaluate:
            needed["run.train_splits"] = self.train_splits
        there = ", ".join(sorted(available)) or "none"
        return [
            f"{key}: the data sets have no split {split!r}; there are {there}"
            for key, splits in needed.items()
            for split in splits
            if split not in available
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers only, as a checkpoint may hold them."""
        return asdict(self)


_LARGEST = 2**31 - 1  # what the counters of torch's C++ take

_POSITIVE = (
    "num_threads",
    "max_epoch",
    "max_steps",
    "batch_size_train",
    "batch_size_eval",
    "accum_grad_iters",
    "init_lr",
    "head_lr_multiplier",
    "eps",
    "grad_clip",
    "max_bad_steps",
    "eval_every_epochs",
    "k_test",
    "match_memory_mb",
    "eval_memory_mb",
    "save_every",
    "keep_last",
    "keep_best",
    "log_freq",
)
_NOT_NEGATIVE = ("num_workers", "seed", "min_lr", "weight_decay", "warmup_steps")


@dataclass(frozen=True)
class EvaluationProtocol:
    """The way in which evaluation sets are scored: the keys of ``run:`` that it reads.

    Args:
        k_test: rerank that many per query; ``None`` scores every pair.
        shortlist: name of the matcher whose joint space makes the shortlist; ``None`` or "joint": its own.
        memory_mb: the rows gathered for one call of a matcher.
        eval_memory_mb: features that take more MiB wait on disk, see ``run.eval_memory_mb``.
        coco_1k_folds: add COCO's 1K protocol under the prefix ``1k_``.
        spill_folder: where they wait; no key of ``run:``. The system's temporary folder by default.
    """

    k_test: int | None = None
    shortlist: str | None = None
    batch_size: int = 64
    num_workers: int = 0
    amp: str = "off"
    memory_mb: float = 1024
    eval_memory_mb: float = 4096
    coco_1k_folds: bool = False
    spill_folder: Path | None = None

    @classmethod
    def of_run(cls, run: Any) -> EvaluationProtocol:
        """Read a ``run:`` section, a dataclass or a mapping; keys that it leaves out have their defaults."""
        keys = {name: name for name in cls.__dataclass_fields__}
        keys |= {"batch_size": "batch_size_eval", "memory_mb": "match_memory_mb"}
        values = {name: _read(run, key) for name, key in keys.items()}
        given = {name: value for name, value in values.items() if value is not None}
        if given.get("amp") is False:  # LAVIS's own way to say off
            given["amp"] = "off"
        return cls(**given)

    @property
    def how(self) -> str:
        """The protocol in words, for tables."""
        if self.k_test is None:
            return "exhaustive"
        return f"shortlist k={self.k_test} ({self.shortlist or 'joint'})"


def _read(run: Any, key: str) -> Any:
    if run is None:
        return None
    return run.get(key) if isinstance(run, Mapping) or hasattr(run, "get") else getattr(run, key, None)
