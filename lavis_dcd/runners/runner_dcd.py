"""The runner "runner_dcd": LAVIS's constructor and registry around `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.datasets.data_utils import reorg_datasets_by_split
from lavis.datasets.datasets.base_dataset import ConcatDataset
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse, plain
from lavis_dcd.common.secrets import as_written, remember
from lavis_dcd.config.job import Job
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.splits import distinct_image_ids
from lavis_dcd.training.trainer import Trainer


@registry.register_runner("runner_dcd")
class RunnerDCD(Trainer):
    """Trains and evaluates on a CPU, a GPU, or under torchrun.

    Args:
        cfg: LAVIS's Config, or anything with `run_cfg`, `model_cfg` and `datasets_cfg`.
        task, model: see `Trainer`.
        datasets: {builder: {split: data set}}, as `task.build_datasets` returns. The splits of
            run.train_splits are concatenated; any other split must come from one builder.
        job_id: the name of the run folder, unless run.job_id gives one.

    Raises:
        UserError: faults of the configuration, or as `Trainer`.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Mapping[str, Any], job_id: str | None) -> None:
        for section in (
            cfg.model_cfg,
            cfg.datasets_cfg,
            cfg.run_cfg,
        ):  # LAVIS's own Config is read by none of our doors
            remember(section)
        run = cfg.run if isinstance(cfg, Job) else parse(RunConfig, cfg.run_cfg, "run")
        sections = {"model": cfg.model_cfg, "datasets": cfg.datasets_cfg}
        config = {name: plain(section) for name, section in sections.items()}
        written = {
            name: as_written(values, cfg.run_cfg if name == "run" else sections[name])
            for name, values in {**config, "run": run.to_dict()}.items()
        }
        super().__init__(run, config, task, model, by_split(datasets, run), _project(cfg, run), job_id, written)
        self.cfg = cfg
        # LAVIS's own code reads the run folder from its registry. `register_path` refuses a name that it has, which
        # would rule out a second runner in a process.
        result_dir = self.output_dir / "result"
        registry.mapping["paths"].update(output_dir=str(self.output_dir), result_dir=str(result_dir))


def by_split(datasets: Mapping[str, Mapping[str, Any]], run: RunConfig) -> dict[str, Any]:
    """Return {builder: {split: data set}} as {split: data set}, with the training splits concatenated as "train".

    Raises:
        UserError: two builders have the same evaluation split.
    """
    by_name = reorg_datasets_by_split(datasets)
    used = {*run.valid_splits, *run.test_splits, *(run.teacher_split_eval or [])}
    faults = [
        f"datasets: the split {split!r} comes from {len(by_name[split])} data sets, evaluation needs one"
        for split in sorted(used & set(by_name))
        if len(by_name[split]) > 1
    ]
    if faults:
        raise UserError(faults)
    joined = {split: sets[0] for split, sets in by_name.items()}
    training = [dataset for split in run.train_splits for dataset in by_name.get(split, [])]
    if training:
        distinct_image_ids(training)
        joined["train"] = training[0] if len(training) == 1 else ConcatDataset(training)
    return joined


def _project(cfg: Any, run: RunConfig) -> str:
    path = getattr(getattr(cfg, "args", None), "cfg_path", None)
    return run.project or (Path(path).stem if path else "job")
