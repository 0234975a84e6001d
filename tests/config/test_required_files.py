from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from omegaconf import OmegaConf
from servers import CONTENT, Server, running

from lavis_dcd.common.download import cached_path, record_of
from lavis_dcd.common.errors import UserError
from lavis_dcd.config.job_file import merge_defaults
from lavis_dcd.config.required_files import (
    RequiredFile,
    fetch_and_check,
    fetched_places,
    missing_faults,
    required_files,
)
from lavis_dcd.job import load_config

SHA = hashlib.sha256(CONTENT).hexdigest()
METER = {"arch": "meter_retrieval", "model_type": "student_coco", "text": {"name": "asset:quickstart/vocab.txt"}}
ALBEF = {"arch": "albef_retrieval", "model_type": "coco"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running(Server()) as found:
        yield found


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)


def files_of(model: dict[str, Any], datasets: dict[str, Any] | None = None) -> list[RequiredFile]:
    config = merge_defaults(OmegaConf.create({"model": model, "datasets": datasets or {}}))
    return required_files(config)


def one(files: list[RequiredFile], field: str) -> RequiredFile:
    (found,) = [file for file in files if file.field == field]
    return found


def line_of(file: RequiredFile) -> str:
    with pytest.raises(UserError) as caught:
        fetch_and_check([file])
    (line,) = caught.value.faults
    assert line.startswith(f"{file.field}: ") and line.isprintable()
    return line


ODD = [
    "http://", "https://h:port/x.pth", "https://h/..", "https://h/..%2f..%2fx", "http://[::1/x", "https://h/a b.pth",
    "https://h/x\0.pth", "https://h/" + "a" * 5000, "file:///etc/passwd", "ftp://u:pa55@h/x", "s3://bucket/x.pth",
]  # fmt: skip


@pytest.mark.parametrize("address", ODD)
@pytest.mark.parametrize("arch", ["meter", "albef"])
def test_an_odd_address_of_weights_is_one_line(address, arch):
    section = {**(METER if arch == "meter" else ALBEF), "load_finetuned": True, "finetuned": address}
    file = one(files_of(section), "model.finetuned")
    (line,) = missing_faults([file])
    assert line.startswith("model.finetuned: ") and line.isprintable() and "pa55" not in line and len(line) < 900


def test_a_job_with_odd_addresses_is_told_of_each(tmp_path):
    vision = {"backbone": "clip_vit", "weights": "ftp://user:pa55@h/x.pth"}
    job = {
        "model": {"arch": "dual_encoder", "model_type": "tiny", "vision": vision, "load_finetuned": True,
                  "finetuned": "https://user:pa55@h:port/x.pth"},
        "datasets": {"shape_scenes": {}},
        "run": {"task": "dcd_retrieval"},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with pytest.raises(UserError) as caught:
        load_config("job.yaml")
    lines = caught.value.faults
    assert [line.partition(": ")[0] for line in lines] == ["model.finetuned", "model.vision.weights"]
    assert not any("pa55" in line for line in lines)


@pytest.mark.parametrize("name", ["https://h/roberta", "a//b", "a" * 200, "x\0y", "~nobody-here/x", "ä b"])
def test_an_odd_name_of_a_tokenizer_is_one_line(name, offline):
    file = one(files_of({**METER, "text": {"name": name}}), "model.text.name")
    (line,) = missing_faults([file])
    assert line.startswith("model.text.name: ") and line.isprintable()


@pytest.mark.parametrize("place", ["https://h/x.json", "~nobody-here/x.json", "x\0y", "a" * 5000])
def test_odd_places_of_other_files_are_one_line(place):
    files = files_of({**ALBEF, "med_config_path": place, "tokenizer": place})
    lines = missing_faults([file for file in files if file.field != "model.finetuned"])
    assert "model.tokenizer" in {line.partition(":")[0] for line in lines}
    info = {"annotations": {"train": {"storage": place}}, "images": {"storage": place}}
    lines += missing_faults([f for f in files_of(METER, {"flickr30k": {"build_info": info}}) if not f.url])
    assert sum("build_info" in line for line in lines) == 1 and all(line.isprintable() for line in lines)


def test_an_odd_address_of_annotations_is_one_line():
    info = {"annotations": {"train": {"url": "https://h:port/x.json", "storage": "a/x.json"}}}
    file = one(
        files_of(METER, {"flickr30k": {"build_info": info}}), "datasets.flickr30k.build_info.annotations.train.url"
    )
    assert "names no server" in missing_faults([file])[0]


def test_passwords_are_in_no_message(offline):
    source = "https://user:pa55@models.invalid/x.pth?token=s3cret"
    file = one(files_of({**METER, "load_finetuned": True, "finetuned": source}), "model.finetuned")
    lines = [*missing_faults([file]), line_of(file)]
    assert all("https://***@models.invalid/x.pth?token=***" in line for line in lines)
    assert not any(secret in line for line in lines for secret in ("pa55", "s3cret", "user"))


def test_two_teachers_of_one_last_part(server):
    """Ours lie apart; LAVIS's models look for both in one place, so that the second is refused."""
    first, second = server.url("a/student.pth"), server.url("b/student.pth")
    ours = [
        one(files_of({**METER, "load_finetuned": True, "finetuned": url}), "model.finetuned") for url in (first, second)
    ]
    assert ours[0].target != ours[1].target
    fetch_and_check(ours)
    lavis = [one(files_of({**ALBEF, "finetuned": url}), "model.finetuned") for url in (first, second)]
    assert lavis[0].target == lavis[1].target
    fetch_and_check(lavis[:1])
    line = line_of(lavis[1])
    assert first in line and second in line


def test_a_cached_teacher_that_was_changed_is_refused(server):
    section = {**METER, "load_finetuned": True, "finetuned": server.url("x.pth")}
    file = one(files_of(section), "model.finetuned")
    fetch_and_check([file])
    file.target.write_bytes(CONTENT[::-1])
    assert "has changed since" in line_of(file)
    pinned = one(files_of({**section, "checkpoint_sha256": SHA}), "model.finetuned")
    assert "another file than expected" in line_of(pinned)


def test_a_checksum_of_a_local_file_counts_too(tmp_path):
    (tmp_path / "own.pth").write_bytes(CONTENT)
    section = {**METER, "load_finetuned": True, "finetuned": str(tmp_path / "own.pth")}
    fetch_and_check(files_of({**section, "checkpoint_sha256": SHA.upper()}))
    assert SHA in line_of(one(files_of({**section, "checkpoint_sha256": "0" * 64}), "model.finetuned"))
    file = one(files_of({**section, "checkpoint_sha256": "0" * 63}), "model.checkpoint_sha256")
    assert "64 digits" in missing_faults([file])[0]
    folder = one(files_of({**section, "finetuned": str(tmp_path), "checkpoint_sha256": SHA}), "model.finetuned")
    assert "no file" in line_of(folder)


def coco(**train: Any) -> RequiredFile:
    files = files_of(METER, {"coco_retrieval": {"build_info": {"annotations": {"train": train}}}})
    return one(files, "datasets.coco_retrieval.build_info.annotations.train.storage")


def test_published_annotations_must_have_lavis_md5(cache):
    file = coco()
    assert file.md5 == "aa31ac474cf6250ebb81d18348a07ed8"
    file.target.parent.mkdir(parents=True)
    file.target.write_text(json.dumps([]))
    line = line_of(file)
    assert "another file than expected: md5" in line and file.md5 in line
    # without the sum it is what somebody put there
    file = coco(md5=None)
    fetch_and_check([file])
    assert json.loads(record_of(file.target).read_text())["facts"]["by hand"] is True
    file.target.write_text(json.dumps([1]))
    assert "has changed since" in line_of(file)


def test_annotations_of_ones_own_are_what_they_are(tmp_path):
    """LAVIS's defaults still name the address and sum of the published file beside another storage."""
    own = tmp_path / "own.json"
    own.write_text("[]")
    file = coco(storage=str(own))
    assert (file.url, file.md5, file.target) == (None, None, own)
    fetch_and_check([file])
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".json") == ["own.json"]
    # copied by LAVIS from a local file
    file = coco(storage="mine/x.json", url=str(own))
    assert (file.url, file.md5) == (None, None)


def test_annotations_arrive_with_their_record(server, cache):
    body = b'[{"image": "a.jpg"}]'
    server.content = body
    file = coco(url=server.url("coco_karpathy_train.json"), md5=hashlib.md5(body).hexdigest())
    fetch_and_check([file])
    assert file.target == cache / "coco/annotations/coco_karpathy_train.json" and file.target.read_bytes() == body
    assert record_of(file.target).is_file()


def test_where_fetched_files_lie(tmp_path):
    url = "https://h/a/x.pth?token=t"
    assert fetched_places(url) == [cached_path(url), tmp_path / "torch/hub/checkpoints/x.pth"]
    assert fetched_places("https://h:port/x") == []


def test_a_file_named_as_torch_hubs_are_is_checked_by_its_name():
    section = {"arch": "dual_encoder", "model_type": "small", "vision": {"weights": "https://h/net-0aa007d2.pth"}}
    (file,) = (f for f in files_of(section) if f.field == "model.vision.weights")
    file.target.parent.mkdir(parents=True)
    file.target.write_bytes(CONTENT)
    assert "begin with 0aa007d2" in line_of(file)


def test_the_packaged_efficientnet_is_of_a_form_that_is_read():
    (file,) = (
        f for f in files_of({"arch": "dual_encoder", "model_type": "small"}) if f.field == "model.vision.weights"
    )
    assert file.target.suffix == ".safetensors"


def test_an_annotation_file_of_one_s_own_is_not_passed_over_for_one_in_the_cache(tmp_path, retrieval_files):
    # LAVIS copies the file to its storage once, and reads that copy whatever becomes of the file
    build = json.loads(json.dumps(retrieval_files))
    mine, kept = tmp_path / "test.json", tmp_path / "kept.json"
    kept.write_bytes(mine.read_bytes())
    build["annotations"]["test"] = {"url": str(mine), "storage": str(kept)}
    datasets = {"coco_retrieval": {"build_info": build}}
    assert missing_faults(files_of(METER, datasets)) == []
    mine.write_text("[]")
    (line,) = missing_faults(files_of(METER, datasets))
    assert line == (
        f"datasets.coco_retrieval.build_info.annotations.test.url: {mine} is a file here, and {kept} another one, "
        "which would be read; name yours as storage"
    )
