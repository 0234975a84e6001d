import dataclasses
import errno
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("lavis")
from omegaconf import OmegaConf

from lavis_dcd.banks.score_bank import FORMAT, KIND, BankTable, ScoreBank, bank_folder
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import MANIFEST, Identity, Manifest

IDENTITY = Identity({"the teacher": "t" * 64, "the transforms": "p" * 64}, {"train": "r" * 64}, {"train": "p" * 64})


def scores_file(folder: Path) -> Path:
    (file,) = folder.glob("scores-*.safetensors")
    return file


def same(one: ScoreBank, other: ScoreBank) -> bool:
    facts = (one.identity, one.settings, one.picture_content) == (other.identity, other.settings, other.picture_content)
    return facts and all(
        one.tables[d].candidates.equal(other.tables[d].candidates)
        and one.tables[d].scores.equal(other.tables[d].scores)
        for d in one.tables.keys() | other.tables.keys()
    )


def table(rows: int = 5, kept: int = 3, seed: int = 0) -> BankTable:
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(-1, rows, (rows, kept), generator=generator, dtype=torch.int32)
    return BankTable(candidates, torch.randn(rows, 1 + kept, generator=generator))


def bank(**tables: BankTable) -> ScoreBank:
    tables = tables or {"image_to_text": table(), "text_to_image": table(kept=2, seed=1)}
    return ScoreBank(IDENTITY, {"by": "joint", "keep": 3}, tables)


def test_what_is_saved_comes_back(tmp_path):
    saved = bank()
    saved.save(tmp_path / "new" / "bank")
    loaded = ScoreBank.load(tmp_path / "new" / "bank")
    assert loaded.identity == IDENTITY and loaded.settings == saved.settings and len(loaded) == 5
    assert loaded.tables.keys() == saved.tables.keys()
    for direction, kept in saved.tables.items():
        torch.testing.assert_close(loaded.tables[direction].candidates, kept.candidates)
        torch.testing.assert_close(loaded.tables[direction].scores, kept.scores)
    assert {file.name for file in (tmp_path / "new" / "bank").iterdir()} == {
        MANIFEST,
        scores_file(tmp_path / "new" / "bank").name,
    }


def test_a_bank_is_mapped_not_read(tmp_path):
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc")

    def resident_mb() -> float:
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    rows = 200_000
    big = BankTable(torch.zeros(rows, 63, dtype=torch.int32), torch.zeros(rows, 64))
    bank(image_to_text=big).save(tmp_path)
    del big
    before = resident_mb()
    loaded = ScoreBank.load(tmp_path)
    assert loaded.tables["image_to_text"].scores[[3, rows - 1]].sum() == 0
    assert resident_mb() - before < 25  # of 97 MB


@pytest.mark.parametrize(
    ("candidates", "scores"),
    [
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3)),
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(5, 4)),
        (torch.zeros(4, 3), torch.zeros(4, 4)),
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.float16)),
    ],
)
def test_tables_have_one_shape(candidates, scores):
    with pytest.raises(ValueError, match="must be"):
        BankTable(candidates, scores)


def test_tables_belong_together():
    with pytest.raises(ValueError, match="lengths"):
        bank(image_to_text=table(5), text_to_image=table(6))
    with pytest.raises(ValueError, match="sideways"):
        bank(sideways=table())


def test_absent(tmp_path):
    with pytest.raises(UserError, match=r"no score bank in .*nowhere; run: python -m lavis_dcd mine --cfg-path F"):
        ScoreBank.load(tmp_path / "nowhere")


@pytest.mark.parametrize("step", ["scores", MANIFEST])
@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_write_cut_short_leaves_the_former_bank(tmp_path, monkeypatch, step, former, error):
    kept = bank(image_to_text=table(seed=7))
    if former:
        kept.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.replace

    def fail(source, target):
        if Path(target).name.startswith(step):
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((KeyboardInterrupt, UserError)) as caught:
        bank().save(tmp_path)
    if isinstance(caught.value, UserError):
        (line,) = caught.value.faults
        assert f"cannot be written to {tmp_path} (No space left on device)" in line and "bank.path" in line
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if former:
        assert same(ScoreBank.load(tmp_path), kept)
    else:
        with pytest.raises(UserError, match="no score bank"):
            ScoreBank.load(tmp_path)


def test_a_disk_that_really_takes_no_more(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the write itself fails, and safetensors wraps the system's error."""
    resource = pytest.importorskip("resource")
    bank().save(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"the scores cannot be written to .* a bank that was there is whole"):
            bank(image_to_text=table(10_000)).save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(ScoreBank.load(tmp_path), bank())
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, scores_file(tmp_path).name]


def test_a_bank_killed_before_its_manifest_is_none(tmp_path):
    bank().save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"no score bank in .* \(its mining was not finished\)"):
        ScoreBank.load(tmp_path)


def test_a_new_bank_takes_the_place_of_the_former(tmp_path):
    bank(image_to_text=table(seed=7)).save(tmp_path)
    former = ScoreBank.load(tmp_path)
    (tmp_path / "table.txt").write_text("mine")
    bank().save(tmp_path)
    assert same(ScoreBank.load(tmp_path), bank())
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, scores_file(tmp_path).name, "table.txt"]
    assert same(former, bank(image_to_text=table(seed=7)))  # mapped; the file's name alone is gone


def test_who_loads_while_it_is_replaced_gets_one_or_the_other(tmp_path):
    banks = [bank(image_to_text=table(50, 5, seed)) for seed in range(2)]
    banks[0].save(tmp_path)
    stop, loaded = threading.Event(), [0, 0]

    def write() -> None:
        while not stop.is_set():
            for each in reversed(banks):
                each.save(tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(150):
            got = ScoreBank.load(tmp_path)
            (which,) = [i for i, each in enumerate(banks) if same(got, each)]
            loaded[which] += 1
    finally:
        stop.set()
        writer.join()
    assert sum(loaded) == 150


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Another bit, under the same size and time."""
    content, facts = bytearray(path.read_bytes()), path.stat()
    content[at] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_changed_bytes_are_refused(tmp_path):
    bank().save(tmp_path)
    flip(scores_file(tmp_path), -1)
    with pytest.raises(UserError) as caught:
        ScoreBank.load(tmp_path)
    (line,) = caught.value.faults
    name = scores_file(tmp_path).name
    assert (
        f"is broken (the checksum of {name} does not fit it); run: python -m lavis_dcd mine --cfg-path F --overwrite"
        in line
    )


@pytest.mark.parametrize(
    "fault", ["shorter", "other", "no scores", "a link", "no json", "another sum", "kind", "format", "no files"]
)
def test_broken(tmp_path, fault):
    bank().save(tmp_path)
    scores, manifest = scores_file(tmp_path), tmp_path / MANIFEST
    told = Manifest.read(tmp_path, KIND, FORMAT)
    if fault == "shorter":
        scores.write_bytes(scores.read_bytes()[:-8])
    elif fault == "other":
        scores.write_bytes(b"x" * scores.stat().st_size)
    elif fault == "no scores":
        scores.unlink()
    elif fault == "a link":
        scores.rename(tmp_path / "else")
        scores.symlink_to(tmp_path / "else")
    elif fault == "no json":
        manifest.write_text(manifest.read_text()[:20])
    elif fault == "another sum":
        manifest.write_text(manifest.read_text().replace("joint", "point"))
    else:
        other = {"kind": "feature bank"} if fault == "kind" else {"format": 99} if fault == "format" else {"files": {}}
        dataclasses.replace(told, **other).write(tmp_path)
    with pytest.raises(UserError, match=r"the score bank in .* is broken .*; run: .* mine .* --overwrite"):
        ScoreBank.load(tmp_path)


def tensors(**other: Any) -> dict[str, torch.Tensor]:
    kept = table()
    named = {"image_to_text.candidates": kept.candidates, "image_to_text.scores": kept.scores, **other}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


OTHER_ROWS = {
    "text_to_image.candidates": torch.zeros(4, 1, dtype=torch.int32),
    "text_to_image.scores": torch.zeros(4, 2),
}
C, S = "image_to_text.candidates", "image_to_text.scores"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(tensors(**{C: torch.full((5, 3), 5, dtype=torch.int32)}), id="a row that is not there"),
        pytest.param(tensors(**{C: torch.full((5, 3), -2, dtype=torch.int32)}), id="below -1"),
        pytest.param(tensors(**{C: torch.full((5, 3), 2**31 - 1, dtype=torch.int32)}), id="huge"),
        pytest.param(tensors(**{C: torch.zeros(5, 3, dtype=torch.int64)}), id="int64"),
        pytest.param(tensors(**{C: torch.zeros(5, 4, dtype=torch.int32)}), id="too wide"),
        pytest.param(tensors(**{C: torch.zeros(15, dtype=torch.int32)}), id="flat"),
        pytest.param(tensors(**{S: torch.full((5, 4), torch.nan)}), id="nan"),
        pytest.param(tensors(**{S: torch.full((5, 4), -torch.inf)}), id="infinite"),
        pytest.param(tensors(**{S: torch.zeros(5, 4, dtype=torch.float16)}), id="half"),
        pytest.param(tensors(**{S: None}), id="no scores"),
        pytest.param(tensors(**{"more": torch.zeros(1)}), id="another tensor"),
        pytest.param(tensors(**OTHER_ROWS), id="other rows"),
        pytest.param({"sideways.candidates": table().candidates, "sideways.scores": table().scores}, id="sideways"),
        pytest.param({}, id="nothing"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, content):
    """Even under the right sum."""
    save_file(content, str(tmp_path / "scores-0.safetensors"))
    facts = {"settings": {}, "rows": 5, "picture_content": "sample"}
    made = {"kind": KIND, "format": FORMAT, "identity": IDENTITY, "facts": facts}
    Manifest.of(tmp_path, ["scores-0.safetensors"], **made).write(tmp_path)
    with pytest.raises(UserError, match="is broken"):
        ScoreBank.load(tmp_path)


@pytest.mark.parametrize("facts", [{}, {"settings": 3}, {"settings": [1]}, {"settings": {}, "picture_content": ["x"]}])
def test_facts_that_make_no_sense_are_refused(tmp_path, facts):
    bank().save(tmp_path)
    told = Manifest.read(tmp_path, KIND, FORMAT)
    dataclasses.replace(told, facts=facts).write(tmp_path)
    with pytest.raises(UserError, match=r"is broken \(manifest.json is not of the form"):
        ScoreBank.load(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_to_a_file_no_score_changes(tmp_path, seed):
    draw, expected = random.Random(seed), bank()
    expected.save(tmp_path)
    path = draw.choice(sorted(tmp_path.iterdir()))
    size = path.stat().st_size
    if seed % 3 < 2:
        flip(path, draw.randrange(size), draw.randrange(8))
    else:
        os.truncate(path, draw.randrange(size))
    try:
        assert same(ScoreBank.load(tmp_path), expected)  # white space in the manifest is no content
    except UserError as error:
        (line,) = error.faults
        assert f"the score bank in {tmp_path} is broken (" in line and "\n" not in line


def test_a_bank_of_the_former_format_is_one_line(tmp_path):
    save_file(tensors(), str(tmp_path / "scores.safetensors"))
    (tmp_path / "meta.json").write_text(json.dumps({"format": 1, "rows": 5, "directions": []}))
    assert ScoreBank.is_in(tmp_path)
    with pytest.raises(UserError) as caught:
        ScoreBank.load(tmp_path)
    (line,) = caught.value.faults
    assert "is of an older version (format 1)" in line and line.endswith("mine --cfg-path F --overwrite")
    bank().save(tmp_path)
    assert same(ScoreBank.load(tmp_path), bank())
    assert not (tmp_path / "meta.json").exists() and not (tmp_path / "scores.safetensors").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"bank.path: .*file is no folder"):
        ScoreBank.refuse_foreign(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot be written to .*file"):
        bank().save(tmp_path / "file")
    with pytest.raises(UserError, match=r"is broken \(manifest.json cannot be read \(Not a directory\)"):
        ScoreBank.load(tmp_path / "file")


def test_files_of_the_users_own_stay(tmp_path):
    for name in ("meta.json", "scores.safetensors", "scores.csv"):
        (tmp_path / name).write_text('{"format": "mine"}')
    assert not ScoreBank.is_in(tmp_path)
    (tmp_path / ".scores-0.safetensors.x.tmp").write_bytes(b"half, of a killed mining")
    bank().save(tmp_path)
    bank(image_to_text=table(seed=2)).save(tmp_path)
    names = {"meta.json", "scores.safetensors", "scores.csv", MANIFEST, scores_file(tmp_path).name}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "meta.json").read_text() == '{"format": "mine"}'


@pytest.mark.parametrize("content", ["a web app's", "a feature bank's"])
def test_a_manifest_of_something_else_is_not_replaced(tmp_path, content):
    ScoreBank.refuse_foreign(tmp_path)
    if content == "a web app's":
        (tmp_path / MANIFEST).write_text("{}")
    else:
        Manifest("feature bank", 4, IDENTITY).write(tmp_path)
    with pytest.raises(UserError, match=r"manifest.json is no score bank's, and a bank would replace it; name another"):
        ScoreBank.refuse_foreign(tmp_path)
    bank().save(tmp_path / "own")
    ScoreBank.refuse_foreign(tmp_path / "own")
    (tmp_path / "own" / MANIFEST).write_text("{")  # one that was damaged may be replaced
    ScoreBank.refuse_foreign(tmp_path / "own")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"settings": {**IDENTITY.settings, "the teacher": "T"}}, "the teacher (its section, or"),
        ({"settings": {**IDENTITY.settings, "the transforms": "T"}}, "the transforms (the teacher's processors"),
        ({"rows": {"train": "T"}}, "the rows of train (captions, or their order)"),
        ({"pictures": {"train": "T"}}, "the pictures of train (files of other names, sizes, times or contents)"),
    ],
)
def test_stale_names_what_differs(tmp_path, other, named):
    kept = bank()
    kept.refuse_stale(IDENTITY, tmp_path)
    with pytest.raises(UserError) as caught:
        kept.refuse_stale(dataclasses.replace(IDENTITY, **other), tmp_path)
    (line,) = caught.value.faults
    assert str(tmp_path) in line and "python -m lavis_dcd mine --cfg-path F --overwrite" in line
    assert f"another state of {named}" in line and line.count("the teacher (") + line.count("of train (") <= 1


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-that-name/x", "/", "circle/x"])
def test_a_path_that_is_none_is_one_line(tmp_path, monkeypatch, path):
    if path == "circle/x" and sys.version_info >= (3, 13):
        pytest.skip("links in a circle are no error there")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match=r"^model.candidates.bank.path: "):
        bank_folder({"candidates": {"bank": {"path": path}}}, {})


def test_a_path_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        ScoreBank.load(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="File name too long"):
        bank().save(tmp_path / ("x" * 300))


def test_folder_of_a_job(tmp_path, cache):
    model = {"teacher": {"arch": "a", "finetuned": "f.pth"}, "student": {"arch": "b"}, "candidates": {"source": "bank"}}
    data = {"coco_retrieval": {"data_dir": "d"}}
    folder = bank_folder(model, data)
    assert folder.parent == cache / "dcd_scores" and len(folder.name) == 16
    assert bank_folder(OmegaConf.create(model), OmegaConf.create(data)) == folder
    assert bank_folder({**model, "student": {"arch": "c"}, "selection": {"hard_negatives": 3}}, data) == folder
    assert bank_folder({**model, "teacher": None, "teachers": [model["teacher"]]}, data) == folder
    assert bank_folder({**model, "teacher": {"arch": "a", "finetuned": "g.pth"}}, data) != folder
    assert bank_folder(model, {"coco_retrieval": {"data_dir": "e"}}) != folder
    own = {**model, "candidates": {"source": "bank", "bank": {"path": str(tmp_path / "mine")}}}
    assert bank_folder(own, data) == tmp_path / "mine"
