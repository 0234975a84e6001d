"""A checked job, as the rooms that build and run it take it."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_dcd.common.secrets import as_stored
from lavis_dcd.config.required_files import RequiredFile
from lavis_dcd.config.run_section import RunConfig

log = logging.getLogger(__name__)


class Job:
    """A job whose sections were merged, checked and parsed once.

    The properties and methods are those of LAVIS's own ``Config``, which its tasks and runners use.

    Args:
        config: all sections, the options and the file over the defaults.
        run: the ``run:`` section.
        model: the ``model:`` section as the dataclass of its arch; None where the arch has none.
        files: all that the job reads, there or not.
        cfg_path: the file that was read.
        options: the settings over it.
    """

    def __init__(
        self,
        config: DictConfig,
        run: RunConfig,
        model: Any,
        files: Sequence[RequiredFile],
        cfg_path: Path,
        options: Sequence[str] = (),
    ) -> None:
        self.config, self.run, self.model, self.files = config, run, model, list(files)
        self.args = Namespace(cfg_path=str(cfg_path), options=list(options))
        registry.register("configuration", self)

    @property
    def run_cfg(self) -> DictConfig:
        """The ``run:`` section as written, over its defaults."""
        return self.config.run

    @property
    def datasets_cfg(self) -> DictConfig:
        """The ``datasets:`` section, each data set over its defaults."""
        return self.config.datasets

    @property
    def model_cfg(self) -> DictConfig:
        """The ``model:`` section over the defaults of its type."""
        return self.config.model

    def get_config(self) -> DictConfig:
        """Return all sections."""
        return self.config

    def to_dict(self) -> dict[str, Any]:
        """Return all sections as plain containers, as they are logged and stored: interpolations as they are written.

        What they bring in from the environment is nobody else's business.
        """
        return cast(dict[str, Any], as_stored(OmegaConf.to_container(self.config, resolve=False)))

    def pretty_print(self) -> None:
        """Log the run, the data sets and the model, as LAVIS does."""
        content = self.to_dict()
        for section in ("run", "datasets", "model"):
            text = json.dumps(content[section], indent=4, sort_keys=True)
            log.info("=====  %s  =====\n%s", section, text)
