"""A job's score bank: loaded before its model is built, checked against its data before it trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_dcd.banks.score_bank import ScoreBank, bank_folder
from lavis_dcd.banks.score_candidates import BankCandidates, Choice
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.config.batches_section import BANK
from lavis_dcd.config.checks import section_schema
from lavis_dcd.config.job import Job
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.identity import Content
from lavis_dcd.distillation.strategies import build_strategy
from lavis_dcd.mining.identity import identity_of
from lavis_dcd.models.dcd.checks import method_faults
from lavis_dcd.models.dcd.config import DcdConfig

log = logging.getLogger(__name__)


class KeptScores:
    """The bank of a distillation with ``candidates.source: bank``.

    Args:
        config: of the distillation.
        folder: where the bank lies.
        content: pictures whose contents the bank must have compared, as ``run.picture_content`` has it.

    Raises:
        UserError: there is no bank, or a broken one, or one that compared fewer pictures.
    """

    def __init__(self, config: DcdConfig, folder: Path, content: Content = "sample") -> None:
        self.config, self.folder = config, folder
        self.bank = ScoreBank.load(folder)
        if content == "all" and self.bank.picture_content != content:
            raise UserError(
                f"run.picture_content: all, but the score bank in {folder} has sums of a sample of its pictures alone; "
                "run: python -m lavis_dcd mine --cfg-path F --overwrite, or set it to sample"
            )
        self._checked = False

    @classmethod
    def of_job(cls, cfg: Any) -> KeptScores | None:
        """Load the bank of a job that trains from one, or makes its batches by one; None for other jobs.

        Args:
            cfg: a :class:`Job`, or LAVIS's ``Config``, whose sections nobody has checked.

        Raises:
            UserError: settings that do not fit each other; there is no bank, or a broken one.
        """
        if cfg.run_cfg.get("evaluate"):
            return None
        config = cfg.model if isinstance(cfg, Job) else _parsed(cfg.model_cfg)
        if not isinstance(config, DcdConfig) or not (config.candidates.from_bank or _batches_by_bank(cfg)):
            return None
        return cls(config, bank_folder(cfg.model_cfg, cfg.datasets_cfg), _picture_content(cfg))

    def check(self, datasets: Mapping[str, Any]) -> None:
        """Refuse a bank of another teacher, other data or other transforms.

        Args:
            datasets: by split, as the runner has them before any view or feature bank.

        Raises:
            UserError: the bank is stale.
        """
        self.bank.refuse_stale(identity_of(self.config, datasets, self.bank.picture_content), self.folder)
        log.info("score bank: %s (%d rows, %s)", self.folder, len(self.bank), ", ".join(sorted(self.bank.tables)))
        self._warn_of_settings()
        self._checked = True

    def _warn_of_settings(self) -> None:
        """Warn of settings with which the bank was not mined: it serves as well, but may not be the one expected."""
        wanted = self.config.candidates.bank
        for name in ("by", "shortlist", "random", "keep", "keep_by"):
            mined = self.bank.settings.get(name)
            if mined is not None and mined != getattr(wanted, name):
                log.warning(
                    "model.candidates.bank.%s: %s, but the bank was mined with %s; mine --overwrite changes it",
                    name, getattr(wanted, name), mined,
                )  # fmt: skip

    def around(self, dataset: Any, seed: int) -> BankCandidates:
        """Return the training set with the bank's hard candidates.

        Raises:
            UserError: a bank of another number of rows, or without a direction that is trained.
        """
        if not self._checked:
            raise UserError("model.candidates: the score bank was not checked against the data; call prepare first")
        how = self.config.selection
        strategy = build_strategy(how.strategy, hard_share=how.hard_share)
        choice = Choice(how.hard_negatives, strategy, how.margin)
        return BankCandidates(dataset, self.bank, list(self.config.candidates.sources()), choice, seed)


def _batches_by_bank(cfg: Any) -> bool:
    batches = cfg.run.batches if isinstance(cfg, Job) else parse(RunConfig, _given(cfg, "batches"), "run").batches
    return batches is not None and batches.by == BANK


def _given(cfg: Any, key: str) -> dict[str, Any]:
    """Return a key of LAVIS's own ``run:`` section, by its name, where it is given."""
    value = cfg.run_cfg.get(key)
    return {} if value is None else {key: value}


def _picture_content(cfg: Any) -> Content:
    if isinstance(cfg, Job):
        return cfg.run.picture_content
    return parse(RunConfig, _given(cfg, "picture_content"), "run").picture_content


def _parsed(section: Mapping[str, Any]) -> DcdConfig | None:
    """Return the ``model:`` section of a distillation, None for other models."""
    if section_schema(section) is not DcdConfig:
        return None
    config = parse(DcdConfig, section, "model")
    # a setting that cannot work would want a bank that is not needed
    if faults := method_faults(config):
        raise UserError(faults)
    return config
