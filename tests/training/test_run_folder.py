import json

import pytest

from lavis_dcd.common.manifest import AbsentError, DamagedError, Identity
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.training.run_folder import (
    clear_run_manifest,
    finished,
    run_manifest,
    settings_digests,
    write_run_manifest,
)

IDENTITY = Identity({"the teacher": "a" * 64}, {"test": "b" * 64}, {"test": "c" * 64})


def config(**run):
    return {"model": {"arch": "x", 1: "one"}, "datasets": {"own": {}}, "run": {**RunConfig().to_dict(), **run}}


def write_products(folder):
    for name in ("student.pth", "results.json", "results_val.json", "report.html", "log.txt"):
        (folder / name).write_text(name)


def test_a_run_is_done_when_its_manifest_is_there_and_fits(tmp_path):
    write_products(tmp_path)
    assert finished(tmp_path) is None
    with pytest.raises(AbsentError):
        run_manifest(tmp_path)
    write_run_manifest(tmp_path, IDENTITY)
    found = finished(tmp_path)
    assert found.identity == IDENTITY
    assert sorted(found.files) == ["report.html", "results.json", "results_val.json", "student.pth"]
    clear_run_manifest(tmp_path)
    clear_run_manifest(tmp_path)
    assert finished(tmp_path) is None


@pytest.mark.parametrize("name", ["student.pth", "results.json", "report.html", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_run_whose_files_are_not_what_it_wrote_is_not_done(tmp_path, name, damage):
    write_products(tmp_path)
    write_run_manifest(tmp_path, IDENTITY)
    path = tmp_path / name
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[:-1] if damage == "cut" else raw[:-1] + bytes([raw[-1] ^ 1]))
    assert finished(tmp_path) is None
    with pytest.raises(DamagedError):
        run_manifest(tmp_path)


def test_a_manifest_of_another_kind_is_no_run(tmp_path):
    write_run_manifest(tmp_path, IDENTITY)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "score bank"}))
    assert finished(tmp_path) is None


def test_settings_that_count():
    before = settings_digests(config())
    assert settings_digests(config(resume="auto", output_dir="x", job_id="y", num_workers=3, keep_last=9)) == before
    for key, changed in (("run", config(seed=1)), ("data sets", {**config(), "datasets": {}}),
                         ("model", {**config(), "model": {"arch": "y", 1: "one"}})):  # fmt: skip
        now = settings_digests(changed)
        assert [name for name in now if now[name] != before[name]] == [f"the settings of {key}"]
