"""Job files and options with faults: one line each, with file or key and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

pytest.importorskip("lavis")

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.config.job_file import read_job
from lavis_dcd.job import check_job, load_config

BASE = {
    "model": {"arch": "meter_retrieval", "model_type": "student_coco", "text": {"name": "asset:quickstart/vocab.txt"}},
    "datasets": {"shape_scenes": {}},
}
NO_YAML = "job.yaml: not readable as YAML: "


@pytest.fixture
def faults(tmp_path, monkeypatch, cache):
    """What is wrong with a job file of this content (text, bytes or sections) and with options."""
    monkeypatch.chdir(tmp_path)

    def find(content: Any, *options: str) -> list[str]:
        raw = content if isinstance(content, str | bytes) else json.dumps(content)
        Path("job.yaml").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        with pytest.raises(UserError) as caught:
            load_config("job.yaml", options)
        assert all("\n" not in line for line in caught.value.faults)
        return caught.value.faults

    return find


# -- the file ----------------------------------------------------------------------------------------------------

MISSING = ["job.yaml: the section model: is missing or empty", "job.yaml: the section datasets: is missing or empty"]
FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", MISSING),
    "a comment": ("# nothing\n", MISSING),
    "a list": ("- model\n", ["job.yaml: expected sections model, datasets"]),
    "no data": ('{"model": {"arch": "x"}}', MISSING[1:]),
    "a section that is a list": (
        "model: [1]\ndatasets: {shape_scenes: {}}\n", ["job.yaml: model: [1] is not a section"],
    ),
    "Latin-1": ("model: {arch: café}\n".encode("latin-1"), [NO_YAML + "it is not UTF-8 text; save it as UTF-8"]),
    "UTF-16": ("model: {}\n".encode("utf-16"), [NO_YAML + "it is not UTF-8 text; save it as UTF-8"]),
    "an impossible tag": (
        "run: !!timestamp x\n", [NO_YAML + "'NoneType' object has no attribute 'groupdict'"],
    ),
    "a reference to nothing": (
        "model: {arch: '${run.x}'}\ndatasets: {a: {}}\n", ["model.arch: Interpolation key 'run.x' not found"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(faults, name):
    content, expected = FILES[name]
    assert faults(content) == expected


# the reader's own words follow
STARTS = {
    "cut short": ("model: {arch: [\n", "while parsing a flow node did not find expected node content"),
    "tabs": ("model:\n\tarch: x\n", "while scanning for the next token found character that cannot start any token"),
    "a key twice": ("model: {arch: a, arch: b}\n", "while constructing a mapping"),
    "code": ("model: !!python/object/apply:os.system [ls]\n", "could not determine a constructor for the tag"),
    "a zero byte": ("model: \0\n", "unacceptable character #x0000"),
    "a circle": ("model: &a {b: *a}\ndatasets: {}\n", "YAML recursive aliases are not supported"),
}


@pytest.mark.parametrize("name", STARTS)
def test_files_that_are_no_yaml(faults, name):
    content, start = STARTS[name]
    (line,) = faults(content)
    assert line.startswith(NO_YAML + start)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("\ufeff" + json.dumps(BASE), encoding="utf-8")
    assert load_config("job.yaml").model_cfg.arch == "meter_retrieval"


def test_a_folder_is_no_job(tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path))
    assert caught.value.faults == [f"--cfg-path {tmp_path}: is a folder; name a YAML file"]


# -- values ------------------------------------------------------------------------------------------------------

SCENES = "datasets.shape_scenes"
OPTIONS = {
    "rnu.seed=1": "rnu: unknown key; did you mean run? legal keys: datasets, model, preprocess, run",
    "run.seed=-1": "run.seed: -1 must not be negative",
    "run.seed=x": "run.seed: 'x' (text) is not an integer",
    "run.seed=1.5": "run.seed: 1.5 (a number) is not an integer",
    "run.seed=null": "run.seed: None (null) is not an integer",
    "run.init_lr=0": "run.init_lr: 0.0 must be greater than 0",
    "run.init_lr=fast": "run.init_lr: 'fast' (text) is not a number",
    "run.init_lr=.inf": "run.init_lr: inf is not a finite number",
    "run.init_lr=.nan": "run.init_lr: nan is not a finite number",
    "run.weight_decay=.nan": "run.weight_decay: nan is not a finite number",
    "run.min_lr=1": "run.min_lr: 1.0 is greater than run.init_lr 0.0001",
    "run.max_epoch=true": "run.max_epoch: True (true or false) is not an integer",
    "run.max_epoch=[1]": "run.max_epoch: [1] (a list) is not an integer",
    "run.batch_size_train=0": "run.batch_size_train: 0 must be greater than 0",
    "run.eval_memory_mb=0": "run.eval_memory_mb: 0.0 must be greater than 0",
    "run.num_workers=-1": "run.num_workers: -1 must not be negative",
    "run.warmup=2": "run.warmup: 2.0 is a fraction of all steps, 0 to 1 (see run.warmup_steps)",
    "run.betas=[0.9]": "run.betas: [0.9] must be two numbers in [0, 1)",
    "run.betas=[0.9,1.0]": "run.betas: [0.9, 1.0] must be two numbers in [0, 1)",
    "run.amp=bf61": "run.amp: 'bf61' is not one of off, bf16, fp16; did you mean bf16?",
    "run.device=gpu": "run.device: 'gpu' is not one of auto, cpu, cuda; did you mean cpu?",
    "run.train_splits=train": "run.train_splits: 'train' (text) is not a list of (text)",
    "run.train_splits=[]": "run.train_splits: is empty, so there is nothing to train on; run.evaluate=true evaluates",
    "run.job_id=../x": "run.job_id: '../x' cannot be a folder's name: it has a / or \\ (outputs go below "
    "run.output_dir, which may have them); give a name of letters, digits, - and _",
    "run.verify=true": "run.verify: True is not one of fast, full, off",
    "run.report=maybe": "run.report: 'maybe' (text) is not true or false",
    "run.resume=gone": "run.resume: gone does not exist; give a checkpoint, a run folder, or auto",
    "run=3": "job.yaml: run: 3 is not a section",
    "model=meter": "job.yaml: model: 'meter' is not a section",
    "model.arch=[1]": "model.arch: [1] is no name",
    "model.text=[1]": "model.text: a list, expected a section",
    "model.fusion.layers=two": "model.fusion.layers: 'two' (text) is not an integer",
    "model.fusion.layers=???": "model.fusion.layers: ??? stands for a value; give one",
    f"{SCENES}=3": f"{SCENES}: 3 is not a section",
    f"{SCENES}.type=big": f"{SCENES}.type: 'big' is not registered; registered: default",
    f"{SCENES}.type=[big]": f"{SCENES}.type: ['big'] is not registered; registered: default",
    f"{SCENES}.build_info=[1]": f"{SCENES}.build_info: a list, expected a section",
    f"{SCENES}.build_info.sede=1": f"{SCENES}.build_info.sede: unknown key; did you mean seed or scenes? legal keys: "
                                   "image_size, scenes, seed",
    f"{SCENES}.vis_processor.train.image_size=0": f"{SCENES}.vis_processor.train: image_size: 0 is not positive",
    f"{SCENES}.vis_processor.train.std=[1,1]": f"{SCENES}.vis_processor.train.std: [1, 1] has 2 items, expected 3",
    f"{SCENES}.vis_processor.train.std=[0,0,0]":
        f"{SCENES}.vis_processor.train: std: [0.0, 0.0, 0.0] must be positive",
    f"{SCENES}.vis_processor.test.name=x": f"{SCENES}.vis_processor.test: unknown key; legal keys: eval, train",
    "run.seed": "--options run.seed: expected key=value, as in run.max_epoch=3",
    "run..seed=1": "--options run..seed=1: expected key=value, as in run.max_epoch=3",
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options(faults, option):
    assert faults(BASE, option) == [OPTIONS[option]]


def test_a_long_value_is_shortened(faults):
    (line,) = faults(BASE, f"run.seed={'x' * 5000}")
    assert line == f"run.seed: '{'x' * 39} ... {'x' * 39}' (text) is not an integer"


def test_all_faults_come_at_once(faults):
    assert faults(BASE, "run.seed=x", "run.amp=bf61", f"{SCENES}.build_info.seed=y") == [
        "run.amp: 'bf61' is not one of off, bf16, fp16; did you mean bf16?",
        "run.seed: 'x' (text) is not an integer",
        f"{SCENES}.build_info.seed: 'y' (text) is not an integer",
    ]


# -- one's own data ----------------------------------------------------------------------------------------------

EITHER = (
    "give either annotations: {train: FILE.json, val: FILE.json, test: FILE.json} (those there are) or csv: FILE.csv"
)
INFO: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, f": {EITHER}"),
    "both": ({"csv": "c.csv", "annotations": {"train": "t.json"}}, f": {EITHER}, not both"),
    "fractions above 1": (
        {"csv": "c.csv", "val_fraction": 0.6, "test_fraction": 0.5},
        ": val_fraction=0.6, test_fraction=0.5: neither may be negative, and their sum must be below 1",
    ),
    "a fraction that is NaN": (
        {"csv": "c.csv", "val_fraction": float("nan")}, ".val_fraction: nan is not a finite number",
    ),
    "a negative seed": ({"csv": "c.csv", "seed": -1}, ": seed: -1 is negative"),
    "one column for two": (
        {"csv": "c.csv", "image_column": "caption"},
        ": image_column, caption_column, split_column: caption, caption, split are not all different",
    ),
    "an unknown split": (
        {"annotations": {"trian": "t.json"}},
        ".annotations key: 'trian' is not one of train, val, test; did you mean train?",
    ),
    "no such file": ({"csv": "no.csv"}, ".csv: no.csv is neither in {here} nor in {here}"),
    "a name too long": ({"csv": "n" * 300}, f".csv: {'n' * 300} is neither in {{here}} nor in {{here}}"),
    "a folder": ({"csv": "."}, ".csv: . is neither in {here} nor in {here}"),
    "no such root": ({"root": "x", "csv": "{here}/c.csv"}, ".root: {here}/x is not a folder"),
    "nobody's home": ({"root": "~no-body/x", "csv": "{here}/c.csv"}, ".root: {here}/~no-body/x is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", INFO)
def test_own_data(faults, tmp_path, name):
    info, message = INFO[name]
    (tmp_path / "c.csv").touch()
    info = {k: v.replace("{here}", str(tmp_path)) if isinstance(v, str) else v for k, v in info.items()}
    found = faults(BASE | {"datasets": {"image_text_retrieval": {"build_info": info}}})
    assert found == [f"datasets.image_text_retrieval.build_info{message.replace('{here}', str(tmp_path))}"]


# -- anything ----------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["dcd", "auto", "???", "${run.x}", "${", "nan", "~no-body/x", "a" * 300, "x\0y", "/"])
)  # fmt: skip
KEYS = st.text(max_size=5) | st.sampled_from(["arch", "model_type", "type", "eval", "train", "name"])
VALUES = st.recursive(
    SCALARS, lambda some: st.lists(some, max_size=3) | st.dictionaries(KEYS, some, max_size=3), max_leaves=6
)
JOBS = [OmegaConf.to_container(OmegaConf.load(file)) for file in sorted(packaged_folder("projects").glob("*/*.yaml"))]
SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def _only_faults(folder: Path, content: Any, evaluate: bool) -> None:
    (folder / "job.yaml").write_text(json.dumps(content))
    try:
        check_job(*read_job(str(folder / "job.yaml"), ("run.seed=1",), evaluate))
    except UserError as error:
        assert error.faults and all("\n" not in line for line in error.faults)


@pytest.mark.slow
@SOME
@given(st.data(), st.sampled_from(JOBS), st.booleans())
def test_packaged_jobs_with_other_values(tmp_path, offline, cache, with_another_value, data, content, evaluate):
    for _ in range(data.draw(st.integers(1, 3))):
        content = with_another_value(content, data, VALUES)
    _only_faults(tmp_path, content, evaluate)


@SOME
@given(VALUES | st.fixed_dictionaries({"model": VALUES, "datasets": VALUES, "run": VALUES}))
def test_arbitrary_sections(tmp_path, offline, cache, content):
    _only_faults(tmp_path, content, evaluate=False)


@SOME
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_arbitrary_files(tmp_path, raw):
    (tmp_path / "job.yaml").write_bytes(raw)
    try:
        read_job(str(tmp_path / "job.yaml"))
    except UserError as error:
        assert error.faults and all("\n" not in line for line in error.faults)
