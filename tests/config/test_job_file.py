from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lavis_dcd.common import secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.config import job_file as config_module
from lavis_dcd.config.checks import check_sections, inner_models, model_faults, processors_faults
from lavis_dcd.config.job_file import find_config, merge_defaults, parse_options, read_yaml
from lavis_dcd.config.required_files import required_files
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.job import load_config, run_job
from lavis_dcd.matching.adapters import registry as adapter_registry
from lavis_dcd.matching.adapters.base import Adapter, AdapterOptions
from lavis_dcd.models.dcd.config import DcdConfig

SCENES = {
    "model": {
        "arch": "meter_retrieval",
        "model_type": "student_coco",
        "text": {"name": "asset:quickstart/vocab.txt"},
    },
    "datasets": {"shape_scenes": {"build_info": {"scenes": {"train": 30, "val": 6, "test": 6}}}},
    "run": {"task": "dcd_retrieval", "max_epoch": 2},
}


@pytest.fixture
def job(tmp_path, monkeypatch, cache):
    """Writes a job into the current folder, an otherwise empty one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def write(content) -> str:
        OmegaConf.save(OmegaConf.create(content), folder / "job.yaml")
        return "job.yaml"

    return write


def faults_of(path, options=(), **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, options, **kwargs)
    assert all("\n" not in line for line in caught.value.faults)
    return caught.value.faults


def one(faults: list[str], start: str) -> str:
    found = [line for line in faults if line.startswith(start)]
    assert len(found) == 1, faults
    return found[0]


def test_options_go_over_the_file_and_defaults_under_it(job):
    config = load_config(job(SCENES), ["run.max_epoch=5", "run.init_lr=1e-5", "model.fusion.layers=2"])
    assert (config.run_cfg.max_epoch, config.run_cfg.init_lr) == (5, 1e-5)
    assert (config.model_cfg.fusion.layers, config.model_cfg.fusion.heads) == (
        2,
        12,
    )  # heads: the type's YAML
    assert config.datasets_cfg.shape_scenes.vis_processor.train.name == "dcd_image_train"  # the builder's YAML
    assert config.datasets_cfg.shape_scenes.build_info.scenes.train == 30
    assert (config.run_cfg.runner, config.run_cfg.project) == ("runner_dcd", "job")
    assert set(config.to_dict()) >= {"run", "model", "datasets"}
    config.pretty_print()

    from lavis.common.registry import registry

    assert registry.get("configuration") is config


def test_evaluate_and_lavis_style_pairs(job):
    config = load_config(job(SCENES), ["run.max_epoch", "3", "run.seed=7"], evaluate=True)
    assert (config.run_cfg.max_epoch, config.run_cfg.seed, config.run_cfg.evaluate) == (3, 7, True)


def test_model_type_may_come_from_the_options(job):
    config = load_config(job(SCENES), ["model.model_type=student_flickr"])
    assert config.model_cfg.model_type == "student_flickr"


def test_options_that_are_no_settings():
    got = parse_options(["a.b=[0,3,5]", "a.c=null", "d", "x", "e=k=v"])
    assert OmegaConf.to_container(got) == {"a": {"b": [0, 3, 5], "c": None}, "d": "x", "e": "k=v"}
    with pytest.raises(UserError) as caught:
        parse_options(["a..b=1", "=3", "lonely"])
    assert len(caught.value.faults) == 3
    assert all("expected key=value" in line for line in caught.value.faults)


def test_every_fault_is_told_at_once(job):
    content = {
        "model": {
            "arch": "meter_retrieval",
            "model_type": "student_coco",
            "fusoin": {},
            "fusion": {"layers": "two"},
        },
        "datasets": {
            "shape_scenes": {
                "vis_procesor": {},
                "vis_processor": {
                    "train": {"name": "dcd_image_trian"},
                    "evla": {},
                    "eval": {"image_siez": 1},
                },
                "build_info": {"seeed": 1},
            },
            "flickr30": {},
        },
        "run": {"task": "dcd_retrival", "amp": "bf61", "resume": "gone", "max_epoch": -1},
    }
    found = faults_of(job(content), ["run.max_epochs=3"])
    assert "did you mean dcd_retrieval" in one(found, "run.task: 'dcd_retrival' is not registered")
    assert "did you mean max_epoch" in one(found, "run.max_epochs: unknown key")
    assert "bf16" in one(found, "run.amp")
    assert "did you mean fusion" in one(found, "model.fusoin")
    assert "not an integer" in one(found, "model.fusion.layers")
    assert "did you mean flickr30k" in one(found, "datasets.flickr30:")
    assert "did you mean vis_processor" in one(found, "datasets.shape_scenes.vis_procesor")
    assert "dcd_image_train" in one(found, "datasets.shape_scenes.vis_processor.train.name")
    assert "legal keys: eval, train" in one(found, "datasets.shape_scenes.vis_processor.evla")
    assert "image_size" in one(found, "datasets.shape_scenes.vis_processor.eval.image_siez")
    assert "seed" in one(found, "datasets.shape_scenes.build_info.seeed")
    assert "does not exist" in one(found, "run.resume")
    assert list(Path().iterdir()) == [Path("job.yaml")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"model": {"arch": "meter_retrival"}},
            "model.arch: 'meter_retrival' is not registered; did you mean meter_",
        ),
        ({"model": {"arch": None}}, "model.arch: None is not registered; registered: albef_classification"),
        (
            {"model": {"model_type": "cocoa"}},
            "model.model_type: 'cocoa' is not registered; did you mean coco",
        ),
        (
            {"run": {"runner": "runner_dc"}},
            "run.runner: 'runner_dc' is not registered; did you mean runner_dcd",
        ),
        (
            {"datasets": {"shape_scenes": {"type": "big"}}},
            "datasets.shape_scenes.type: 'big' is not registered",
        ),
        ({"runs": {"a": 1}}, "runs: unknown key; did you mean run?"),
        ({"run": None}, "job.yaml: run: None is not a section"),
        (
            {"run": {"output_dir": "${oc.env:NO_SUCH_VARIABLE}"}},
            "run.output_dir: \"Environment variable 'NO_SUCH_VARIABLE' not found",
        ),
    ],
)
def test_single_faults(job, change, expected):
    assert one(faults_of(job(OmegaConf.merge(SCENES, change))), expected)


def test_teacher_and_student_are_checked_by_their_own_arch(job):
    model = {
        "arch": "dcd", "model_type": "default", "shar_encoders": True,
        "teacher": {"arch": "meter_retrieval", "model_type": "student_coco", "fusion": {"layer": 3}},
        "student": {"init_from_teacher": {"layer": [0]}, "text": {"nam": "x"}},
    }  # fmt: skip
    found = faults_of(job({**SCENES, "model": model}))
    assert "did you mean share_encoders" in one(found, "model.shar_encoders")
    assert "did you mean layers" in one(found, "model.teacher.fusion.layer:")
    assert "did you mean layers" in one(found, "model.student.init_from_teacher.layer:")
    assert "did you mean name" in one(found, "model.student.text.nam:")
    model["teacher"] = {"arch": "metre"}
    assert one(faults_of(job({**SCENES, "model": model})), "model.teacher.arch: 'metre' is not registered")


def test_lavis_own_models_and_data_sets_are_compared_with_their_defaults(job, offline, caplog):
    content = {
        "model": {"arch": "albef_retrieval", "model_type": "coco", "alpa": 0.4, "use_distill": 3, "queue_size": 8},
        "datasets": {
            "coco_retrieval": {
                "vis_processor": {"train": {"name": "blip_image_train", "image_size": 384, "blur": 1}},
                "build_info": {"imags": {"storage": "x"}, "annotations": {"val": {"md5": "0" * 32}}},
            }
        },
        "run": {"task": "retrieval"},
    }
    found = faults_of(job(content))
    assert "not of the default's kind" in one(found, "model.use_distill")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "did you mean alpha" in one(said, "model.alpa: no default has this key")
    assert "min_scale" in one(said, "datasets.coco_retrieval.vis_processor.train.blur: no default")
    assert "did you mean images" in one(said, "datasets.coco_retrieval.build_info.imags: no default")
    assert len(said) == 3 and not any("no default" in line or "unknown key" in line for line in found)


def test_offline_every_missing_file_is_named_with_its_source(job, cache, offline):
    content = {
        "model": {
            "arch": "dcd",
            "teacher": {"arch": "meter_retrieval", "model_type": "coco"},
            "student": {"init_from_teacher": {"layers": [0, 3, 5]}},
        },
        "datasets": {"coco_retrieval": {"vis_processor": {"train": {"name": "blip_image_train"}}}},
    }
    found = faults_of(job(content))
    weights = one(found, "model.teacher.finetuned")
    assert re.search(rf"{cache / 'checkpoints'}/[0-9a-f]{{16}}/meter_clip16_288_roberta_coco\.ckpt", weights)
    assert "https://github.com/zdou0830/METER/releases/" in weights and "cannot be reached" in weights
    for split in ("train", "val", "test"):
        line = one(found, f"datasets.coco_retrieval.build_info.annotations.{split}.storage")
        assert str(cache / f"coco/annotations/coco_karpathy_{split}.json") in line
        assert f"datasets/coco_karpathy_{split}.json" in line
    assert "by hand" in one(found, f"datasets.coco_retrieval.build_info.images.storage: {cache / 'coco/images'} does")
    assert not cache.exists()


# all jobs but one of each kind are left to the slow tests
QUICK = ("quickstart", "meter_coco", "blip_coco_to_dual_encoder")
PACKAGED = [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in sorted((packaged_folder("projects") / "dcd").rglob("*.yaml"))
]


@pytest.mark.parametrize("path", PACKAGED)
def test_every_packaged_job_is_sound(path, monkeypatch, cache):
    from lavis_dcd.config.checks import check_sections
    from lavis_dcd.variants import expand, split_off

    for name in re.findall(r"\$\{oc\.env:(\w+)", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, str(cache))
    own, comparison = split_off(read_yaml(path))
    runs = expand(comparison, own.run, cache) if comparison else []
    for settings in [variant.settings for variant in runs] or [{}]:
        found = check_sections(merge_defaults(OmegaConf.merge(own, settings))).faults
        # data and weights that a user brings are not there
        assert [fault for fault in found if str(cache) not in fault] == []


def test_the_paper_recipe_offline_says_what_it_lacks(tmp_path, monkeypatch, cache, offline):
    monkeypatch.chdir(tmp_path)
    found = faults_of("projects/dcd/meter_coco.yaml", ["model.teacher.text.name=asset:quickstart/vocab.txt"])
    assert [line.partition(":")[0] for line in found] == [
        "model.teacher.finetuned",
        "datasets.coco_retrieval.build_info.annotations.train.storage",
        "datasets.coco_retrieval.build_info.annotations.val.storage",
        "datasets.coco_retrieval.build_info.annotations.test.storage",
        "datasets.coco_retrieval.build_info.images.storage",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_on_the_hub_is_a_file_too(job, offline):
    line = faults_of(job(SCENES), ["model.text.name=roberta-no-such"])
    assert "roberta-no-such is not in the hub's cache" in one(line, "model.text.name")
    line = faults_of(job(SCENES), ["model.text.name=/no/such/folder"])
    assert one(line, "model.text.name: /no/such/folder does not exist; name a local folder")


def test_files_that_are_there_are_not_missed(job, cache, offline, tmp_path):
    (tmp_path / "ann.json").write_text("[]")
    (cache / "coco" / "images").mkdir(parents=True)
    ann = {split: {"storage": str(tmp_path / "ann.json")} for split in ("train", "val", "test")}
    content = {**SCENES, "datasets": {"coco_retrieval": {"build_info": {"annotations": ann}}}}
    assert load_config(job(content)).datasets_cfg.coco_retrieval.data_type == "images"
    content["model"] = {**SCENES["model"], "pretrained": "no.ckpt"}
    assert faults_of(job(content)) == ["model.pretrained: no.ckpt does not exist; name a checkpoint file that does"]


def test_the_current_folder_comes_before_the_packaged_jobs(tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    (packaged / "dcd").mkdir(parents=True)
    (packaged / "dcd" / "a.yaml").write_text("run: {}\n")
    monkeypatch.setattr(config_module, "packaged_folder", lambda name: packaged)
    monkeypatch.chdir(tmp_path)
    assert find_config("projects/dcd/a.yaml") == packaged / "dcd" / "a.yaml"
    assert find_config("dcd/a.yaml") == packaged / "dcd" / "a.yaml"
    own = tmp_path / "projects" / "dcd"
    own.mkdir(parents=True)
    (own / "a.yaml").write_text("run: {}\n")
    assert find_config("projects/dcd/a.yaml") == Path("projects/dcd/a.yaml")
    with pytest.raises(UserError, match=r"no such file in .*none of the packaged: projects/dcd/a.yaml"):
        find_config("projects/dcd/b.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1", "just text", "\t: x", ""])
def test_files_that_are_no_jobs(tmp_path, text, job):
    Path("bad.yaml").write_text(text)
    assert "bad.yaml" in faults_of("bad.yaml")[-1]


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable as YAML"):
        read_yaml(path)


# -- teachers, students and LAVIS's own models ---------------------------------------------------------------------

ALBEF = {"arch": "albef_retrieval", "model_type": "coco"}
METER = {"arch": "meter_retrieval", "model_type": "quickstart"}
THINNED = {"init_from_teacher": {"layers": [0, 3, 5]}}


@dataclass
class Options(AdapterOptions):
    """What the stub adapter below takes."""

    depth: int = 3


@pytest.fixture
def adapted(monkeypatch):
    """`albef_retrieval`, `blip2` and `clip` have a stub adapter."""

    class Stub(Adapter):
        options_class = Options

    for name in ("albef_retrieval", "blip2", "clip"):
        monkeypatch.setitem(adapter_registry._ADAPTERS, name, Stub)


def of_model(model) -> list[str]:
    return model_faults(OmegaConf.create(model), "model")


def distilled(teacher=METER, student=THINNED, **more):
    return {"arch": "dcd", "model_type": "default", "teacher": teacher, "student": student, **more}


def test_a_sound_distillation_has_no_faults():
    assert of_model(distilled()) == []
    assert of_model(distilled(teacher={}, teachers=[METER, {**METER, "weight": 0.5}])) == []


def test_either_one_teacher_or_several():
    line = "model.teachers: give either teacher: or teachers:"
    assert of_model(distilled(teachers=[METER])) == [line]
    assert of_model({"arch": "dcd", "model_type": "default", "student": METER}) == [line]
    assert of_model(distilled(teacher={}, teachers=[])) == [line]


def test_each_of_several_teachers_is_checked_at_its_place():
    second = {**METER, "weight": -1.0, "fusoin": 3}
    found = of_model(distilled(teacher={}, teachers=[{**METER, "weight": "much"}, second]))
    assert one(found, "model.teachers.0.weight") == "model.teachers.0.weight: 'much' (text) is not a number"
    assert "did you mean fusion" in one(found, "model.teachers.1.fusoin: unknown key")
    assert one(found, "model.teachers.1: ") == "model.teachers.1: weight: -1.0 is negative"
    assert len(found) == 3
    assert one(of_model(distilled(teacher={**METER, "weight": 1.0})), "model.teacher.weight: unknown key")


def test_the_models_inside_a_distiller():
    section = distilled(teacher={}, teachers=[{**METER, "weight": 0.5, "preprocess": {}}, ALBEF])
    found = inner_models(OmegaConf.create(section))
    assert list(found) == ["teachers.0", "teachers.1", "student"]
    assert "weight" not in found["teachers.0"] and "preprocess" not in found["teachers.0"]
    assert found["teachers.0"].fusion.layers == 6 and found["teachers.1"].embed_dim == 256
    assert found["student"] == {"arch": "meter_retrieval"}


NO_START = "model.student.init_from_teacher: give layers: [...] (of the teacher's fusion) or towers: true"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({"layers": [0, 3]}, []),
        ({"towers": True}, []),
        ({}, [NO_START]),
        ({"layers": [], "towers": False}, [NO_START]),
        ({"layers": 3}, ["model.student.init_from_teacher.layers: 3 (an integer) is not a list of (an integer)"]),
        ({"towers": "vision"}, ["model.student.init_from_teacher.towers: 'vision' (text) is not true or false"]),
    ],
)
def test_how_a_student_starts_from_its_teacher(start, expected):
    assert of_model(distilled(student={"init_from_teacher": start})) == expected


@pytest.mark.parametrize("key", ["finetuned", "pretrained"])
@pytest.mark.parametrize("start", [{"layers": [0, 3]}, {"towers": True}])
def test_a_student_that_starts_from_its_teacher_names_no_weights_of_its_own(key, start):
    student = {"init_from_teacher": start, key: "student.pth"}
    assert of_model(distilled(student=student)) == [
        f"model.student.{key}: 'student.pth' has no effect beside init_from_teacher, which starts the student from the "
        "teacher's weights; take one of the two out"
    ]
    assert of_model(distilled(student={"init_from_teacher": start, key: None})) == []
    if key == "finetuned":
        assert of_model(distilled(student={**student, "load_finetuned": False})) == []


def test_a_student_without_towers_cannot_take_them_over():
    student = {"arch": "meter_retrieval", "model_type": "student_coco", "init_from_teacher": {"towers": True}}
    assert of_model(distilled(student=student)) == [
        "model.student.init_from_teacher.towers: meter_retrieval has no towers to start; use it with a dual_encoder"
    ]
    assert of_model(distilled(student={**student, "arch": "dual_encoder", "model_type": "tiny"})) == []


QUICKSTART = "projects/dcd/quickstart.yaml"
BANK = "model.candidates.source=bank"
# options over the quickstart, and what is told of each; no data set and no model has been made by then
ANY = "run.batch_by=null"  # the quickstart has one
METHOD_FAULTS = [
    (["model.loss.alpha=2"], "model.loss.alpha: must lie in [0, 1], got 2.0"),
    (["model.loss.alpha=-0.1"], "model.loss.alpha: must lie in [0, 1], got -0.1"),
    (["model.loss.temperature=0"], "model.loss.temperature: must be above 0, got 0.0"),
    (["model.loss.distill=mse", "model.loss.temperature=2"], "model.loss.temperature: does nothing in distill 'mse'"),
    (["model.loss.temperature=2"], "model.loss.temperature: does nothing in distill 'mse'"),  # what auto stands for
    (["model.loss.gamma=-1"], "model.loss.gamma: must be at least 0, got -1.0"),
    (["model.loss.entropy_floor=-1"], "model.loss.entropy_floor: must be at least 0, got -1.0"),
    (["model.loss.student_weight=-1"], "model.loss.student_weight: must be at least 0, got -1.0"),
    (["model.loss.in_batch_weight=-1"], "model.loss.in_batch_weight: must be at least 0, got -1.0"),
    (["model.loss.distill=mze"], "model.loss.distill: unknown name 'mze'; registered: kl, margin_mse, mse"),
    (["model.loss.contrastive=bze"], "model.loss.contrastive: unknown name 'bze'; registered: bce"),
    (["model.loss.weighting=share"], "model.loss.weighting: unknown name 'share'; registered: confidence_gap"),
    (["model.loss.reference=papr"], "model.loss.reference: unknown name 'papr'; registered: paper, release"),
    (["model.loss.reference=release", "model.loss.distill=kl"], "model.loss.distill: reference 'release' has mse only"),
    (["model.loss.reference=release", "model.selection.hard_negatives=null"], "model.loss.reference: release knows no"),
    (["model.loss.teacher_temperature=0"], "model.loss.teacher_temperature: must be above 0, got 0.0"),
    (["model.selection.strategy=hard"], "model.selection.strategy: 'hard' is none of hardest, mixed, random"),
    (["model.selection.strategy=mixed", "model.selection.hard_share=2"], "model.selection.hard_share must lie in"),
    (["model.selection.reweight=true", "model.loss.contrastive=bce"], "model.selection.reweight: has no effect with"),
    (
        ["model.selection.reweight=true", "model.loss.distill=kl", "model.selection.hard_negatives=null"],
        "model.selection.reweight: has no effect with hard_negatives: null",
    ),
    (["model.selection.hard_share=0.2"], "model.selection.hard_share: does nothing with strategy 'hardest'"),
    (["model.selection.hard_negatives=0"], "model.selection.hard_negatives: 0, at least 1 is needed"),
    (["model.selection.prescreen.keep=3"], "model.selection.prescreen.keep: 3, but selection.hard_negatives is"),
    (["model.candidates.source=radnom"], "model.candidates.image_to_text.source: "),
    (["model.candidates.image_to_text.source=radnom"], "model.candidates.image_to_text.source: "),
    (["model.candidates.text_to_image.source=radnom"], "model.candidates.text_to_image.source: "),
    (["model.candidates.image_to_text.source=random"], "model.candidates.image_to_text.count: None; the source random"),
    (["model.candidates.image_to_text=null", "model.candidates.text_to_image=null"], "model.candidates: both"),
    (["model.candidates.teacher_budget=1"], "model.candidates.teacher_budget: 1, at least 2 pairs per query"),
    (["model.candidates.bank.by=luck"], "model.candidates.bank.by: 'luck' is none of joint, student, none"),
    (["model.candidates.bank.keep=0"], "model.candidates.bank.keep: 0, at least 1 is needed"),
    ([BANK, "model.candidates.teacher_budget=4"], "model.candidates.teacher_budget: no teacher runs with source: bank"),
    (["model.student_chunk_pairs=0"], "model.student_chunk_pairs: 0, at least 1 is needed"),
    (["run.k_test=8", "run.shortlist=techer"], "run.shortlist: 'techer' is none of this job's matchers: joint, te"),
    ([BANK, "run.k_test=8", "run.shortlist=teacher"], "run.shortlist: 'teacher' is none of this job's matchers: joint"),
    ([ANY, BANK, "run.batches.by=teacher"], "run.batches.by: teacher, but with model.candidates.source: bank no teach"),
    ([ANY, "run.batches.size=999"], "run.batches.size: 999 pictures are no neighbourhood within a batch of "),
    ([ANY, "run.batches.share=0"], "run.batches.share: 0.0 is no share of a batch; it is above 0 and at most 1"),
    ([ANY, "run.batches.by=family", "run.batches.size=6"], "run.batches.size: has no effect with by: family, a key"),
    (["run.batches.by=teacher"], "run.batch_by: 'family' stands beside run.batches"),
    (["run.amp=fp16", "run.device=cpu"], "run.amp: fp16 needs CUDA; on a CPU set run.amp=bf16 or off"),
    (["model.student.init_from_teacher.layers=[0,-1]"], "model.student.init_from_teacher: layers: [0, -1] must not be"),
]  # fmt: skip


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Whoever makes a data set or a model fails the test."""
    from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask

    def fail(self, cfg):
        raise AssertionError("a data set or a model was made before the configuration was checked")

    monkeypatch.setattr(DcdRetrievalTask, "build_datasets", fail)
    monkeypatch.setattr(DcdRetrievalTask, "build_model", fail)


@pytest.mark.parametrize(("options", "start"), METHOD_FAULTS)
def test_a_fault_of_the_method_is_told_before_anything_is_built(job, nothing_is_built, capsys, options, start):
    from lavis_dcd import train

    assert train.main(["--cfg-path", QUICKSTART, "--options", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(line.startswith(f"error: {start}") for line in lines), lines


def test_a_model_without_a_teacher_has_no_neighbours_and_an_evaluation_no_batches(job):
    options = ["run.batches.by=teacher", "run.batches.size=8"]
    line = one(faults_of(job(SCENES), options), "run.batches.by: ")
    assert line.startswith("run.batches.by: teacher, but meter_retrieval has no teacher; train it as a student")
    assert load_config(job(SCENES), [*options, "run.evaluate=true"]).run.neighbourhoods is None
    assert load_config(job(SCENES), ["run.batches.by=family"]).run.batch_key == "family"


def test_a_neighbourhood_may_be_as_large_as_the_batch_of_all_processes(job, monkeypatch):
    options = ["run.batch_by=null", "run.batch_size_train=8", "run.batches.size=16"]
    assert one(faults_of(QUICKSTART, options), "run.batches.size: 16 pictures are no neighbourhood within a batch of 8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_config(QUICKSTART, options).run.batches.size == 16


def test_a_fault_of_the_third_variant_is_told_before_the_first_is_trained(job, nothing_is_built, capsys):
    from lavis_dcd import train

    content = OmegaConf.load(packaged_folder("projects") / "dcd" / "quickstart_ablation.yaml")
    third = list(content.variants)[2]
    content.variants[third].model.loss.alpha = 2
    assert train.main(["--cfg-path", job(content)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: variants.{third}: model.loss.alpha: must lie in [0, 1], got 2.0"]


def test_a_device_that_is_not_there_is_told_with_all_other_faults(job, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert faults_of(job(SCENES), ["run.device=cuda", "model.fusion.layers=two"]) == [
        "model.fusion.layers: 'two' (text) is not an integer",
        "run.device: cuda is not available here; set run.device=auto or cpu",
    ]


def test_a_job_hands_on_its_parsed_sections(job):
    config = load_config(QUICKSTART, ["run.seed=7"])
    assert isinstance(config.run, RunConfig) and config.run.seed == 7
    assert isinstance(config.model, DcdConfig) and config.model.selection.hard_negatives is not None
    content = {**SCENES, "model": {**ALBEF, "tokenizer": "folder"}}
    config = merge_defaults(OmegaConf.create(content))
    assert check_sections(config).model is None  # LAVIS's own have no schema


def test_teachers_that_all_weigh_nothing():
    teachers = [{**METER, "weight": 0}, {**METER, "weight": 0.0}]
    expected = "model.teachers: all weights are 0; give at least one teacher a weight above 0"
    assert of_model(distilled(teacher={}, teachers=teachers)) == [expected]


def test_the_keys_of_the_caption_processor_are_known():
    texts = {"text_processor": {"eval": {"name": "dcd_caption", "max_words": 30, "max_wrods": 3}}}
    (line,) = processors_faults(OmegaConf.create(texts), "x")
    assert line.startswith("x.text_processor.eval.max_wrods: unknown key; did you mean max_words")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"fusion": {"width": 70, "heads": 12}}, "model.fusion: width: 70 is no multiple of heads 12"),
        ({"vision": {"patch_size": 20}}, "model.vision: image_size: 384 is no multiple of patch_size 20"),
        ({"checkpoint_part": "both"}, "model.checkpoint_part: 'both' is not one of auto, teacher, student"),
        ({"fusion_score": False}, "model: fusion_score: false, and there is no joint_head: nothing would score a pair"),
    ],
)
def test_rules_across_keys_of_meter(model, expected):
    assert of_model({"arch": "meter_retrieval", "model_type": "student_coco", **model}) == [expected]


@pytest.mark.parametrize("more", [{"load_finetuned": False}, {"finetuned": None}, {"finetuned": ""}])
def test_a_teacher_without_weights_is_refused(more):
    expected = (
        "model.teacher: names no weights (finetuned or pretrained): a teacher with random weights teaches noise; "
        "name a checkpoint (model.teacher.finetuned=FILE, with load_finetuned: true)"
    )
    assert of_model(distilled(teacher={**METER, **more})) == [expected]
    assert of_model(distilled(teacher={**METER, **more, "pretrained": "weights.pth"})) == []
    assert of_model({**METER, **more}) == []  # a model that is trained may start at random
    found = of_model(distilled(teacher={}, teachers=[METER, {**METER, **more}]))
    assert found == [expected.replace("model.teacher", "model.teachers.1")]


def test_lavis_own_teachers_need_weights_too(adapted):
    student = {"arch": "meter_retrieval", "model_type": "student_coco"}
    assert of_model(distilled(ALBEF, student)) == []
    for bare in ({"arch": "albef_retrieval", "depth": 2}, {**ALBEF, "load_finetuned": False, "pretrained": None}):
        assert one(of_model(distilled(bare, student)), "model.teacher: names no weights")
    clip = {"arch": "clip", "model_type": "ViT-B-16"}
    assert of_model(distilled(clip, student)) == []
    assert one(of_model(distilled({**clip, "pretrained": ""}, student)), "model.teacher: names no weights")


def test_models_that_load_no_weights_by_name_need_none(monkeypatch):
    from lavis.common.registry import registry

    class Made:
        @classmethod
        def from_config(cls, cfg):
            return cfg.get("width")

    monkeypatch.setitem(registry.mapping["model_name_mapping"], "made_up", Made)
    student = {"arch": "meter_retrieval", "model_type": "student_coco"}
    assert of_model(distilled({"arch": "made_up", "width": 3}, student)) == []


def test_the_keys_of_an_adapter_are_known_and_typed(adapted, caplog):
    assert of_model({**ALBEF, "depth": 2, "freeze": ["visual_encoder"], "tokenizer": "folder"}) == []
    found = of_model({**ALBEF, "depth": "deep", "dpeth": 1, "freeze": "all", "alpa": 0.4})
    said = [record.getMessage() for record in caplog.records]
    assert one(found, "model.depth") == "model.depth: 'deep' (text) is not an integer"
    assert one(found, "model.freeze").startswith("model.freeze: 'all' (text) is not a list")
    assert "did you mean depth" in one(said, "model.dpeth: no default has this key")
    assert "did you mean alpha" in one(said, "model.alpa: no default has this key")


def test_inputs_of_ones_own_are_checked_in_teacher_and_student(adapted, caplog):
    image = {"name": "dcd_image_eval", "image_size": 64}
    good = {"vis_processor": {"eval": image}, "text_processor": None}
    assert of_model(distilled({**METER, "preprocess": good}, {**THINNED, "preprocess": good})) == []
    assert of_model(distilled({}, METER, teachers=[{**ALBEF, "preprocess": good}])) == []
    bad = {"vis_procesor": {}, "vis_processor": {"eval": {**image, "image_siez": 3}, "evla": image},
           "text_processor": {"train": {"name": "dcd_captoin"}}}  # fmt: skip
    found = of_model(distilled({**METER, "preprocess": bad}))
    assert "did you mean vis_processor" in one(found, "model.teacher.preprocess.vis_procesor: unknown key")
    assert "legal keys: eval, train" in one(found, "model.teacher.preprocess.vis_processor.evla: unknown key")
    assert "did you mean image_size" in one(found, "model.teacher.preprocess.vis_processor.eval.image_siez")
    assert "did you mean dcd_caption" in one(found, "model.teacher.preprocess.text_processor.train.name")
    assert len(found) == 4
    assert of_model(distilled({**METER, "preprocess": {"text_processor": {"train": {"name": "dcd_caption"}}}})) == [
        "model.teacher.preprocess.text_processor: has no eval, through which evaluation reads"
    ]
    assert of_model(distilled({**METER, "preprocess": "clip"})) == [
        "model.teacher.preprocess: 'clip' is not a section; expected keys vis_processor, text_processor"
    ]
    # a model trained by itself reads through the data set's processors
    assert of_model({**ALBEF, "preprocess": good}) == []
    assert one([record.getMessage() for record in caplog.records], "model.preprocess: no default has this key")
    assert one(of_model({**METER, "preprocess": good}), "model.preprocess: unknown key")


def files_of(model) -> dict[str, Any]:
    config = merge_defaults(OmegaConf.create({"model": model, "datasets": {}}))
    config.datasets = {}
    return {file.field: file for file in required_files(config)}


def test_what_an_adapted_model_reads(adapted, tmp_path, cache, offline, job):
    found = files_of(ALBEF)
    assert list(found) == ["model.finetuned", "model.tokenizer"]
    weights = found["model.finetuned"]
    assert weights.url.endswith("/albef_coco_retrieval_lavis.pt")
    assert weights.target.name == "albef_coco_retrieval_lavis.pt" and "hub" in str(weights.target)
    assert found["model.tokenizer"].hub == "bert-base-uncased"
    line = one(faults_of(job({**SCENES, "model": ALBEF})), "model.tokenizer: bert-base-uncased is not in the hub's")
    assert line.endswith("set model.tokenizer to a local folder, or run again with a network")
    own = {**ALBEF, "tokenizer": str(tmp_path), "med_config_path": str(tmp_path / "med.json"), "finetuned": "own.pth"}
    found = files_of(own)
    assert {field: file.missing() for field, file in found.items()} == {
        "model.finetuned": True, "model.tokenizer": False, "model.med_config_path": True
    }  # fmt: skip
    assert not any(file.url or file.hub for file in found.values())


def test_what_a_plain_clip_reads(adapted):
    found = files_of({"arch": "clip", "model_type": "ViT-B-16"})["model.pretrained"]
    assert found.url.endswith("/ViT-B-16.pt") and found.sha256 == found.url.split("/")[-2] and len(found.sha256) == 64
    assert found.target == Path("~/.cache/clip/ViT-B-16.pt").expanduser()
    found = files_of({"arch": "clip", "model_type": "ViT-B-16", "pretrained": "weights/own.pt"})
    assert {field: (file.target, file.url) for field, file in found.items()} == {
        "model.pretrained": (Path("weights/own.pt"), None)
    }


def test_the_towers_that_blip2_brings(adapted):
    found = files_of({"arch": "blip2", "model_type": "pretrain"})
    assert list(found) == ["model.pretrained", "model.tokenizer", "model.vit_model"]
    assert found["model.vit_model"].url.endswith("/eva_vit_g.pth")
    assert "model.vit_model" not in files_of({"arch": "blip2", "model_type": "pretrain", "sizes": {"depth": 1}})


def test_the_files_of_several_teachers(adapted):
    found = files_of(distilled(teacher={}, teachers=[ALBEF, {"arch": "clip", "model_type": "RN50"}], student=METER))
    assert {"model.teachers.0.finetuned", "model.teachers.0.tokenizer", "model.teachers.1.pretrained",
            "model.student.finetuned"} <= set(found)  # fmt: skip


NO_NEGATIVES = "run.batch_size_train: 1 leaves no negatives"


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ([], True),
        (["model.candidates.source=bank"], False),
        (["model.candidates.image_to_text.source=random", "model.candidates.image_to_text.count=3",
          "model.candidates.source=null"], False),
        (["run.evaluate=true"], False),
        (["run.batch_size_train=2"], False),
    ],
)  # fmt: skip
def test_a_distillers_batch_of_one_is_warned_of_where_it_is_certain(cache, caplog, options, warned):
    load_config("projects/dcd/quickstart.yaml", ["run.batch_size_train=1", *options])
    assert (NO_NEGATIVES in caplog.text) == warned


def test_a_retrievers_batch_of_one_is_warned_of_unless_processes_join_theirs(job, caplog, monkeypatch):
    load_config(job(SCENES), ["run.batch_size_train=1"])
    assert f"{NO_NEGATIVES}, since meter_retrieval compares the pairs of a batch" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_config(job(SCENES), ["run.batch_size_train=1"])
    assert NO_NEGATIVES not in caplog.text


def test_a_job_tells_others_what_was_written_and_reads_what_it_means(job, caplog, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2-token")
    options = ["run.output_dir=out/${oc.env:MY_TOKEN}", "run.seed=${oc.env:MY_SEED,5}", "run.job_id=x"]
    checked = load_config(job(SCENES), options)
    assert checked.run.output_dir == "out/hunter2-token" and checked.run.seed == 5
    assert checked.to_dict()["run"]["output_dir"] == "out/${oc.env:MY_TOKEN}"
    with caplog.at_level("INFO"):
        checked.pretty_print()
    assert "${oc.env:MY_TOKEN}" in caplog.text and "hunter2" not in caplog.text
    secrets.forget()


@pytest.mark.parametrize(
    "keys", [{"project": "../../x"}, {"job_id": "x" * 300}, {"output_dir": "a\x1bb"}, {"project": ["a"]}, "text", None]
)
def test_a_comparison_has_names_and_places_like_any_job(job, tmp_path, keys):
    path = job({**SCENES, "run": keys, "variants": {"one": {}}})
    with pytest.raises(UserError) as caught:
        run_job(path, [], [], evaluate=False)
    assert all(line.startswith(("run", "job.yaml: run: ")) for line in caught.value.faults)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["job.yaml", "work"]
