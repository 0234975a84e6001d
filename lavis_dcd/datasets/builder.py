"""The base of this package's data set builders: a checked `build_info`, processors, nothing to download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.processors.base_processor import BaseProcessor

from lavis_dcd.common.schema import faults, parse
from lavis_dcd.datasets.rows import RetrievalEvalRows, RetrievalRows


class RetrievalBuilder(BaseDatasetBuilder):
    """A LAVIS builder whose `build_info` is a dataclass.

    Subclasses state `name`, `info_class` and `DATASET_CONFIG_DICT`, and write `read`.
    """

    train_dataset_cls: type[RetrievalRows] = RetrievalRows
    eval_dataset_cls: type[RetrievalEvalRows] = RetrievalEvalRows
    name: ClassVar[str]
    info_class: ClassVar[type[Any]]

    @classmethod
    def config_faults(cls, config: Mapping[str, Any], path: str) -> list[str]:
        """The faults of this data set's section, one line each; files that are not there included."""
        where = f"{path}.build_info"
        found = faults(cls.info_class, config.get("build_info"), where)
        return found or cls.file_faults(parse(cls.info_class, config.get("build_info"), where), where)

    @classmethod
    def file_faults(cls, info: Any, path: str) -> list[str]:
        """One line per file or folder that `info` names and that is not there."""
        return []

    def build_datasets(self) -> dict[str, RetrievalRows | RetrievalEvalRows]:
        """The data sets by split. Nothing is downloaded or written, so every process builds its own.

        Raises:
            UserError: faults in `build_info` or in the files, one line each.
        """
        return self.build()

    def build(self) -> dict[str, RetrievalRows | RetrievalEvalRows]:
        """The data sets by split, see `build_datasets`."""
        info = parse(self.info_class, self.config.get("build_info"), f"datasets.{self.name}.build_info")
        self.build_processors()
        return {split: self._dataset(split, *content) for split, content in self.read(info).items()}

    def read(self, info: Any) -> dict[str, tuple[Any, ...]]:
        """The arguments of each split's data-set class after its two processors."""
        raise NotImplementedError

    def _dataset(self, split: str, *content: Any) -> RetrievalRows | RetrievalEvalRows:
        kind = "train" if split == "train" else "eval"
        cls = self.train_dataset_cls if split == "train" else self.eval_dataset_cls
        return cls(*self._processors(kind), *content)

    def _processors(self, kind: str) -> tuple[BaseProcessor, BaseProcessor]:
        return self.vis_processors[kind], self.text_processors[kind]
