"""`unpaired`: pictures without captions and texts without pictures, to distil a student on without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lavis.common.registry import registry
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.datasets.annotations import home_expanded, place
from lavis_dcd.datasets.builder import RetrievalBuilder
from lavis_dcd.datasets.unlabelled import read_pictures, read_texts
from lavis_dcd.datasets.unpaired_rows import UnpairedRows

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class UnpairedInfo:
    """`build_info` of `unpaired`.

    Args:
        pictures: a folder of pictures, or a JSON file that names some (its captions are not read), or several of these.
        texts: a file with one text a line, a JSON file of texts or captions (their pictures are not read), or several.
        root: the folder that all pictures lie below; null means the folder of pictures where there is one source,
            else the current folder.
    """

    pictures: str | list[str] | None = None
    texts: str | list[str] | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        if lacking := [name for name in ("pictures", "texts") if not getattr(self, name)]:
            raise ValueError(
                f"give {' and '.join(lacking)}: pictures: a folder or a JSON file, texts: a file with one text a line "
                "or a JSON file, or a list of these"
            )

    @property
    def picture_sources(self) -> list[Path]:
        """Where the pictures come from, as absolute paths."""
        return [place(source, self.root) for source in _listed(self.pictures)]

    @property
    def text_files(self) -> list[Path]:
        """Where the texts come from, as absolute paths."""
        return [place(file, self.root) for file in _listed(self.texts)]

    @property
    def folder(self) -> Path:
        """The absolute root."""
        if self.root is None and len(self.picture_sources) == 1 and os.path.isdir(self.picture_sources[0]):
            return self.picture_sources[0]
        return home_expanded(self.root or ".").absolute()


@registry.register_builder("unpaired")
class UnpairedBuilder(RetrievalBuilder):
    """Builds a training set of pictures and texts that do not belong together, see `UnpairedInfo`."""

    train_dataset_cls = UnpairedRows
    name = "unpaired"
    info_class = UnpairedInfo
    DATASET_CONFIG_DICT = {  # noqa: RUF012
        "default": str(packaged_folder("configs") / "datasets/unpaired/defaults.yaml")
    }

    @classmethod
    def gives_pairs(cls) -> bool:
        """Return that a sample's picture and text do not belong together."""
        return False

    @classmethod
    @override
    def file_faults(cls, info: UnpairedInfo, path: str) -> list[str]:
        found = [] if os.path.isdir(info.folder) else [f"{path}.root: {info.folder} is not a folder"]
        where = f"in {Path.cwd()}" if info.root is None else f"in {info.folder}, nor in {Path.cwd()}"
        found += [
            f"{path}.pictures: there is no folder or file {source} {where}"
            for source, there in zip(_listed(info.pictures), info.picture_sources, strict=True)
            if not os.path.exists(there)
        ]
        found += [
            f"{path}.texts: there is no file {file} {where}"
            for file, there in zip(_listed(info.texts), info.text_files, strict=True)
            if not os.path.isfile(there)
        ]
        return found

    @override
    def read(self, info: UnpairedInfo) -> dict[str, tuple[str, list[str], list[str]]]:
        folder, faults = info.folder, list[str]()
        pictures = _read_all(info.picture_sources, lambda source: read_pictures(source, folder), faults)
        texts = _read_all(info.text_files, read_texts, faults)
        if faults:
            raise UserError(faults)
        pictures = list(dict.fromkeys(pictures))
        log.info("unpaired: %s pictures, %s texts", f"{len(pictures):,}", f"{len(texts):,}")
        return {"train": (str(folder), pictures, texts)}


def _read_all(sources: Sequence[Path], read: Callable[[Path], list[T]], faults: list[str]) -> list[T]:
    """Return what all sources hold; the faults of those that cannot be read are added to ``faults``."""
    found: list[T] = []
    for source in sources:
        try:
            found += read(source)
        except UserError as error:
            faults += error.faults
    return found


def _listed(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])
