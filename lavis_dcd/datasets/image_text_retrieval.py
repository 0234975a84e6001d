"""`image_text_retrieval`: a user's pictures with captions in JSON files, one per split, or in one CSV file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.texts import shown
from lavis_dcd.datasets.annotations import (
    SPLITS,
    Columns,
    Faults,
    Row,
    Split,
    csv_header,
    evaluation_rows,
    home_expanded,
    place,
    read_csv,
    read_json,
    training_rows,
)
from lavis_dcd.datasets.builder import RetrievalBuilder
from lavis_dcd.datasets.splits import split_by_picture

_DEFAULT_SPLIT_COLUMN = "split"


@dataclass(frozen=True)
class OwnDataInfo:
    """`build_info` of `image_text_retrieval`.

    Args:
        root: the folder that the pictures' paths start from; null means the current folder.
        annotations: a JSON file, or several, per split. Either this or `csv`.
        csv: one CSV file with a header and one caption per line.
        image_column, caption_column: of the CSV file.
        split_column: of the CSV file; where it has no column "split", or with null, the pictures are split at random.
        val_fraction, test_fraction: of the pictures, for the random split.
        seed: of the random split.
    """

    root: str | None = None
    annotations: dict[Split, str | list[str] | None] | None = None
    csv: str | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    split_column: str | None = _DEFAULT_SPLIT_COLUMN
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.files()) == bool(self.csv):
            raise ValueError(
                "give either annotations: {train: FILE.json, val: FILE.json, test: FILE.json} (those there are) "
                "or csv: FILE.csv" + (", not both" if self.csv else "")
            )
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction={self.val_fraction}, test_fraction={self.test_fraction}: neither may be negative, and "
                "their sum must be below 1"
            )
        columns = [name for name in (self.image_column, self.caption_column, self.split_column) if name is not None]
        if len(set(columns)) < len(columns):
            raise ValueError(f"image_column, caption_column, split_column: {', '.join(columns)} are not all different")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative")

    def files(self) -> dict[Split, list[str]]:
        """The JSON files per split."""
        listed = {split: [f] if isinstance(f, str) else list(f or []) for split, f in (self.annotations or {}).items()}
        return {split: listed[split] for split in SPLITS if listed.get(split)}

    @property
    def folder(self) -> Path:
        """The absolute root."""
        return home_expanded(self.root or ".").absolute()


@registry.register_builder("image_text_retrieval")
class ImageTextRetrievalBuilder(RetrievalBuilder):
    """Builds the splits that the files have, see `OwnDataInfo`."""

    name = "image_text_retrieval"
    info_class = OwnDataInfo
    DATASET_CONFIG_DICT = {  # noqa: RUF012
        "default": str(packaged_folder("configs") / "datasets/image_text_retrieval/defaults.yaml")
    }

    @classmethod
    @override
    def file_faults(cls, info: OwnDataInfo, path: str) -> list[str]:
        found = [] if os.path.isdir(info.folder) else [f"{path}.root: {info.folder} is not a folder"]
        named = {f"annotations.{split}": files for split, files in info.files().items()}
        for key, files in (named or {"csv": [info.csv or ""]}).items():
            found += [
                f"{path}.{key}: {file} is neither in {info.folder} nor in {Path.cwd()}"
                for file in files
                if not os.path.isfile(place(file, info.root))
            ]
        return found

    @override
    def read(self, info: OwnDataInfo) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        rows = _read_jsons(info) if info.files() else _read_csv(info)
        return {
            split: (str(info.folder), (training_rows if split == "train" else evaluation_rows)(rows[split]))
            for split in SPLITS
            if rows.get(split)
        }


def _read_jsons(info: OwnDataInfo) -> dict[Split, list[Row]]:
    rows_of: dict[Split, list[Row]] = {}
    faults: list[str] = []
    for split, files in info.files().items():
        known: dict[str, tuple[str | int, Path]] = {}
        for file in (place(name, info.root) for name in files):
            try:
                rows = read_json(file, info.folder)
                _check_ids_against(known, rows, file)
                rows_of.setdefault(split, []).extend(rows)
            except UserError as error:
                faults += error.faults
    if faults:
        raise UserError(faults)
    return rows_of


def _check_ids_against(known: dict[str, tuple[str | int, Path]], rows: list[Row], file: Path) -> None:
    """Note the pictures' ids in ``known``; another id in another file would make a picture's captions negatives of
    each other."""
    faults = Faults(file)
    for row in {row.image: row for row in rows}.values():
        before, other = known.setdefault(row.image, (row.image_id, file))
        if before != row.image_id:
            faults.add(row.image, f"has image_id {shown(row.image_id)} here and {shown(before)} in {other}; "
                                  "give it one, or none")  # fmt: skip
    faults.raise_any()


def _read_csv(info: OwnDataInfo) -> dict[Split, list[Row]]:
    file = place(info.csv or "", info.root)
    column = info.split_column
    if column == _DEFAULT_SPLIT_COLUMN and column not in csv_header(file):
        column = None
    rows = read_csv(file, info.folder, Columns(info.image_column, info.caption_column, column))
    if column is None:
        pictures = [row.image for _, row in rows]
        try:
            of_picture = split_by_picture(pictures, info.val_fraction, info.test_fraction, info.seed)
        except UserError as error:
            raise UserError([f"{file}: {line}" for line in error.faults]) from error
        rows = [(of_picture[row.image], row) for _, row in rows]
    return {split: [row for of_row, row in rows if of_row == split] for split in SPLITS}
