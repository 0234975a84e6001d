"""The runs of a comparison: what each was begun with, and which of them are done.

A comparison's folder has a folder for each run and, beside that, ``<run>.json``: the record of what the run was begun
with, and of the manifest that it left. A run is done if the record is of the job as it would run now, and the manifest
and its files are those that the record tells of.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavis_dcd.banks.score_bank import bank_folder
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import sha256_of
from lavis_dcd.common.manifest import MANIFEST, AbsentError, DamagedError, Identity, Manifest, digest_of
from lavis_dcd.common.schema import plain
from lavis_dcd.comparison.place import contents, still_there
from lavis_dcd.config.job import Job
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.training.run_folder import run_manifest
from lavis_dcd.variants import Variant

log = logging.getLogger(__name__)

_KIND, _FORMAT = "run of a comparison", 1
_NAMED = 6  # settings that a message names
_FILE = "the file of %s"
_ANEW = "remove that folder to train it anew, or give another run.job_id"
_MANIFEST_KEY = "manifest"

# Of run:, what changes no figure of the learner and none of its weights:
WITHOUT_EFFECT = frozenset(
    {
        *("output_dir", "project", "job_id", "report"),  # where the files lie, and which
        *("resume", "resume_force", "save_every", "keep_last", "keep_best"),  # a resumed job takes the same steps
        *("log_freq", "num_workers", "verify"),  # samples are drawn by their numbers, whichever process loads them
        # which rows stand beside the learner's: the first run alone has those that all share
        *("evaluate_before", "evaluate_teacher", "teacher_split_eval"),
        *("world_size", "dist_url", "distributed", "use_dist_eval_sampler"),  # never read
    }
)


class Sums:
    """SHA-256s of files, each read once as long as the system says that it is the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], str] = {}

    def of(self, path: Path) -> str:
        """Return the sum of a file, or one of all files in a folder.

        Raises:
            OSError: one cannot be read.
        """
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return digest_of([[file.relative_to(path).as_posix(), self.of(file)] for file in files])
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            return "no file"  # a FIFO or a device, whose reading may never end
        key = (str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        if key not in self._known:
            self._known[key] = sha256_of(path)
        return self._known[key]


def identity_of(job: Job, sums: Sums) -> Identity:
    """Return what a job is made from, each setting apart so that a message can name it; no data set is built."""
    run = {key: value for key, value in job.run.to_dict().items() if key not in WITHOUT_EFFECT}
    settings = {key: digest_of(value) for key, value in _leaves({**plain(job.config), "run": run}, "")}
    for file in job.files:
        # the data sets' files are compared as rows and pictures; the hub's have names for their contents
        if file.field.startswith("model.") and not file.hub and file.target.exists():
            settings[_FILE % file.field] = sums.of(file.target)
    if isinstance(job.model, DcdConfig) and job.model.candidates.from_bank:
        # a bank's manifest has the sum of its scores
        manifest = bank_folder(job.model_cfg, job.datasets_cfg) / MANIFEST
        if manifest.is_file():
            settings[_FILE % "model.candidates.bank"] = sums.of(manifest)
    return Identity(settings)


def _leaves(content: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, where)
        else:
            yield where, value


def sort_out(
    home: Path, runs: Sequence[tuple[Variant, Job]], data_of: Callable[[Job], Identity], sums: Sums
) -> tuple[list[Finished], list[tuple[Variant, Job]]]:
    """Return the runs that are done, and those to be trained.

    Args:
        home: the comparison's folder, opened.
        data_of: gives the identity of the rows and pictures that a job's learner sees; called for jobs that are done.

    Raises:
        UserError: runs that are there, and are not of the jobs as they would run now; a line each.
    """
    done: list[Finished] = []
    todo: list[tuple[Variant, Job]] = []
    faults: list[str] = []
    for variant, job in runs:
        try:
            finished = _finished(home, variant, job, data_of, sums)
        except UserError as error:
            faults += [f"run.job_id: {variant.words}, in {home / variant.folder}: {line}" for line in error.faults]
            continue
        if finished is None:
            todo.append((variant, job))
        else:
            log.info("%s: done before", variant.words)
            done.append(finished)
    if faults:
        raise UserError(faults)
    return done, todo


def _finished(
    home: Path, variant: Variant, job: Job, data_of: Callable[[Job], Identity], sums: Sums
) -> Finished | None:
    folder = home / variant.folder
    if not contents(folder):
        return None
    record = _record(home, variant)
    changed = _differences(record.identity, identity_of(job, sums))
    manifest = _manifest(folder)
    if manifest is None or _MANIFEST_KEY not in record.facts:
        if job.run.resume != "auto":
            raise UserError(f"it is not finished; run.resume=auto goes on with it; else {_ANEW}")
        if changed and not job.run.resume_force:
            raise UserError(f"it was begun with {_others(changed)}; put them back, {_ANEW}")
        return None
    if changed:
        raise UserError(f"it was trained with {_others(changed)}; put them back, {_ANEW}")
    run = Finished(variant, folder, record, manifest)
    run.check()
    if changed := _data_changes(manifest.identity, data_of(job)):
        raise UserError(f"since it was trained, {' and '.join(changed)} changed; put them back, {_ANEW}")
    return run


def _manifest(folder: Path) -> Manifest | None:
    """Return a run's manifest, whose files fit it; None without one."""
    try:
        return run_manifest(folder)
    except AbsentError:
        return None
    except DamagedError as error:
        raise UserError(f"{error}; {_ANEW}") from error


def _record(home: Path, variant: Variant) -> Manifest:
    try:
        return Manifest.read(home, _KIND, _FORMAT, _record_name(variant))
    except AbsentError as error:
        raise UserError(
            "this comparison did not begin it; move that folder away, or give another run.job_id"
        ) from error
    except DamagedError as error:
        raise UserError(f"{error}; {_ANEW}") from error


def _record_name(variant: Variant) -> str:
    return f"{variant.folder}.json"


def _differences(before: Identity, now: Identity) -> list[str]:
    """Return the settings that differ; files that only one of the two could see are no difference."""
    unseen = [key for key in {**before.settings, **now.settings} if key.startswith(_FILE % "")]
    unseen = [key for key in unseen if key not in before.settings or key not in now.settings]
    return [name for name in before.differences(now) if name not in unseen]


def _others(changed: Sequence[str]) -> str:
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return f"other settings ({', '.join(changed[:_NAMED])}{more})"


def _data_changes(before: Identity, now: Identity) -> list[str]:
    """Return which rows and pictures differ, of the splits that ``now`` has."""
    splits = {_split(name) for name in {**now.rows, **now.pictures}}
    return _of_splits(before, splits).differences(_of_splits(now, splits))


def _of_splits(identity: Identity, splits: Collection[str]) -> Identity:
    rows = {name: digest for name, digest in identity.rows.items() if _split(name) in splits}
    pictures = {name: digest for name, digest in identity.pictures.items() if _split(name) in splits}
    return Identity(rows=rows, pictures=pictures)


def _split(name: str) -> str:
    return name.partition(".")[0]  # of the plain sets in a concatenation: train.0, train.1


def begin(home: Path, variant: Variant, job: Job, sums: Sums) -> None:
    """Record what a run begins with; its files are there.

    Raises:
        UserError: the comparison's folder was removed.
    """
    still_there(home)
    Manifest(_KIND, _FORMAT, identity_of(job, sums)).write(home, _record_name(variant))


def finish(home: Path, variant: Variant, job: Job) -> Finished:
    """Record that a run has ended, and the manifest that it left.

    Raises:
        UserError: it left none, or files that do not fit it.
    """
    try:
        manifest = run_manifest(home / variant.folder)
    except DamagedError as error:
        raise UserError(
            f"{variant.words}: {error} in {home / variant.folder}, so it cannot be compared; the runner "
            f"({job.run.runner}) must leave results and a manifest, as runner_dcd does"
        ) from error
    record = replace(_record(home, variant), facts={_MANIFEST_KEY: manifest.identity.key})
    record.write(home, _record_name(variant))
    return Finished(variant, home / variant.folder, record, manifest)


@dataclass(frozen=True)
class Finished:
    """A run that is done.

    Args:
        record: of what it was begun with.
        manifest: that it left.
    """

    variant: Variant
    folder: Path
    record: Manifest
    manifest: Manifest

    def check(self) -> None:
        """Compare the run's manifest with the one that the record tells of.

        Raises:
            UserError: it is another run's.
        """
        if self.record.facts.get(_MANIFEST_KEY) != self.manifest.identity.key:
            raise UserError(f"its files are those of another run; {_ANEW}")

    def checked_again(self) -> Finished:
        """Return the run as its files are now.

        Raises:
            UserError: they are not those that it left.
        """
        try:
            manifest = _manifest(self.folder)
            if manifest is None:
                raise UserError(f"its manifest is gone; {_ANEW}")
            run = replace(self, manifest=manifest)
            run.check()
        except UserError as error:
            raise UserError(f"{self.variant.words}, in {self.folder}: {error}") from error
        return run

    @property
    def teacher(self) -> str:
        """One SHA-256 of the teachers' settings and files."""
        return digest_of({key: value for key, value in self.record.identity.settings.items() if "model.teacher" in key})


def check_one_test_set(runs: Sequence[Finished], split: str) -> None:
    """Refuse runs that were evaluated on different rows or pictures: their figures do not belong in one table.

    Args:
        split: of the table.

    Raises:
        UserError: they differ.
    """
    for run in runs[1:]:
        before, now = (_of_splits(one.manifest.identity, {split}) for one in (runs[0], run))
        if changed := before.differences(now):
            raise UserError(
                f"{runs[0].variant.words} and {run.variant.words} were evaluated on different data "
                f"({' and '.join(changed)}), which do not make one table; put the data back and remove {run.folder} "
                "to train it anew, or compare the reports in the runs' own folders"
            )
