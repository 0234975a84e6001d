"""Every job under projects/dcd that can be made tiny trains, evaluates and exports on a CPU."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_dcd import train

README = Path(__file__).parents[1] / "README.md"
GOLDEN = Path(__file__).parent / "golden"
VOCAB = "asset:quickstart/vocab.txt"
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 210), "grey": (130, 130, 130)}
SHAPES = ("square", "bar", "stripe")
CAPTIONS = ("a {} {}", "there is one {} {} on white")

# what every job is given: two steps on a CPU
RUN = {
    "device": "cpu", "max_epoch": 1, "max_steps": 2, "batch_size_train": 4, "batch_size_eval": 8, "num_workers": 0,
    "amp": "off", "log_freq": 1,
}  # fmt: skip
TINY = {  # a METER of a few thousand weights with BERT's kind of vocabulary
    "load_finetuned": False,
    "vision": {"image_size": 48, "patch_size": 16, "width": 32, "layers": 1, "heads": 2},
    "text": {
        "family": "bert",
        "name": VOCAB,
        "config": {
            "vocab_size": 200,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 48,
        },
    },
    "fusion": {"width": 16, "layers": 6, "heads": 2},
}
PROCESSORS = {"vis_processor": {"train": {"image_size": 48}, "eval": {"image_size": 48}}}
FEW_NEGATIVES = {"selection": {"hard_negatives": 3}}


@pytest.fixture
def pictures(tmp_path: Path) -> list[dict]:
    """Twelve pictures on disk, with two captions each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    found = []
    for colour, rgb in COLOURS.items():
        for number, shape in enumerate(SHAPES):
            pixels = np.full((40, 60, 3), 255, dtype=np.uint8)
            pixels[8 : 32 - 8 * number, 5 : 25 + 15 * number] = rgb
            name = f"{colour}_{shape}.png"
            Image.fromarray(pixels).save(folder / name)
            found.append({"image": name, "caption": [text.format(colour, shape) for text in CAPTIONS]})
    return found


@pytest.fixture
def job(tmp_path, monkeypatch, cache):
    """Trains a packaged job with nested settings as --options; returns its run folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, settings: dict) -> Path:
        options = [*_dotted({"run": {**RUN, "job_id": "tiny"}}), *_dotted(settings)]
        assert train.main(["--cfg-path", f"projects/dcd/{name}.yaml", "--options", *options]) == 0
        return tmp_path / "output" / name / "tiny"

    return run


def _dotted(settings: dict, path: str = "") -> list[str]:
    items = []
    for key, value in settings.items():
        where = f"{path}{key}"
        items += _dotted(value, f"{where}.") if isinstance(value, dict) else [f"{where}={json.dumps(value)}"]
    return items


def _rows(folder: Path) -> dict[str, dict]:
    """The rows of a finished job's table by name, after a look at the files that it must leave."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "train"] == [1, 2]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}


def _assert_distilled(folder: Path) -> None:
    rows = _rows(folder)
    assert list(rows) == ["teacher", "student before training", "student"]
    # half the fusion layers; poolers, projections and heads stay
    assert rows["student"]["fusion_parameters"] < 0.7 * rows["teacher"]["fusion_parameters"]
    assert (folder / "student.pth").is_file()


# -- the shipped scenes ------------------------------------------------------------------------------------------

SCENES = {"shape_scenes": {"build_info": {"scenes": {"train": 30, "val": 12, "test": 12}}}}


def test_quickstart(job):
    model = {"teacher": {"load_finetuned": False}, **FEW_NEGATIVES}
    _assert_distilled(job("quickstart", {"model": model, "datasets": SCENES}))


def test_quickstart_teacher(job):
    folder = job("quickstart_teacher", {"datasets": SCENES})
    assert list(_rows(folder)) == ["model"]
    assert (folder / "model.pth").is_file()


def test_quickstart_ablation(job):
    model = {"teacher": {"load_finetuned": False}, **FEW_NEGATIVES}
    folder = job("quickstart_ablation", {"model": model, "datasets": SCENES, "seeds": [0]})
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "teacher", "student before training", "student", "ground truth alone",
        "plain distillation, random negatives",
    ]  # fmt: skip
    # one seed, one start: the student before training is the same for all
    assert (folder / "ground-truth-alone-seed0" / "student.pth").is_file()


# -- one's own pictures ------------------------------------------------------------------------------------------


def test_own_photos_from_teacher_to_student(job, pictures, tmp_path, monkeypatch):
    lines = [f'{row["image"]},"{caption}"' for row in pictures for caption in row["caption"]]
    (tmp_path / "photos" / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    monkeypatch.setenv("OWN_PHOTOS", str(tmp_path / "photos"))
    data = {"image_text_retrieval": {**PROCESSORS, "build_info": {"val_fraction": 0.2, "test_fraction": 0.2}}}

    folder = job("own_photos_teacher", {"model": TINY, "datasets": data})
    assert list(_rows(folder)) == ["model before training", "model"]

    # the file's own sizes win; the tokenizer named here is only looked for
    model = {"teacher": {"finetuned": str(folder / "model.pth"), "text": {"name": VOCAB}}, **FEW_NEGATIVES}
    student = job("own_photos", {"model": model, "datasets": data})
    _assert_distilled(student)
    kept = list((tmp_path / "cache" / "dcd_features").glob("*.safetensors"))
    assert len(kept) == 1, "the student reads the features that its teacher kept"


# -- the paper's recipes -----------------------------------------------------------------------------------------


@pytest.fixture
def golden_meter(tmp_path) -> dict:
    """The `teacher:` section of the reference METER, with a RoBERTa tokenizer of a few words."""
    sizes = json.loads((GOLDEN / "meter_tiny_config.json").read_text())
    clip, meter = sizes["clip_visual"], sizes["meter"]
    return {
        "finetuned": str(GOLDEN / "meter_tiny_state_dict.safetensors"),
        "vision": {
            "image_size": clip["image_resolution"],
            "patch_size": clip["vision_patch_size"],
            "width": clip["vision_width"],
            "layers": clip["vision_layers"] - 1,
        },
        "text": {"name": str(_tokenizer(tmp_path / "roberta")), "config": sizes["roberta"]},
        "fusion": {"width": meter["hidden_size"], "layers": meter["num_layers"], "heads": meter["num_heads"]},
    }


def _tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = [*COLOURS, *SHAPES, *{word for text in CAPTIONS for word in text.split() if word != "{}"}]
    ids = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "builder"), [("meter_coco", "coco_retrieval"), ("meter_flickr30k", "flickr30k")]
)
def test_the_paper_recipes_on_a_dozen_pictures(job, pictures, golden_meter, tmp_path, name, builder):
    files = {}
    for split, chosen in (("train", pictures[:8]), ("val", pictures[8:10]), ("test", pictures[10:])):
        rows = chosen
        if split == "train":  # LAVIS's training rows: one caption each
            rows = [
                {"image": row["image"], "caption": caption, "image_id": row["image"]}
                for row in chosen for caption in row["caption"]
            ]  # fmt: skip
        file = tmp_path / f"{split}.json"
        file.write_text(json.dumps(rows))
        files[split] = {"url": str(file), "storage": str(file)}
    info = {"annotations": files, "images": {"storage": str(tmp_path / "photos")}}
    model = {"teacher": golden_meter, "candidates": {"image_to_text": {"count": 10}}}
    folder = job(name, {"model": model, "datasets": {builder: {**PROCESSORS, "build_info": info}}})
    _assert_distilled(folder)


# -- COCO's official captions ------------------------------------------------------------------------------------


def test_coco_captions_train_on_the_mini_set(tmp_path, monkeypatch, cache, shared_folder):
    data = shared_folder / "data" / "coco_val2017_mini"
    if not data.is_dir():
        pytest.skip(f"no {data}")
    monkeypatch.chdir(tmp_path)
    split = dict.fromkeys(("train", "val"), "captions_val2017_mini.json")
    images = dict.fromkeys(("train", "val"), "val2017")
    settings = {
        "model": {"arch": "meter_retrieval", "model_type": "student_coco", **TINY, "joint_head": {"dim": 8}},
        "datasets": {
            "coco_captions": {**PROCESSORS, "build_info": {"root": str(data), "annotations": split, "images": images}}
        },
        "run": {**RUN, "job_id": "tiny", "valid_splits": ["val"], "k_test": 2, "evaluate_before": False},
    }
    (tmp_path / "coco.yaml").write_text(json.dumps(settings))  # JSON is YAML
    assert train.main(["--cfg-path", "coco.yaml"]) == 0
    rows = _rows(tmp_path / "output" / "coco" / "tiny")
    assert rows["model"]["how"] == "shortlist k=2 (joint)"


# -- what the README says to type --------------------------------------------------------------------------------


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "--cfg-path" in line]


@pytest.mark.parametrize("command", _commands())
def test_commands_of_the_readme_name_jobs_and_settings_that_exist(command, tmp_path, monkeypatch):
    import lavis  # noqa: F401

    from lavis_dcd.config import merge_defaults, read_job
    from lavis_dcd.validation import job_faults
    from lavis_dcd.variants import split_off

    (tmp_path / "captions.csv").touch()
    monkeypatch.setenv("OWN_PHOTOS", str(tmp_path))
    words = shlex.split(command)
    options = words[words.index("--options") + 1 :] if "--options" in words else []
    own, _ = split_off(read_job(words[words.index("--cfg-path") + 1], options)[0])
    assert job_faults(merge_defaults(own)) == []


def test_the_readme_opens_with_the_two_commands_and_its_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    assert "python -m pip install -e . && python -m lavis.train --cfg-path projects/dcd/quickstart.yaml" in text
    assert 'python -m pip install -e ".[test]" && python -m pytest' in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (README.parent / target).is_file(), target
