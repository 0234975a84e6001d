"""The folder of an unfinished mining: its plan, and the scores of the shards that are done, each with a sum."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lavis_dcd.banks.tensor_files import faults_as_damage, mapped
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import atomic_write, update_with_tensors
from lavis_dcd.common.manifest import MANIFEST, AbsentError, DamagedError, Identity, Manifest, digest_of
from lavis_dcd.mining.plan import Plan
from lavis_dcd.mining.pools import Pairing

log = logging.getLogger(__name__)

KIND, FORMAT = "mining, unfinished", 1
PLAN = "plan.safetensors"
SETTINGS = "the settings"  # of the mining, in the folder's identity
_SUM = "sha256"  # of a shard's scores, in its file's own header: several processes write shards at a time


class WorkFolder:
    """The folder in which an unfinished mining keeps its plan and the scores of finished shards.

    Args:
        folder: below the bank's.
        identity: of the bank.
        settings: of the mining; plain containers. A folder that was made for others is of no use.
    """

    def __init__(self, folder: Path, identity: Identity, settings: Mapping[str, Any]) -> None:
        made_for = {**identity.settings, SETTINGS: digest_of(dict(settings))}
        self.folder, self._hash = folder, ""
        self._identity = Identity(made_for, identity.rows, identity.pictures)

    def open_plan(self, pairing: Pairing) -> Plan | None:
        """Return the plan of an interrupted mining of the same teacher, data and settings; None where there is none."""
        try:
            manifest = Manifest.read(self.folder, KIND, FORMAT)
            if changed := manifest.identity.differences(self._identity):
                why = f"from a mining of another teacher, other data or settings ({', '.join(changed)} differ)"
                log.info("%s: %s; starting anew", self.folder, why)
            else:
                manifest.check_files(self.folder)
                return self._adopted(Plan.load(self.folder / PLAN), pairing)
        except AbsentError:
            return None
        except DamagedError as damage:
            log.warning("%s: %s; starting anew", self.folder, damage)
        self.remove()
        return None

    def begin(self, plan: Plan, pairing: Pairing) -> Plan:
        """Keep a new plan, and nothing that was there before; raises a ``UserError`` where the disk is full."""
        self.remove()
        with self._writing(PLAN):
            plan.save(self.folder / PLAN)
            Manifest.of(self.folder, [PLAN], kind=KIND, format=FORMAT, identity=self._identity).write(self.folder)
        return self._adopted(plan, pairing)

    def read_plan(self, pairing: Pairing) -> Plan:
        """Return the plan that another process has kept; raises a ``UserError`` where it cannot be read here."""
        try:
            return self._adopted(Plan.load(self.folder / PLAN), pairing)
        except DamagedError as damage:
            raise UserError(
                f"model.candidates.bank: {self.folder}: {damage}; all processes of a mining need the same folder"
            ) from damage

    def _adopted(self, plan: Plan, pairing: Pairing) -> Plan:
        """Take the shards of this plan alone for done."""
        with faults_as_damage(PLAN):
            plan.check(pairing)
        self._hash = plan.fingerprint()
        return plan

    def is_done(self, shard: int, plan: Plan, teachers: int) -> bool:
        """Return whether the scores of a shard are there, as they were written; the log names one that is damaged."""
        try:
            self._read(shard, plan, teachers)
        except AbsentError:
            return False
        except DamagedError as damage:
            log.warning("%s: %s; it is scored again", self.folder, damage)
            return False
        return True

    def keep(self, shard: int, scores: list[Tensor]) -> None:
        """Keep the scores of a shard, float32 ``[P]`` per teacher; raises a ``UserError`` where the disk is full."""
        path = self._file(shard)
        named = {str(i): of_teacher for i, of_teacher in enumerate(scores)}
        with self._writing(path.name), atomic_write(path) as handle:
            handle.write(save(named, {_SUM: self._sum(shard, named)}))

    def scores(self, plan: Plan, teachers: int) -> list[Tensor]:
        """Return the scores of all pairs, float32 ``[P]`` per teacher.

        Raises:
            UserError: a shard is not there, or not as it was written.
        """
        of_teachers = [torch.empty(len(plan.keys)) for _ in range(teachers)]
        for shard in range(plan.shards):
            try:
                of_shard = self._read(shard, plan, teachers)
            except DamagedError as damage:
                raise UserError(
                    f"model.candidates.bank: {self.folder}: {damage}; run the same command again, which scores it anew"
                ) from damage
            for scores, part in zip(of_teachers, of_shard, strict=True):
                scores[plan.bounds[shard] : plan.bounds[shard + 1]] = part
        return of_teachers

    def remove(self) -> None:
        """Delete what a mining leaves here, and the folder where nothing else is in it."""
        # the manifest first: without it all else is nothing; a folder of this name may be the user's own
        own = [self.folder / MANIFEST, self.folder / PLAN, *self.folder.glob(f".{PLAN}.*.tmp")]
        for folder in sorted(self.folder.glob("[0-9][0-9][0-9][0-9]*")):
            own += [*folder.glob("shard_*.safetensors"), *folder.glob(".shard_*.tmp"), folder]
        for path in [*own, *self.folder.glob(f".{MANIFEST}.*.tmp"), self.folder]:
            with suppress(OSError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def _read(self, shard: int, plan: Plan, teachers: int) -> list[Tensor]:
        path = self._file(shard)
        if not path.exists():
            raise AbsentError(f"{path.name} is missing")
        named = mapped(path)
        with faults_as_damage(path.name):
            with safe_open(str(path), "pt") as opened:
                told = (opened.metadata() or {}).get(_SUM)
            if told != self._sum(shard, named):
                raise DamagedError(f"the checksum of {path.name} does not fit it")
            scores = [named.pop(str(i)) for i in range(teachers)]
            if named or any(s.dtype != torch.float32 or s.shape != (plan.pairs_in(shard),) for s in scores):
                raise ValueError("scores of other pairs or teachers")
            if not all(bool(torch.isfinite(of_teacher).all()) for of_teacher in scores):
                raise ValueError("scores that are not finite numbers")
        return scores

    def _sum(self, shard: int, named: Mapping[str, Tensor]) -> str:
        """Return the SHA-256 of a shard's scores, of its number and of the plan."""
        digest = hashlib.sha256(f"{self._hash} {shard}".encode())
        update_with_tensors(digest, sorted(named.items()))
        return digest.hexdigest()

    def _file(self, shard: int) -> Path:
        # a folder of ten thousands of files is slow to look into
        return self.folder / f"{shard // 1000:04d}" / f"shard_{shard:07d}.safetensors"

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"model.candidates.bank: {name} cannot be written to {self.folder} ({error.strerror or error}); "
                "finished shards are kept there. Make room and run the same command again, or name another folder "
                "with model.candidates.bank.path"
            ) from error
