"""A teacher's scores of a training set's hardest candidates, kept on disk: mined once, read in every training step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_path, atomic_write, cache_root
from lavis_dcd.common.schema import plain
from lavis_dcd.distillation.candidates import DIRECTIONS

SCORES, META = "scores.safetensors", "meta.json"
_FORMAT = 1
_MINE = "run: python -m lavis_dcd mine --cfg-path F"
_PARTS = {
    "teacher": "the teacher (its section, or the files it names, changed)",
    "data": "the data (captions, pictures or their order changed)",
    "transforms": "the transforms (the teacher's processors make something else of the same pictures and captions)",
}


@dataclass(frozen=True)
class BankTable:
    """The candidates of one direction, a row for each row of the training set.

    Args:
        candidates: int32 ``[R, K]``, rows of the training set, -1 where there is none. image_to_text: the row whose
            caption is the candidate; text_to_image: a row whose picture it is (the first of that picture).
        scores: float32 ``[R, 1+K]``, the teacher's score of the row's own pair, then of its candidates, highest
            first; 0 where there is none.

    Raises:
        ValueError: on other shapes or types.
    """

    candidates: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        shape, scores = tuple(self.candidates.shape), tuple(self.scores.shape)
        if len(shape) != 2 or scores != (shape[0], shape[1] + 1):
            raise ValueError(f"candidates must be [R, K] and scores [R, 1+K], got {shape} and {scores}")
        if self.candidates.dtype != torch.int32 or self.scores.dtype != torch.float32:
            raise ValueError(
                f"candidates must be int32 and scores float32, got {self.candidates.dtype} and {self.scores.dtype}"
            )

    def __len__(self) -> int:
        return len(self.candidates)


@dataclass(frozen=True)
class BankIdentity:
    """The state of a job that a bank is of, SHA-256 each; see :func:`lavis_dcd.mining.identity.bank_identity`.

    Args:
        teacher: the resolved section(s), the contents of the files that they name, the weights of several teachers.
        data: captions and pictures of the training rows in order, with the pictures' file sizes and times.
        transforms: what the teacher's processors make of some pictures and captions.
    """

    teacher: str
    data: str
    transforms: str


@dataclass(frozen=True)
class ScoreBank:
    """The scores that ``python -m lavis_dcd mine`` writes.

    Args:
        settings: how it was mined.
        tables: by direction ("image_to_text", "text_to_image").

    Raises:
        ValueError: no table, an unknown direction, or tables of different numbers of rows.
    """

    identity: BankIdentity
    settings: dict[str, Any]
    tables: dict[str, BankTable]

    def __post_init__(self) -> None:
        if not self.tables or set(self.tables) - set(DIRECTIONS):
            raise ValueError(f"tables: {sorted(self.tables)}; expected {' and/or '.join(DIRECTIONS)}")
        if len({len(table) for table in self.tables.values()}) != 1:
            raise ValueError(f"tables of different lengths: { {d: len(t) for d, t in self.tables.items()} }")

    def __len__(self) -> int:
        return len(next(iter(self.tables.values())))

    def save(self, folder: Path) -> None:
        """Write ``scores.safetensors`` and, last, ``meta.json``: a bank cut short on the way is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # the former bank's meta must not vouch for the new scores
        (folder / META).unlink(missing_ok=True)
        columns = {
            f"{direction}.{name}": getattr(table, name).contiguous()
            for direction, table in self.tables.items()
            for name in ("candidates", "scores")
        }
        with atomic_path(folder / SCORES) as partial:
            save_file(columns, str(partial))
        meta = {
            "format": _FORMAT,
            "identity": dataclasses.asdict(self.identity),
            "settings": self.settings,
            "rows": len(self),
            "bytes": (folder / SCORES).stat().st_size,
            "directions": sorted(self.tables),
        }
        with atomic_write(folder / META, "w") as file:
            json.dump(meta, file, indent=2)

    @classmethod
    def load(cls, folder: Path) -> ScoreBank:
        """The bank in ``folder``, its tables mapped, not read: pages come into memory as rows are looked up.

        Raises:
            UserError: there is none, it is broken, or it was not written to its end.
        """
        folder = Path(folder)
        if not (folder / META).is_file():
            half = " (its mining was not finished)" if (folder / SCORES).is_file() else ""
            raise UserError(
                f"model.candidates: no score bank in {folder}{half}; {_MINE}, or name another folder with "
                "model.candidates.bank.path"
            )
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            size = (folder / SCORES).stat().st_size
            if meta["format"] != _FORMAT or meta["bytes"] != size:
                raise ValueError(f"{SCORES} has {size} bytes, {META} tells of {meta['bytes']}, format {meta['format']}")
            columns = load_file(str(folder / SCORES))
            tables = {
                direction: BankTable(columns[f"{direction}.candidates"], columns[f"{direction}.scores"])
                for direction in meta["directions"]
            }
            return cls(BankIdentity(**meta["identity"]), dict(meta["settings"]), tables)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"model.candidates: the score bank in {folder} is broken ({_one_line(error)}); remove that folder and "
                f"{_MINE}"
            ) from error

    def differences(self, expected: BankIdentity) -> list[str]:
        """The parts of the job that have changed since this bank was mined, in words."""
        return [words for name, words in _PARTS.items() if getattr(self.identity, name) != getattr(expected, name)]

    def refuse_stale(self, expected: BankIdentity, folder: Path) -> None:
        """Check that the bank is one of this job.

        Raises:
            UserError: teacher, data or transforms are not those that it was mined with; one line that names them.
        """
        changed = self.differences(expected)
        if changed:
            raise UserError(
                f"model.candidates: the score bank in {folder} is stale, it was mined with another state of "
                f"{'; '.join(changed)}; {_MINE} --overwrite, or name another bank with model.candidates.bank.path"
            )


def bank_folder(model_section: Mapping[str, Any], datasets_section: Mapping[str, Any]) -> Path:
    """The folder of a job's bank: ``candidates.bank.path``, else a folder of the cache, by a hash over the job.

    The hash covers the teachers' sections and the data sets' as they are written, so that jobs which differ in their
    student alone share a bank.

    Args:
        model_section: the whole ``model:`` section.
        datasets_section: the ``datasets:`` section.
    """
    model, datasets = plain(model_section), plain(datasets_section)
    path = ((model.get("candidates") or {}).get("bank") or {}).get("path")
    if path:
        return Path(path).expanduser()
    written = json.dumps([model.get("teachers") or [model.get("teacher")], datasets], sort_keys=True, default=str)
    return cache_root() / "dcd_scores" / hashlib.sha256(written.encode()).hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
