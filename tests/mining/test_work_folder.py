"""The folder of an unfinished mining: what it takes for done, whatever has happened to its files."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import MANIFEST, DamagedError, Identity
from lavis_dcd.distillation.candidates import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from lavis_dcd.mining import plan as mining_plan
from lavis_dcd.mining.plan import Plan
from lavis_dcd.mining.pools import Pairing
from lavis_dcd.mining.work_folder import PLAN, WorkFolder

PAIRING = Pairing.of([0, 0, 1, 2, 3], ["a", "b", "c", "d", "e"])
POOLS = {
    IMAGE_TO_TEXT: torch.tensor([[2, 3], [0, -1], [4, 0], [1, 0]], dtype=torch.int32),
    TEXT_TO_IMAGE: torch.tensor([[1], [3], [0], [-1], [2]], dtype=torch.int32),
}
IDENTITY = Identity({"the teacher": "t"}, {"train": "r"}, {"train": "p"})
SETTINGS = {"keep": 3}
TEACHERS = 2


def work_in(folder: Path, identity: Identity = IDENTITY, **settings: int) -> WorkFolder:
    return WorkFolder(folder / "work", identity, {**SETTINGS, **settings})


def scores_of(plan: Plan, shard: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(shard)
    return [torch.randn(plan.pairs_in(shard), generator=generator) for _ in range(TEACHERS)]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A folder with the plan and the scores of four shards, one for each picture."""
    monkeypatch.setattr(mining_plan, "PAIRS_PER_SHARD", 1)
    work = work_in(tmp_path)
    plan = work.begin(Plan.of(PAIRING, POOLS), PAIRING)
    assert plan.shards == 4
    for shard in range(4):
        work.keep(shard, scores_of(plan, shard))
    return work, plan


def shard_file(work: WorkFolder, shard: int) -> Path:
    return work.folder / "0000" / f"shard_{shard:07d}.safetensors"


def test_work_goes_on_only_from_the_same(begun, tmp_path, caplog):
    caplog.set_level("INFO")
    _, plan = begun
    again = work_in(tmp_path)
    kept = again.open_plan(PAIRING)
    assert kept.keys.equal(plan.keys) and kept.fingerprint() == plan.fingerprint()
    shard_file(again, 3).unlink()
    assert [again.is_done(shard, kept, TEACHERS) for shard in range(4)] == [True, True, True, False]
    again.keep(3, scores_of(plan, 3))
    expected = [torch.cat(parts) for parts in zip(*(scores_of(plan, shard) for shard in range(4)), strict=True)]
    assert all(a.equal(b) for a, b in zip(again.scores(kept, TEACHERS), expected, strict=True))
    assert not caplog.records
    assert again.read_plan(PAIRING).keys.equal(plan.keys)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"keep": 4}, "the settings"),
        ({"identity": Identity({"the teacher": "T"}, IDENTITY.rows, IDENTITY.pictures)}, "the teacher"),
        ({"identity": Identity(IDENTITY.settings, {"train": "R"}, IDENTITY.pictures)}, "the rows of train"),
        ({"identity": Identity(IDENTITY.settings, IDENTITY.rows, {"train": "P"})}, "the pictures of train"),
    ],
)
def test_work_of_another_mining_is_begun_anew(begun, tmp_path, caplog, other, named):
    caplog.set_level("INFO")
    assert work_in(tmp_path, **other).open_plan(PAIRING) is None
    (record,) = caplog.records
    assert f"({named} differ); starting anew" in record.message
    assert not (tmp_path / "work").exists()


def test_a_shard_of_another_plan_or_number_does_not_count(begun, tmp_path, caplog):
    work, plan = begun
    shard_file(work, 0).replace(shard_file(work, 1))
    assert not work.is_done(1, plan, TEACHERS) and "shard_0000001.safetensors" in caplog.text
    other = work_in(tmp_path / "other")
    flipped = Plan.of(PAIRING, {**POOLS, TEXT_TO_IMAGE: POOLS[TEXT_TO_IMAGE].flip(0)})
    other.begin(flipped, PAIRING)
    shard_file(other, 2).parent.mkdir()
    shard_file(work, 2).replace(shard_file(other, 2))
    assert not other.is_done(2, flipped, TEACHERS)


def flip(path: Path, at: int, bit: int = 0) -> None:
    content, facts = bytearray(path.read_bytes()), path.stat()
    content[at] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_a_changed_score_is_noticed_and_scored_again(begun, tmp_path, caplog):
    _, plan = begun
    work = work_in(tmp_path)
    flip(shard_file(work, 2), -4)
    work.open_plan(PAIRING)
    assert [work.is_done(shard, plan, TEACHERS) for shard in range(4)] == [True, True, False, True]
    (record,) = caplog.records
    assert record.message.endswith("the checksum of shard_0000002.safetensors does not fit it; it is scored again")
    with pytest.raises(UserError, match=r"shard_0000002.safetensors.*run the same command again"):
        work.scores(plan, TEACHERS)


def test_a_folder_of_the_users_own_stays(begun, tmp_path):
    """A bank may be mined into any folder, and this name is a common one."""
    work, plan = begun
    (work.folder / "thesis.tex").write_text("years")
    (work.folder / "2024").mkdir()
    (work.folder / "2024" / "shards.csv").write_text("mine")
    (work.folder / "0000" / ".shard_0000001.safetensors.x.tmp").write_bytes(b"half")
    work_in(tmp_path, keep=9).begin(plan, PAIRING).check(PAIRING)
    assert not list(work.folder.rglob("*shard_*"))
    work.remove()
    left = sorted(path.relative_to(work.folder).as_posix() for path in work.folder.rglob("*"))
    assert left == ["2024", "2024/shards.csv", "thesis.tex"]


@pytest.mark.parametrize("name", [PLAN, MANIFEST])
@pytest.mark.parametrize("how", ["changed", "cut"])
def test_a_damaged_plan_is_none(begun, tmp_path, caplog, name, how):
    work, _ = begun
    file = work.folder / name
    if how == "changed":
        flip(file, len(file.read_bytes()) // 2)
    else:
        file.write_bytes(file.read_bytes()[:100])
    assert work_in(tmp_path).open_plan(PAIRING) is None
    (record,) = caplog.records
    assert name in record.message and "starting anew" in record.message
    assert not work.folder.exists()


def test_tensors_that_are_no_scores_are_not_taken(begun):
    """Even with the sum of what they hold."""
    work, plan = begun
    whole = scores_of(plan, 1)
    for wrong in (
        {"0": whole[0]},
        {"0": whole[0], "1": whole[1], "2": whole[1].clone()},
        {"0": whole[0], "1": whole[1].double()},
        {"0": whole[0], "1": whole[1][:-1].contiguous()},
        {"0": whole[0], "1": whole[1] * torch.nan},
    ):
        save_file(wrong, shard_file(work, 1), {"sha256": work._sum(1, wrong)})
        assert not work.is_done(1, plan, TEACHERS)
    right = {"0": whole[0], "1": whole[1]}
    save_file(right, shard_file(work, 1), {"sha256": work._sum(1, right)})
    assert work.is_done(1, plan, TEACHERS)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_to_a_file_no_score_changes(begun, tmp_path, seed):
    draw, (_, plan) = random.Random(seed), begun
    expected = [torch.cat(parts) for parts in zip(*(scores_of(plan, shard) for shard in range(4)), strict=True)]
    for _ in range(4):
        path = draw.choice(sorted(path for path in (tmp_path / "work").rglob("*") if path.is_file()))
        if draw.random() < 0.7:
            flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
        else:
            os.truncate(path, draw.randrange(path.stat().st_size))
        work = work_in(tmp_path)
        if work.open_plan(PAIRING) is None:
            work.begin(plan, PAIRING)
        for shard in range(4):
            if not work.is_done(shard, plan, TEACHERS):
                work.keep(shard, scores_of(plan, shard))
        assert all(a.equal(b) for a, b in zip(work.scores(plan, TEACHERS), expected, strict=True))


def test_a_full_disk_is_one_line_and_finished_shards_stay(begun, tmp_path, monkeypatch):
    work, plan = begun
    shard_file(work, 3).unlink()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"shard_0000003.safetensors cannot be written to .*No space left"):
            work.keep(3, scores_of(plan, 3))
    assert [work.is_done(shard, plan, TEACHERS) for shard in range(4)] == [True, True, True, False]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"plan.safetensors cannot be written to"):
            work_in(tmp_path / "new").begin(plan, PAIRING)


def test_a_plan_that_another_process_cannot_see_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"plan.safetensors .*all processes of a mining need the same folder"):
        work_in(tmp_path).read_plan(PAIRING)
    with pytest.raises(DamagedError):
        Plan.load(tmp_path / "no")
