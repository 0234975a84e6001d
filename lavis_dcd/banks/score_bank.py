"""A teacher's scores of a training set's hardest candidates, kept on disk: mined once, read in every training step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from lavis_dcd.banks.tensor_files import Place, blocks, faults_as_damage, mapped, places, written
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import cache_root, update_with_tensors
from lavis_dcd.common.manifest import MANIFEST, AbsentError, DamagedError, Identity, Manifest
from lavis_dcd.common.schema import plain
from lavis_dcd.datasets.identity import Content
from lavis_dcd.distillation.candidates import DIRECTIONS

KIND, FORMAT = "score bank", 2
TEACHER, TRANSFORMS = "the teacher", "the transforms"  # settings of a bank's identity, by their words
_MEANINGS = {
    TEACHER: "its section, or the files it names, changed",
    TRANSFORMS: "the teacher's processors make something else of the same pictures and captions",
}
_SCORES = "scores-*.safetensors"  # in the place of the star a sum of what they hold
_FORMAT_1 = ("meta.json", "scores.safetensors")
_ROWS_AT_ONCE = 2048  # of a table that is read through
_TRIES = 3  # banks that may replace each other while one is loaded
_MINE = "run: python -m lavis_dcd mine --cfg-path F"


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
class ScoreBank:
    """The scores that ``python -m lavis_dcd mine`` writes.

    Args:
        identity: its teacher, rows and pictures; see :func:`lavis_dcd.mining.identity.bank_identity`.
        settings: how it was mined.
        tables: by direction ("image_to_text", "text_to_image").
        picture_content: pictures whose contents are in ``identity``, as ``run.picture_content`` has it.

    Raises:
        ValueError: no table, an unknown direction, or tables of different numbers of rows.
    """

    identity: Identity
    settings: dict[str, Any]
    tables: dict[str, BankTable]
    picture_content: Content = "sample"

    def __post_init__(self) -> None:
        if not self.tables or set(self.tables) - set(DIRECTIONS):
            raise ValueError(f"tables: {sorted(self.tables)}; expected {' and/or '.join(DIRECTIONS)}")
        if len({len(table) for table in self.tables.values()}) != 1:
            raise ValueError(f"tables of different lengths: { {d: len(t) for d, t in self.tables.items()} }")

    def __len__(self) -> int:
        return len(next(iter(self.tables.values())))

    def save(self, folder: Path) -> None:
        """Write the scores under a name of their own and, last, the manifest that names them.

        A bank that is there is whole until then, and gone from then on: who loads it meanwhile gets one or the other.

        Raises:
            UserError: the disk is full; the former bank is whole.
        """
        folder = Path(folder)
        columns = {
            f"{direction}.{name}": getattr(table, name).contiguous()
            for direction, table in sorted(self.tables.items())
            for name in ("candidates", "scores")
        }
        digest = hashlib.sha256()
        update_with_tensors(digest, columns.items())
        name = _SCORES.replace("*", digest.hexdigest()[:16])
        _clear_leftovers(folder)
        with written(folder / name, lambda why: _cannot_write(folder, why)) as temporary:
            save_file(columns, str(temporary))
        facts = {"settings": self.settings, "rows": len(self), "picture_content": self.picture_content}
        try:
            manifest = Manifest.of(folder, [name], kind=KIND, format=FORMAT, identity=self.identity, facts=facts)
            manifest.write(folder)
        except OSError as error:
            raise _cannot_write(folder, error.strerror or str(error)) from error
        finally:
            _remove_others(folder)

    @classmethod
    def load(cls, folder: Path) -> ScoreBank:
        """The bank in ``folder``, its tables mapped, not read: pages come into memory as rows are looked up.

        Its bytes are compared with the manifest once, here; a mapped file that changes afterwards is not noticed.

        Raises:
            UserError: there is none, it is damaged, it is of an older version, or it was not written to its end.
        """
        folder = Path(folder)
        try:
            for _ in range(_TRIES):
                manifest = Manifest.read(folder, KIND, FORMAT)
                try:
                    return cls._of(folder, manifest)
                except DamagedError:
                    if Manifest.read(folder, KIND, FORMAT) == manifest:
                        raise
            raise DamagedError("it is being replaced over and over")
        except AbsentError:
            raise UserError(_absence(folder)) from None
        except DamagedError as damage:
            raise UserError(
                f"model.candidates: the score bank in {folder} is broken ({damage}); {_MINE} --overwrite, or name "
                "another folder with model.candidates.bank.path"
            ) from damage

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return whether a bank of any state or format is in ``folder``."""
        return os.path.lexists(folder / MANIFEST) or _has_format_1(folder)

    @staticmethod
    def refuse_foreign(folder: Path) -> None:
        """Raise a ``UserError`` where ``folder`` is a file, or has a manifest that is no score bank's."""
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"model.candidates.bank.path: {folder} is no folder; name another one")
        with suppress(AbsentError):
            try:
                Manifest.read(folder, KIND, FORMAT)
            except DamagedError:
                if os.path.lexists(folder / MANIFEST) and not any(folder.glob(_SCORES)):
                    raise UserError(
                        f"model.candidates.bank.path: {folder / MANIFEST} is no score bank's, and a bank would replace "
                        "it; name another folder"
                    ) from None

    @staticmethod
    def scores_in(folder: Path) -> str:
        """Return the name of the bank's scores, which tells it from any other; "" without a sound manifest."""
        try:
            return ", ".join(Manifest.read(folder, KIND, FORMAT).files)
        except DamagedError:
            return ""

    @classmethod
    def _of(cls, folder: Path, manifest: Manifest) -> ScoreBank:
        """Return the bank that a manifest names.

        Raises:
            DamagedError: it is not as it was written, or its values make no sense.
        """
        manifest.check_files(folder)
        if len(manifest.files) != 1:
            raise DamagedError(f"{MANIFEST} names {len(manifest.files)} files, expected one")
        (name,) = manifest.files
        columns = mapped(folder / name)
        with faults_as_damage(name):
            directions = sorted({column.partition(".")[0] for column in columns})
            tables = {d: BankTable(columns.pop(f"{d}.candidates"), columns.pop(f"{d}.scores")) for d in directions}
            if columns:
                raise ValueError(f"unknown tables {', '.join(sorted(columns))}")
        with faults_as_damage(MANIFEST):
            settings, content = dict(manifest.facts["settings"]), manifest.facts["picture_content"]
            if content not in get_args(Content):
                raise ValueError("another picture_content")
            bank = cls(manifest.identity, settings, tables, cast(Content, content))
        there = places(folder / name)
        for direction, table in tables.items():
            _check_values(folder / name, there, direction, table)
        return bank

    def differences(self, expected: Identity) -> list[str]:
        """The parts of the job that have changed since this bank was mined, in words."""
        return [_in_words(changed) for changed in self.identity.differences(expected)]

    def refuse_stale(self, expected: Identity, folder: Path) -> None:
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


def _given(path: str) -> Path:
    if "\0" in path:
        raise UserError("model.candidates.bank.path: has a NUL character, which no folder's name can have")
    try:
        folder = Path(path).expanduser()
        name = folder.resolve().name
    except (RuntimeError, OSError) as error:  # no such user, nobody's home, or links in a circle
        raise UserError(f"model.candidates.bank.path: {path}: {error}; give an absolute path") from error
    if not name:
        raise UserError(f"model.candidates.bank.path: {path} is no folder for a bank; name one below it")
    return folder


def _in_words(changed: str) -> str:
    of_data = "files of other names, sizes, times or contents" if "pictures" in changed else "captions, or their order"
    return f"{changed} ({_MEANINGS.get(changed, of_data)})"


def _check_values(path: Path, there: Mapping[str, Place], direction: str, table: BankTable) -> None:
    """Read a table through; raises a ``DamagedError`` where a candidate is no row, or a score no finite number."""
    name = f"{direction}.candidates"
    for candidates in blocks(path, there[name], table.candidates, _ROWS_AT_ONCE):
        if bool(((candidates < -1) | (candidates >= len(table))).any()):
            raise DamagedError(f"{path.name} has candidates that are none of its {len(table):,} rows")
    for scores in blocks(path, there[f"{direction}.scores"], table.scores, _ROWS_AT_ONCE):
        if not bool(torch.isfinite(scores).all()):
            raise DamagedError(f"{path.name} has scores that are not finite numbers")


def _absence(folder: Path) -> str:
    if _has_format_1(folder):
        return (
            f"model.candidates: the score bank in {folder} is of an older version (format 1), whose bytes nobody can "
            f"check; {_MINE} --overwrite"
        )
    half = " (its mining was not finished)" if (folder / "work").is_dir() or any(folder.glob(_SCORES)) else ""
    return (
        f"model.candidates: no score bank in {folder}{half}; {_MINE}, or name another folder with "
        "model.candidates.bank.path"
    )


def _has_format_1(folder: Path) -> bool:
    """Return whether the former version left a bank here; other files may have the names of its own."""
    if not all((folder / name).is_file() for name in _FORMAT_1):
        return False
    try:
        meta = json.loads((folder / _FORMAT_1[0]).read_text(encoding="utf-8"))
        return meta["format"] == 1 and "directions" in meta
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _remove_others(folder: Path) -> None:
    """Delete all scores but those that the manifest names; they are a former bank's, or of one cut short."""
    try:
        current = set(Manifest.read(folder, KIND, FORMAT).files)
    except AbsentError:
        current = set()
    except DamagedError:
        return  # nobody can tell
    stale = [path for path in folder.glob(_SCORES) if path.name not in current]
    former = [folder / name for name in _FORMAT_1] if current and _has_format_1(folder) else []
    with suppress(OSError):  # they take room and do no harm
        for path in [*stale, *former]:
            path.unlink(missing_ok=True)


def _clear_leftovers(folder: Path) -> None:
    """Delete what killed minings left half written; whoever writes a bank holds its lock."""
    with suppress(OSError):
        for path in folder.glob(f".{_SCORES}.*.tmp"):
            path.unlink(missing_ok=True)


def _cannot_write(folder: Path, why: str) -> UserError:
    return UserError(
        f"model.candidates.bank: the scores cannot be written to {folder} ({why}); a bank that was there is whole. "
        "Make room and run the same command again, or name another folder with model.candidates.bank.path"
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
        return _given(str(path))
    written = json.dumps([model.get("teachers") or [model.get("teacher")], datasets], sort_keys=True, default=str)
    return cache_root() / "dcd_scores" / hashlib.sha256(written.encode()).hexdigest()[:16]
