"""Mining a score bank: the teachers score a pool of candidates of every query once, both directions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from lavis_dcd.banks.score_bank import BankTable, ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.common.progress import progress
from lavis_dcd.config.run_section import EvaluationProtocol, RunConfig
from lavis_dcd.datasets.views import View, build_view
from lavis_dcd.distillation.candidates import DIRECTIONS
from lavis_dcd.distillation.strategies import build_strategy
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.mining.identity import evaluation_view, identity_of, teacher_views
from lavis_dcd.mining.plan import Plan, bank_tables
from lavis_dcd.mining.pools import Pairing, shortlists, with_random
from lavis_dcd.mining.report import MiningReport, has_report, report
from lavis_dcd.mining.scores import MiningResources, PairScorer, Reader, ReadSet, embed_all, pairing_of
from lavis_dcd.mining.work_folder import WorkFolder
from lavis_dcd.models.dcd.build import build_student, build_teachers
from lavis_dcd.models.dcd.checks import bank_faults
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.models.dcd.teachers import Teachers

log = logging.getLogger(__name__)

T = TypeVar("T")


class Process(Protocol):
    """One of the processes that share a mining (``training.devices.Process``)."""

    @property
    def device(self) -> torch.device:
        """The device of its matchers."""

    @property
    def rank(self) -> int:
        """Its number."""

    @property
    def world_size(self) -> int:
        """Return the number of processes."""

    @property
    def patient(self) -> Any:
        """The group in which the others wait for the main process."""

    @property
    def is_main(self) -> bool:
        """The one that writes the files is the main process."""

    def share(self, value: Any) -> Any:
        """Return the main process's value, in every process."""


class Miner:
    """One mining, in this process or in several of torchrun.

    Args:
        config: the ``model:`` section of a distillation.
        folder: the bank's.
        datasets: by split, "train" among them, as the runner has them.
        run: the ``run:`` section.
        place: this process.
        command: the line that trains from the bank, for the table.

    Raises:
        UserError: settings with which nothing can be mined.
    """

    def __init__(
        self,
        config: DcdConfig,
        folder: Path,
        datasets: Mapping[str, Any],
        run: RunConfig,
        place: Process,
        command: str = "",
    ) -> None:
        if faults := mining_faults(config):
            raise UserError(faults)
        self.config, self.bank, self.folder, self.command = config, config.candidates.bank, Path(folder), command
        self.datasets, self.run, self.place = datasets, run, place
        protocol = EvaluationProtocol.of_run(run)
        amp = config.frozen_amp if protocol.amp == "off" else protocol.amp  # as the teacher has it in training
        self.resources = MiningResources(protocol.batch_size, protocol.num_workers, amp, protocol.memory_mb)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the mining, which a bank keeps beside its identity."""
        of_bank = {name: getattr(self.bank, name) for name in ("by", "shortlist", "random", "keep", "keep_by")}
        return {**of_bank, "seed": self.run.seed, "amp": self.resources.amp}

    def mine(self, overwrite: bool = False) -> None:
        """Leave the bank, ``table.txt`` and ``table.json`` in its folder; return at once where the bank is there.

        Args:
            overwrite: whatever bank is there.

        Raises:
            UserError: there is a bank of another teacher, data or settings; no joint space to make a shortlist from.
            KeyboardInterrupt: Ctrl-C; finished shards are kept, and the same call goes on from them.
        """
        identity, is_there = self._by_main(lambda: self._looked(overwrite))
        if is_there:
            log.info(
                "the score bank in %s is complete and up to date, nothing to mine; its table: %s; train from it: %s",
                self.folder, self.folder / "table.txt", self.command,
            )  # fmt: skip
            return
        teachers = build_teachers(self.config)
        readers = self._readers(teachers)
        pairing = pairing_of(self.datasets["train"])
        work = WorkFolder(self.folder / "work", identity, self.settings)
        plan = self._plan(work, pairing, teachers, readers)
        try:
            self._score(work, plan, pairing, readers)
        except KeyboardInterrupt:
            log.warning("interrupted: finished shards are kept in %s, the same command goes on from them", work.folder)
            raise
        if self.place.world_size > 1:
            dist.barrier(group=self.place.patient)
        self._by_main(lambda: self._finish(work, plan, pairing, teachers, identity))

    def _by_main(self, work: Callable[[], T]) -> T:
        """Return what ``work`` gives in the main process, in every process; its user errors are those of all."""
        made: T | None = None
        faults: list[str] = []
        if self.place.is_main:
            try:
                made = work()
            except UserError as error:
                faults = error.faults
        made, faults = self.place.share((made, faults))
        if faults:
            raise UserError(faults)
        return cast(T, made)

    def _looked(self, overwrite: bool) -> tuple[Identity, bool]:
        """Return the identity of the bank that is wanted, and whether it is there."""
        ScoreBank.refuse_foreign(self.folder)
        identity = identity_of(self.config, self.datasets, self.run.picture_content)
        return identity, not overwrite and self._is_there(identity)

    def _is_there(self, identity: Identity) -> bool:
        """Return whether the bank was mined before.

        Raises:
            UserError: it was, but of another teacher, data or settings.
        """
        if not ScoreBank.is_in(self.folder):
            return False
        bank = ScoreBank.load(self.folder)
        differences = bank.differences(identity)
        differences += [
            f"{name} {bank.settings.get(name)!r}, now {value!r}"
            for name, value in self.settings.items()
            if bank.settings.get(name) != value
        ]
        if differences:
            raise UserError(
                f"model.candidates.bank: {self.folder} holds a bank that was mined differently "
                f"({'; '.join(differences)}); mine into another folder with model.candidates.bank.path=FOLDER, or "
                "replace it with --overwrite"
            )
        if not has_report(self.folder, ScoreBank.scores_in(self.folder)):  # killed before the table was written
            self._report(bank.tables)
        return True

    def _report(self, tables: Mapping[str, BankTable]) -> MiningReport:
        """Write the table of the bank that is in the folder."""
        summary = report(tables, self.command)
        summary.save(self.folder, ScoreBank.scores_in(self.folder))
        return summary

    def _readers(self, teachers: Teachers) -> list[Reader]:
        views = teacher_views(self.config, self.datasets)
        readers = [Reader(self._on_device(m), view) for m, view in zip(teachers.matchers, views, strict=True)]
        for number, reader in enumerate(readers):
            log.info("teacher%s reads %s", f" {number}" if len(readers) > 1 else "", _words_of(reader.view))
        return readers

    def _on_device(self, matcher: Matcher) -> Matcher:
        if isinstance(matcher, nn.Module):
            matcher.to(self.place.device).eval()
        return matcher

    # -- which pairs ---------------------------------------------------------------------------------------------

    def _plan(self, work: WorkFolder, pairing: Pairing, teachers: Teachers, readers: Sequence[Reader]) -> Plan:
        """Return the plan that the main process has made or found."""
        here: list[Plan] = []  # large, so that it goes to the other processes by the disk

        def find() -> None:
            plan = work.open_plan(pairing)
            if plan is None:
                plan = work.begin(Plan.of(pairing, self._pools(pairing, teachers, readers)), pairing)
            here.append(plan)

        self._by_main(find)
        return here[0] if here else work.read_plan(pairing)

    def _pools(self, pairing: Pairing, teachers: Teachers, readers: Sequence[Reader]) -> dict[str, torch.Tensor]:
        if self.bank.shortlist:
            reader = self._shortlist_reader(teachers, readers)
            embeds = embed_all(ReadSet(self.datasets["train"], [reader]), reader, pairing, self.resources)
            chosen = shortlists(pairing, reader.matcher, *embeds, self.bank.shortlist)
        else:
            chosen = {d: torch.empty(pairing.queries(d), 0, dtype=torch.int32) for d in DIRECTIONS}
        return {d: with_random(pairing, d, chosen[d], self.bank.random, self.run.seed) for d in DIRECTIONS}

    def _shortlist_reader(self, teachers: Teachers, readers: Sequence[Reader]) -> Reader:
        """Return the reader whose joint space makes the shortlist; of several teachers the first that has one.

        Raises:
            UserError: there is none.
        """
        if self.bank.by == "student":
            student = build_student(self.config, teachers.matchers[0])
            readers = [Reader(self._on_device(student), self._student_view())]
        able = next((reader for reader in readers if reader.matcher.has_joint_space), None)
        if able is None:
            names = " and ".join(dict.fromkeys(type(reader.matcher).__name__ for reader in readers))
            who = "the student" if self.bank.by == "student" else "the teacher"
            raise UserError(
                f"model.candidates.bank.by: {self.bank.by}, but {who} ({names}) has no joint space to make a shortlist "
                "from; draw all candidates at random (model.candidates.bank.by=none model.candidates.bank.shortlist=0, "
                "perhaps with a larger .random), let another matcher choose "
                "(model.candidates.bank.by=student or joint), or take a teacher that has one (for METER: joint_head)"
            )
        log.info("shortlist: by the joint space of %s", type(able.matcher).__name__)
        return able

    def _student_view(self) -> View:
        """Return the student's view without random changes: its section's processors, else the data set's."""
        section = self.config.student.get("preprocess")
        view = build_view({"preprocess": section}, "model.student") if section else View()
        return evaluation_view(view, self.datasets)

    # -- their scores --------------------------------------------------------------------------------------------

    def _score(self, work: WorkFolder, plan: Plan, pairing: Pairing, readers: Sequence[Reader]) -> None:
        """Score this process's share of the shards, but for those that are there."""
        share = range(self.place.rank, plan.shards, self.place.world_size)
        todo = [shard for shard in share if not work.is_done(shard, plan, len(readers))]
        self._announce(plan, pairing, len(share) - len(todo))
        if not todo:
            return
        read = ReadSet(self.datasets["train"], readers)
        scorer = PairScorer(read, readers, pairing, self.resources)
        pictures = [pairing.row_of_image[torch.unique(plan.shard(s) // pairing.texts)].tolist() for s in todo]
        where = " by this process" if self.place.world_size > 1 else ""
        with progress(sum(plan.pairs_in(shard) for shard in todo), "pair", where) as pairs:
            for shard, batch in zip(todo, read.batches(pictures, self.resources.num_workers), strict=True):
                work.keep(shard, scorer.scores(plan.shard(shard), batch))
                pairs.add(plan.pairs_in(shard))
            log.info("scored %s", pairs.summary())

    def _announce(self, plan: Plan, pairing: Pairing, done: int) -> None:
        width = ", ".join(f"{pool.shape[1]} {direction}" for direction, pool in plan.pools.items())
        log.info(
            "mining %s rows (%s pictures, %s captions): candidates per query %s; %s distinct pairs in %s shards",
            f"{len(pairing.image_of_row):,}", f"{pairing.images:,}", f"{pairing.texts:,}", width,
            f"{len(plan.keys):,}", f"{plan.shards:,}",
        )  # fmt: skip
        if done:
            where = " of this process" if self.place.world_size > 1 else ""
            log.info("%d shards%s are there from an earlier start", done, where)

    def _finish(self, work: WorkFolder, plan: Plan, pairing: Pairing, teachers: Teachers, identity: Identity) -> None:
        scores = work.scores(plan, len(teachers.matchers))
        by = build_strategy(self.bank.keep_by)
        tables = bank_tables(pairing, plan, scores, teachers.weights, self.bank.keep, by, self.run.seed)
        ScoreBank(identity, self.settings, tables, self.run.picture_content).save(self.folder)
        summary = self._report(tables)
        work.remove()
        log.info("score bank: %s\n\n%s\n", self.folder, "\n".join(summary.lines()))


def mining_faults(config: DcdConfig) -> list[str]:
    """Return one line per setting with which nothing can be mined, or nothing trained from it afterwards."""
    bank, hard_negatives, where = config.candidates.bank, config.selection.hard_negatives, "model.candidates.bank"
    found = bank_faults(config)
    if bank.by == "none" and bank.shortlist > 0:
        found.append(f"{where}.shortlist: {bank.shortlist}, but nobody makes one ({where}.by: none); set it to 0")
    if bank.shortlist == bank.random == 0:
        found.append(f"{where}: shortlist and random are both 0, there would be no candidates")
    if hard_negatives is not None and hard_negatives > bank.keep and not config.candidates.from_bank:
        found.append(
            f"{where}.keep: {bank.keep} is less than model.selection.hard_negatives: {hard_negatives}; raise it"
        )
    return found


def _words_of(view: View) -> str:
    def processor_words(use: str, processor: Any) -> str:
        return view.words.get(use, f"the data set's evaluation processor ({type(processor).__name__})")

    pictures, captions = processor_words("vis_eval", view.vis_eval), processor_words("text_eval", view.text_eval)
    return f"pictures through {pictures}, captions through {captions}"
