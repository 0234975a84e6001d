"""Mining a score bank: the teachers score a pool of candidates of every query once, both directions."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lavis_dcd.banks.score_bank import META, BankIdentity, ScoreBank
from lavis_dcd.common.errors import UserError
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.datasets.tree import is_evaluation_set, plain_sets
from lavis_dcd.datasets.views import View, build_view
from lavis_dcd.distillation.candidates import DIRECTIONS
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.mining.identity import identity_of, teacher_views
from lavis_dcd.mining.plan import Plan, WorkFolder, merge
from lavis_dcd.mining.pools import Pairing, shortlists, with_random
from lavis_dcd.mining.report import report
from lavis_dcd.mining.scores import Means, PairScorer, Reader, ReadSet, embed_all, pairing_of
from lavis_dcd.models.dcd.build import build_student, build_teachers
from lavis_dcd.models.dcd.checks import bank_faults
from lavis_dcd.models.dcd.config import DcdConfig
from lavis_dcd.models.dcd.teachers import Teachers

# ----------------------------------------------------------------------------------------------------
# How far a mining is: a bar on a terminal, log lines elsewhere.

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15


class Progress:
    """Counts scored pairs; a context.

    Args:
        total: pairs to score now.
        where: behind "pairs", as in " by this process".
    """

    def __init__(self, total: int, where: str = "") -> None:
        self._total, self._where, self._done = total, where, 0
        self._on_terminal = sys.stderr.isatty()
        self._redirect = logging_redirect_tqdm()

    def __enter__(self) -> Progress:
        self._began = self._told = time.monotonic()
        self._bar = tqdm(total=self._total, unit="pair", unit_scale=True, leave=False, disable=not self._on_terminal)
        if self._on_terminal:
            self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_terminal:
            self._redirect.__exit__(kind, error, trace)
        self._bar.close()

    def add(self, pairs: int) -> None:
        """After a shard of so many pairs."""
        first, now = not self._done, time.monotonic()
        self._done += pairs
        self._bar.update(pairs)
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate
        if first and left:
            log.info("%s pairs/s: about %s for all%s", _number(rate), duration(left), self._where)
        elif left and not self._on_terminal and now - self._told > SECONDS_BETWEEN_LINES:
            self._told = now
            share = 100 * self._done / self._total
            log.info(
                "%s of %s pairs%s (%.0f %%), %s pairs/s, %s left",
                f"{self._done:,}", f"{self._total:,}", self._where, share, _number(rate), duration(left),
            )  # fmt: skip

    def summary(self) -> str:
        """Pairs, time and rate."""
        seconds = time.monotonic() - self._began
        rate = self._done / max(seconds, 1e-9)
        return f"{self._done:,} pairs in {duration(seconds)} ({_number(rate)} pairs/s){self._where}"


def duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h 20 min", "5 d 3 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


class Miner:
    """One mining, in this process or in several of torchrun.

    Args:
        config: the ``model:`` section of a distillation.
        folder: the bank's.
        datasets: by split, "train" among them, as the runner has them.
        run: the ``run:`` section.
        place: this process's device and rank (``training.devices.Process``).
        command: the line that trains from the bank, for the table.
    """

    def __init__(
        self, config: DcdConfig, folder: Path, datasets: Mapping[str, Any], run: Any, place: Any, command: str = ""
    ) -> None:
        if faults := mining_faults(config):
            raise UserError(faults)
        self.config, self.bank, self.folder, self.command = config, config.candidates.bank, Path(folder), command
        self.datasets, self.run, self.place = datasets, run, place
        protocol = EvaluationProtocol.of_run(run)
        amp = config.frozen_amp if protocol.amp == "off" else protocol.amp  # as the teacher has it in training
        self.means = Means(protocol.batch_size, protocol.num_workers, amp, protocol.memory_mb)

    @property
    def settings(self) -> dict[str, Any]:
        """How it is mined: what a bank keeps beside its identity."""
        wanted = {name: getattr(self.bank, name) for name in ("by", "shortlist", "random", "keep")}
        return {**wanted, "seed": self.run.seed, "amp": self.means.amp}

    def mine(self, overwrite: bool = False) -> None:
        """Leaves the bank, ``table.txt`` and ``table.json`` in its folder; at once where the bank is there.

        Args:
            overwrite: whatever bank is there.

        Raises:
            UserError: there is a bank of another teacher, data or settings; no joint space to make a shortlist from.
            KeyboardInterrupt: Ctrl-C; finished shards are kept, and the same call goes on from them.
        """
        identity, there = None, False
        if self.place.is_main:
            identity = identity_of(self.config, self.datasets)
            there = not overwrite and self._is_there(identity)
        identity, there = self.place.share((identity, there))
        if there:
            log.info(
                "the score bank in %s is complete and up to date, nothing to mine; its table: %s; train from it: %s",
                self.folder, self.folder / "table.txt", self.command,
            )  # fmt: skip
            return
        teachers = build_teachers(self.config)
        readers = self._readers(teachers)
        pairing = pairing_of(self.datasets["train"])
        work = WorkFolder(self.folder / "work", {"identity": dataclasses.asdict(identity), "settings": self.settings})
        plan = self._plan(work, pairing, teachers, readers)
        try:
            self._score(work, plan, pairing, readers)
        except KeyboardInterrupt:
            log.warning("interrupted: finished shards are kept in %s, the same command goes on from them", work.folder)
            raise
        self._wait()
        if self.place.is_main:
            self._finish(work, plan, pairing, teachers, identity)

    def _is_there(self, identity: BankIdentity) -> bool:
        if not (self.folder / META).is_file():
            return False
        kept = ScoreBank.load(self.folder)
        differ = kept.differences(identity)
        differ += [
            f"{name} {kept.settings.get(name)!r}, now {value!r}"
            for name, value in self.settings.items()
            if kept.settings.get(name) != value
        ]
        if differ:
            raise UserError(
                f"model.candidates.bank: {self.folder} holds a bank that was mined differently ({'; '.join(differ)}); "
                "mine into another folder with model.candidates.bank.path=FOLDER, or replace it with --overwrite"
            )
        return True

    def _readers(self, teachers: Teachers) -> list[Reader]:
        views = teacher_views(self.config, self.datasets)
        readers = [Reader(self._ready(m), view) for m, view in zip(teachers.matchers, views, strict=True)]
        for number, reader in enumerate(readers):
            log.info("teacher%s reads %s", f" {number}" if len(readers) > 1 else "", _words_of(reader.view))
        return readers

    def _ready(self, matcher: Matcher) -> Matcher:
        return matcher.to(self.place.device).eval()  # type: ignore[attr-defined]

    # -- which pairs ---------------------------------------------------------------------------------------------

    def _plan(self, work: WorkFolder, pairing: Pairing, teachers: Teachers, readers: list[Reader]) -> Plan:
        """Made by the main process, read by the others."""
        plan = None
        if self.place.is_main:
            plan = work.open_plan()
            if plan is None:
                plan = work.begin(Plan.of(pairing, self._pools(pairing, teachers, readers)))
        self.place.share(None)
        return plan or work.read_plan()

    def _pools(self, pairing: Pairing, teachers: Teachers, readers: list[Reader]) -> dict[str, torch.Tensor]:
        if self.bank.shortlist:
            maker = self._maker(teachers, readers)
            read = ReadSet(self.datasets["train"], [maker])
            embeds = embed_all(read, 0, maker, pairing, self.means)
            chosen = shortlists(pairing, maker.matcher, *embeds, self.bank.shortlist)
        else:
            chosen = {d: torch.empty(pairing.queries(d), 0, dtype=torch.int32) for d in DIRECTIONS}
        return {d: with_random(pairing, d, chosen[d], self.bank.random, self.run.seed) for d in DIRECTIONS}

    def _maker(self, teachers: Teachers, readers: list[Reader]) -> Reader:
        """Whose joint space makes the shortlist; of several teachers the first that has one.

        Raises:
            UserError: there is none.
        """
        if self.bank.by == "student":
            student = build_student(self.config, teachers.matchers[0])
            readers = [Reader(self._ready(student), self._student_view())]
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
        """As in training, without random changes: its section's processors, else the data set's."""
        given = self.config.student.get("preprocess")
        view = build_view({"preprocess": given}, "model.student") if given else View()
        sets = [dataset for dataset in self.datasets.values() if is_evaluation_set(dataset)]
        own = sets[0] if sets else next(iter(plain_sets(self.datasets["train"], "").values()))
        return View(vis_eval=view.vis_eval or own.vis_processor, text_eval=view.text_eval or own.text_processor)

    # -- their scores --------------------------------------------------------------------------------------------

    def _score(self, work: WorkFolder, plan: Plan, pairing: Pairing, readers: list[Reader]) -> None:
        """This process's share of the shards, without those that are there."""
        mine = range(self.place.rank, plan.shards, self.place.world_size)
        todo = [shard for shard in mine if not work.is_done(shard)]
        self._announce(plan, pairing, len(mine) - len(todo))
        if not todo:
            return
        read = ReadSet(self.datasets["train"], readers)
        scorer = PairScorer(read, readers, pairing, self.means)
        pictures = [pairing.row_of_image[torch.unique(plan.shard(s) // pairing.texts)].tolist() for s in todo]
        where = " by this process" if self.place.world_size > 1 else ""
        with Progress(sum(plan.pairs_in(shard) for shard in todo), where) as progress:
            for shard, batch in zip(todo, read.batches(pictures, self.means.num_workers), strict=True):
                work.keep(shard, scorer.scores(plan.shard(shard), batch))
                progress.add(plan.pairs_in(shard))
            log.info("scored %s", progress.summary())

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

    def _wait(self) -> None:
        if self.place.world_size > 1:
            dist.barrier(group=self.place.patient)

    def _finish(
        self, work: WorkFolder, plan: Plan, pairing: Pairing, teachers: Teachers, identity: BankIdentity
    ) -> None:
        scores = work.scores(plan, len(teachers.matchers))
        tables = merge(pairing, plan, scores, teachers.weights, self.bank.keep)
        found = report(tables, self.command)
        ScoreBank(identity, self.settings, tables).save(self.folder)
        found.save(self.folder)
        work.remove()
        log.info("score bank: %s\n\n%s\n", self.folder, "\n".join(found.lines()))


def mining_faults(config: DcdConfig) -> list[str]:
    """What cannot be mined, or could not be trained from afterwards, one line each."""
    bank, kept, where = config.candidates.bank, config.selection.hard_negatives, "model.candidates.bank"
    found = bank_faults(config)
    if bank.by == "none" and bank.shortlist > 0:
        found.append(f"{where}.shortlist: {bank.shortlist}, but nobody makes one ({where}.by: none); set it to 0")
    if bank.shortlist == bank.random == 0:
        found.append(f"{where}: shortlist and random are both 0, there would be no candidates")
    if kept is not None and kept > bank.keep and not config.candidates.from_bank:
        found.append(f"{where}.keep: {bank.keep} is less than model.selection.hard_negatives: {kept}; raise it")
    return found


def _words_of(view: View) -> str:
    def said(use: str, processor: Any) -> str:
        return view.words.get(use, f"the data set's evaluation processor ({type(processor).__name__})")

    return f"pictures through {said('vis_eval', view.vis_eval)}, captions through {said('text_eval', view.text_eval)}"
