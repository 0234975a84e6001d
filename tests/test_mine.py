"""`python -m lavis_dcd mine` on a dozen pictures: what it leaves, what it says, where it stops and goes on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_dcd import __main__ as commands
from lavis_dcd import mine, train

pytest.importorskip("lavis")
from lavis_dcd.banks.score_bank import ScoreBank, bank_folder
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.locks import one_writer
from lavis_dcd.common.manifest import MANIFEST
from lavis_dcd.datasets.neighbours import NeighbourTable
from lavis_dcd.job import load_config
from lavis_dcd.mining import plan as mining_plan
from lavis_dcd.mining import scores as mining_scores
from lavis_dcd.models.building import build_matcher
from lavis_dcd.processors.captions import DcdCaptionProcessor
from lavis_dcd.processors.images import DcdImageEvalProcessor

TEACHER = {"arch": "meter_retrieval", "model_type": "quickstart"}
READS = {
    "vis_processor": {stage: {"name": f"dcd_image_{stage}", "image_size": 64} for stage in ("train", "eval")},
    "text_processor": {stage: {"name": "dcd_caption"} for stage in ("train", "eval")},
}
BANK = {"shortlist": 3, "random": 2, "keep": 4}
DIRECTIONS = ("image_to_text", "text_to_image")


@pytest.fixture
def job(retrieval_files, tmp_path, monkeypatch, cache) -> Callable[..., Path]:
    """Writes a distillation job; returns its file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mining_plan, "PAIRS_PER_SHARD", 20)

    def write(bank: dict | None = None, model: dict | None = None, run: dict | None = None) -> Path:
        sections = {
            "model": {
                "arch": "dcd",
                "teacher": TEACHER,
                "student": {"init_from_teacher": {"layers": [0]}},
                "candidates": {"bank": {**BANK, **(bank or {})}},
                "selection": {"hard_negatives": 2},
                **(model or {}),
            },
            "datasets": {"coco_retrieval": {**READS, "build_info": retrieval_files}},
            "run": {"device": "cpu", "batch_size_eval": 4, "seed": 1, **(run or {})},
        }
        (tmp_path / "job.yaml").write_text(json.dumps(sections))
        return tmp_path / "job.yaml"

    return write


def run_mine(*args: str) -> int:
    return mine.main(["--cfg-path", "job.yaml", *args])


def folder_of_job() -> Path:
    config = load_config("job.yaml")
    return bank_folder(config.model_cfg, config.datasets_cfg)


def mined(*args: str) -> ScoreBank:
    assert run_mine(*args) == 0
    return ScoreBank.load(folder_of_job())


def scores_of(folder: Path) -> Path:
    (file,) = folder.glob("scores-*.safetensors")
    return file


def training_rows(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "train.json").read_text())


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


class ByHand:
    """A teacher asked about one picture and one caption at a time."""

    def __init__(self, section: dict, folder: Path) -> None:
        self.matcher, self.folder = build_matcher(section, "model").eval(), folder
        self.read = DcdImageEvalProcessor.from_config({"name": "", "image_size": 64})

    @torch.no_grad()
    def features(self, picture: str, caption: str):
        with Image.open(self.folder / picture) as opened:
            pixels = self.read(opened.convert("RGB"))[None]
        return self.matcher.encode_images(pixels), self.matcher.encode_texts([DcdCaptionProcessor()(caption)])

    @torch.no_grad()
    def score(self, picture: str, caption: str) -> float:
        return float(self.matcher.match(*self.features(picture, caption), torch.tensor([[0, 0]])))

    @torch.no_grad()
    def joint(self, picture: str, caption: str) -> float:
        image, text = self.features(picture, caption)
        return float(self.matcher.embed_images(image) @ self.matcher.embed_texts(text).T)


# -- what it leaves ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_of_neighbours_by_the_bank(job, tmp_path, capsys):
    """A job whose teacher scores in the step, with batches by the bank that was mined for it."""
    job(run={"max_steps": 2, "batch_size_train": 4, "batches": {"by": "bank", "size": 2}, "job_id": "one",
             "report": False, "evaluate_before": False, "num_threads": 1})  # fmt: skip
    assert train.main(["--cfg-path", "job.yaml"]) == 2
    (line,) = errors(capsys)
    assert "no score bank in" in line and "run: python -m lavis_dcd mine" in line
    bank = mined()
    assert train.main(["--cfg-path", "job.yaml"]) == 0
    (file,) = tmp_path.glob("output/job/one/neighbours.safetensors")
    table = NeighbourTable.load(file)
    rows = training_rows(tmp_path)
    assert len(table.picture_of_row) == len(bank) == len(rows)
    known = {
        (rows[row]["image_id"], rows[other]["image_id"])
        for of_direction in bank.tables.values()
        for row, others in enumerate(of_direction.candidates.tolist())
        for other in others
        if other >= 0
    }
    names = list(dict.fromkeys(row["image_id"] for row in rows))
    for picture, nearest in enumerate(table.nearest.tolist()):
        pairs = {(names[picture], names[other]) for other in nearest if other >= 0}
        assert pairs and all(pair in known or pair[::-1] in known for pair in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_scores_are_the_teachers_own_pair_by_pair(job, tmp_path, retrieval_files, augment):
    file = job()
    content = json.loads(file.read_text())
    # however the student will train, the teacher's pictures are without chance
    content["datasets"]["coco_retrieval"]["vis_processor"]["train"] |= {"augment": augment}
    file.write_text(json.dumps(content))
    bank, rows = mined(), training_rows(tmp_path)
    teacher = ByHand(TEACHER, tmp_path / "photos")
    assert len(bank) == len(rows) == 16
    for direction in DIRECTIONS:
        table = bank.tables[direction]
        assert table.candidates.shape == (16, 4) and (table.candidates >= 0).all()
        for row, own in enumerate(rows):
            chosen = [rows[i] for i in table.candidates[row].tolist()]
            assert all(other["image_id"] != own["image_id"] for other in chosen)
            named = [other["caption" if direction == "image_to_text" else "image"] for other in chosen]
            assert len(set(named)) == 4
            pairs = [(own["image"], own["caption"])]
            pairs += [
                (own["image"], other["caption"]) if direction == "image_to_text" else (other["image"], own["caption"])
                for other in chosen
            ]
            torch.testing.assert_close(
                table.scores[row], torch.tensor([teacher.score(*pair) for pair in pairs]), rtol=1e-4, atol=1e-4
            )
            assert table.scores[row, 1:].tolist() == sorted(table.scores[row, 1:].tolist(), reverse=True)
    assert bank.settings == {**BANK, "keep_by": "hardest", "by": "joint", "seed": 1, "amp": "off"}


@pytest.mark.slow
def test_the_shortlist_is_the_top_of_the_joint_space(job, tmp_path):
    job({"random": 0, "shortlist": 3, "keep": 9})
    bank, rows = mined(), training_rows(tmp_path)
    teacher = ByHand(TEACHER, tmp_path / "photos")

    def joint(row: int, other: int, direction: str) -> float:
        pair = (row, other) if direction == "image_to_text" else (other, row)
        return teacher.joint(rows[pair[0]]["image"], rows[pair[1]]["caption"])

    pictures = [row["image"] for row in rows]
    for direction, row in itertools.product(DIRECTIONS, (0, 7)):
        others = [r for r, picture in enumerate(pictures) if picture != pictures[row]]
        if direction == "text_to_image":  # each picture once
            others = [r for r in others if r == pictures.index(pictures[r])]
        best = sorted((joint(row, other, direction) for other in others), reverse=True)[:3]
        chosen = bank.tables[direction].candidates[row].tolist()
        # words that the teacher does not know make captions alike: scores are compared, not names
        found = sorted((joint(row, other, direction) for other in chosen), reverse=True)
        assert found == pytest.approx(best, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("few_captions", [True, False])
def test_several_teachers_are_combined_over_each_pool(job, tmp_path, monkeypatch, few_captions):
    """Without a shortlist, and with all there is: the pool is known, so the ensemble can be made by hand."""
    from lavis_dcd.distillation.ensemble import combine

    second = tmp_path / "second.pth"
    content = build_matcher(TEACHER, "model").checkpoint()
    content["model"]["rank_output.weight"] = -content["model"]["rank_output.weight"]
    torch.save(content, second)
    sections = [TEACHER, {**TEACHER, "finetuned": str(second), "weight": 0.5}]
    if not few_captions:  # each shard encodes its own
        monkeypatch.setattr(mining_scores.PairScorer, "_encoded_if_few", lambda self, place: None)
    job({"by": "none", "shortlist": 0, "random": 99, "keep": 99}, {"teacher": None, "teachers": sections})
    bank, rows = mined(), training_rows(tmp_path)
    plain = [{key: value for key, value in section.items() if key != "weight"} for section in sections]
    teachers = [ByHand(section, tmp_path / "photos") for section in plain]
    row, table = 3, bank.tables["text_to_image"]
    own, chosen = rows[row], table.candidates[row].tolist()
    assert len(chosen) == len(set(chosen)) == 7  # all other pictures
    pictures = [own["image"], *(rows[i]["image"] for i in chosen)]
    tables = [torch.tensor([[teacher.score(picture, own["caption"]) for picture in pictures]]) for teacher in teachers]
    expected = combine(tables, torch.ones(1, 8, dtype=torch.bool), [1.0, 0.5])
    torch.testing.assert_close(table.scores[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_a_table_and_the_line_that_trains(job, tmp_path, caplog):
    job(model={"candidates": {"bank": BANK, "image_to_text": {"source": "random", "count": 3},
                             "text_to_image": {"source": "in_batch"}, "teacher_budget": 9}})  # fmt: skip
    caplog.set_level("INFO")
    assert run_mine("--options", "run.max_epoch=3") == 0
    folder = folder_of_job()
    text = (folder / "table.txt").read_text()
    assert text.strip() in caplog.text
    assert "image_to_text: 16 queries, 4.0 candidates each" in text
    command = text.strip().splitlines()[-1]
    assert command == (
        "train from it: python -m lavis.train --cfg-path job.yaml --options run.max_epoch=3 "
        "model.candidates.image_to_text.source=bank model.candidates.image_to_text.count=null "
        "model.candidates.text_to_image.source=bank model.candidates.teacher_budget=null"
    )
    assert json.loads((folder / "table.json").read_text())["directions"]["text_to_image"]["queries"] == 16
    load_config("job.yaml", command.split("--options ")[1].split())  # is sound
    assert sorted(path.name for path in folder.iterdir()) == [
        MANIFEST,
        scores_of(folder).name,
        "table.json",
        "table.txt",
    ]


# -- where it stops and goes on ----------------------------------------------------------------------------------


def stop_after(monkeypatch, shards: int, error: type[BaseException]) -> list[int]:
    """Lets so many shards through; returns the sizes of those that were scored."""
    seen, scores = [], mining_scores.PairScorer.scores

    def limited(self, keys, batch):
        if len(seen) == shards:
            raise error
        seen.append(len(keys))
        return scores(self, keys, batch)

    monkeypatch.setattr(mining_scores.PairScorer, "scores", limited)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_mining_goes_on(job, tmp_path, monkeypatch, caplog, error):
    job()
    assert run_mine("--options", "model.candidates.bank.path=whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2, error)
        if error is KeyboardInterrupt:
            assert run_mine() == 130
            assert "finished shards are kept in" in caplog.text
        else:
            with pytest.raises(error):
                run_mine()
    with pytest.raises(UserError):
        ScoreBank.load(folder_of_job())
    with monkeypatch.context() as patch:
        again = stop_after(patch, 10_000, error)
        caplog.set_level("INFO")
        assert run_mine() == 0
    assert "2 shards are there from an earlier start" in caplog.text
    assert again
    assert scores_of(folder_of_job()).read_bytes() == scores_of(tmp_path / "whole").read_bytes()


@pytest.mark.slow
def test_other_settings_start_anew(job, tmp_path, monkeypatch, caplog):
    job()
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt)
        assert run_mine() == 130
    caplog.set_level("INFO")
    bank = mined("--options", "model.candidates.bank.random=1")
    assert "starting anew" in caplog.text and "earlier start" not in caplog.text
    assert bank.settings["random"] == 1


def in_two_processes(tmp_path: Path, repo_root: Path, *options: str) -> tuple[list[int], list[str]]:
    """Mines ``two`` as under torchrun; returns statuses and what was written to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import sys; from lavis_dcd.mining import plan; plan.PAIRS_PER_SHARD = 20; "
        "from lavis_dcd.__main__ import main; "
        "sys.exit(main(['mine', '--cfg-path', 'job.yaml', '--options', 'model.candidates.bank.path=two', "
        "*sys.argv[1:]]))"
    )
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *options],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(repo_root)},
            stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_two_processes_make_the_same_bank(job, tmp_path, repo_root):
    job()
    assert run_mine("--options", "model.candidates.bank.path=alone") == 0
    status, said = in_two_processes(tmp_path, repo_root)
    assert status == [0, 0], said
    assert "by this process" in said[0]
    for name in (scores_of(tmp_path / "alone").name, MANIFEST):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # what the main process alone finds out is told by both
    status, said = in_two_processes(tmp_path, repo_root, "run.seed=5")
    assert status == [2, 2]
    for words in said:
        assert "seed 1, now 5" in words and "Traceback" not in words


@pytest.mark.slow
def test_a_bank_that_is_there(job, tmp_path, monkeypatch, caplog, capsys):
    job()
    mined()
    caplog.set_level("INFO")

    def refuse(*args, **kwargs):
        raise AssertionError("the teacher is built")

    with monkeypatch.context() as patch:
        patch.setattr("lavis_dcd.mining.miner.build_teachers", refuse)
        assert run_mine() == 0
        assert "is complete and up to date" in caplog.text
        assert run_mine("--options", "model.candidates.bank.shortlist=2", "run.seed=5") == 2
        (line,) = errors(capsys)
        assert "shortlist 3, now 2; seed 1, now 5" in line and "--overwrite" in line and "bank.path" in line
        rows = training_rows(tmp_path)
        rows[1]["caption"] = "another"  # none of those that show how the teacher reads
        (tmp_path / "train.json").write_text(json.dumps(rows))
        assert run_mine() == 2
        (line,) = errors(capsys)
        assert "mined differently (the rows of train (captions" in line
    assert mined("--overwrite", "--options", "model.candidates.bank.shortlist=2").settings["shortlist"] == 2


@pytest.mark.slow
def test_shards_that_were_changed_are_scored_again(job, tmp_path, monkeypatch, caplog):
    job()
    assert run_mine("--options", "model.candidates.bank.path=whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt)
        assert run_mine() == 130
    shard = folder_of_job() / "work" / "0000" / "shard_0000001.safetensors"
    flip(shard)
    with monkeypatch.context() as patch:
        again = stop_after(patch, 10_000, KeyboardInterrupt)
        caplog.set_level("INFO")
        assert run_mine() == 0
    assert "the checksum of shard_0000001.safetensors does not fit it; it is scored again" in caplog.text
    assert "1 shards are there from an earlier start" in caplog.text and again
    assert scores_of(folder_of_job()).read_bytes() == scores_of(tmp_path / "whole").read_bytes()


def flip(path: Path) -> None:
    """Another byte at the end, under the same size and time."""
    content, facts = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.slow
def test_a_bank_whose_bytes_or_pictures_changed(job, tmp_path, capsys, monkeypatch):
    job()
    bank = mined()
    scores = {d: table.scores.clone() for d, table in bank.tables.items()}
    folder = folder_of_job()
    (folder / "table.txt").unlink()  # killed behind the bank
    assert run_mine() == 0 and "image_to_text: 16 queries" in (folder / "table.txt").read_text()

    def full(source, target):
        if Path(target).name == MANIFEST and Path(target).parent == folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    real, before = os.replace, {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert run_mine("--overwrite", "--options", "run.seed=3") == 2
    (line,) = errors(capsys)
    assert "cannot be written to" in line and "No space left on device" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    flip(scores_of(folder))
    assert run_mine() == 2
    (line,) = errors(capsys)
    assert f"the checksum of {scores_of(folder).name} does not fit it" in line
    again = mined("--overwrite")
    assert all(again.tables[d].scores.equal(of_direction) for d, of_direction in scores.items())

    rows = training_rows(tmp_path)
    flip(tmp_path / "photos" / rows[2]["image"])  # behind the picture's end
    assert run_mine() == 2
    (line,) = errors(capsys)
    assert "mined differently (the pictures of train (" in line


def test_two_minings_of_one_bank(job, capsys):
    job()
    with one_writer(folder_of_job(), "the score bank"):
        assert run_mine() == 2
        (line,) = errors(capsys)
    assert f"the score bank {folder_of_job()}: another process (number {os.getpid()} on " in line
    assert "mine into another folder with model.candidates.bank.path=FOLDER" in line


@pytest.mark.slow
def test_two_processes_that_share_a_mining_hold_one_lock(job, tmp_path, repo_root):
    job()
    with one_writer(tmp_path / "two", "the score bank"):
        status, said = in_two_processes(tmp_path, repo_root)
    assert status == [2, 2]
    for words in said:
        (line,) = [line for line in words.splitlines() if line.startswith("error: ")]
        assert "is writing there; wait until it has ended" in line and "Traceback" not in words


# -- the command -------------------------------------------------------------------------------------------------


def test_no_joint_space_says_what_else_to_do(job, tmp_path, capsys):
    content = build_matcher(TEACHER, "model").checkpoint()
    content["model"] = {name: t for name, t in content["model"].items() if not name.startswith("joint_head")}
    content["config"] = {**content["config"], "joint_head": None}
    torch.save(content, tmp_path / "plain.pth")
    teacher = {**TEACHER, "joint_head": None, "finetuned": str(tmp_path / "plain.pth")}
    job(model={"teacher": teacher})
    assert run_mine() == 2
    (line,) = errors(capsys)
    assert "the teacher (MeterRetrieval) has no joint space" in line
    assert "model.candidates.bank.by=none model.candidates.bank.shortlist=0" in line
    ways = ["model.candidates.bank.by=none", "model.candidates.bank.shortlist=0", "model.candidates.bank.random=6"]
    assert mined("--options", *ways).tables["image_to_text"].candidates.shape == (16, 4)


def test_the_students_shortlist(job, tmp_path, caplog):
    job({"by": "student"}, run={"picture_content": "all"})
    caplog.set_level("INFO")
    bank = mined()
    assert bank.picture_content == "all"
    assert bank.settings["by"] == "student"
    assert "shortlist: by the joint space of" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.candidates.bank.by=me"], "model.candidates.bank.by: 'me' is none of joint, student, none"),
        (["model.candidates.bank.keep=-1", "model.selection.hard_negatives=null"], "model.candidates.bank.keep: -1"),
        (["model.selection.hard_negatives=5"], "keep: 4 is less than model.selection.hard_negatives: 5"),
        (["model.candidates.bank.by=none"], "model.candidates.bank.shortlist: 3, but nobody makes one"),
        (["model.candidates.bank.shortlist=0", "model.candidates.bank.random=0"], "model.candidates.bank"),
        (["model.candidates.bank.shortlits=1"], "model.candidates.bank.shortlits"),
        (["run.train_splits=[other]"], "run.train_splits"),
    ],
)
def test_settings_that_make_no_sense(job, capsys, options, said):
    job()
    assert run_mine("--options", *options) == 2
    (line,) = errors(capsys)
    assert said in line


def test_a_job_without_a_teacher(job, capsys):
    file = job()
    content = json.loads(file.read_text())
    content["model"] = {"arch": "meter_retrieval", "model_type": "quickstart"}
    file.write_text(json.dumps(content))
    assert run_mine() == 2
    assert "model.arch: meter_retrieval has no teacher to mine" in errors(capsys)[0]


def test_commands_are_listed(capsys, monkeypatch):
    assert commands.main([]) == 2
    assert "mine" in capsys.readouterr().err
    assert commands.main(["--help"]) == 0
    assert "  mine  " in capsys.readouterr().out
    assert commands.main(["dig"]) == 2
    assert "'dig' is no command" in capsys.readouterr().err
    monkeypatch.setattr(mine, "main", lambda argv: [5, argv])
    assert commands.main(["mine", "--x"]) == [5, ["--x"]]


def test_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        mine.main(["--help"])
    assert stop.value.code == 0
    assert "--overwrite" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        mine.main([])
    assert stop.value.code == 2
