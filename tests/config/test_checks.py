"""Lines about names and processors; whole job files are checked in ``test_job_file.py``."""

from __future__ import annotations

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_dcd.config.checks import processors_faults, unknown_name
from lavis_dcd.processors import captions, images  # noqa: F401  they register themselves


def test_an_unknown_name_is_told_with_its_nearest_and_all_there_are():
    names = ["meter_retrieval", "vilt_retrieval", "dcd"]
    line = unknown_name("model.arch", "meter_retreival", names)
    assert line.startswith("model.arch: 'meter_retreival' is not registered; did you mean meter_retrieval")
    assert line.endswith("registered: dcd, meter_retrieval, vilt_retrieval")
    assert "did you mean" not in unknown_name("model.arch", "zzz", names)
    assert unknown_name("model.arch", None, []).startswith("model.arch: None is not registered; ")


@pytest.mark.parametrize("section", [None, {}, {"vis_processor": {"eval": {"name": "dcd_image_eval", "image_size": 8}}},
                                     {"text_processor": {"train": {"name": "dcd_caption"}, "eval": None}}])  # fmt: skip
def test_sound_processors_have_no_faults(section):
    assert processors_faults(None if section is None else OmegaConf.create(section), "preprocess") == []


@pytest.mark.parametrize(
    ("section", "start"),
    [
        ("text", "p: 'text' is not a section; expected keys vis_processor, text_processor"),
        ({"vis_procesor": {}}, "p.vis_procesor: "),
        ({"vis_processor": 3}, "p.vis_processor: 3 is not a section; expected keys train, eval"),
        ({"vis_processor": {"test": {}}}, "p.vis_processor.test: "),
        ({"vis_processor": {"eval": {"image_size": 8}}}, "p.vis_processor.eval: expected a section with the proc"),
        ({"vis_processor": {"eval": {"name": "dcd_image_evil"}}}, "p.vis_processor.eval.name: 'dcd_image_evil' is not"),
        ({"vis_processor": {"eval": {"name": "dcd_image_eval", "image_sise": 8}}}, "p.vis_processor.eval.image_sise: "),
    ],
)
def test_a_fault_names_its_place(section, start):
    lines = processors_faults(section if isinstance(section, str) else OmegaConf.create(section), "p")
    assert len(lines) == 1 and lines[0].startswith(start)


def test_an_unknown_key_of_lavis_own_processors_is_a_warning(caplog):
    assert "blip_caption" in registry.list_processors()
    sound = {"text_processor": {"train": {"name": "blip_caption", "prompt": "a "}}}
    wrong = {"text_processor": {"train": {"name": "blip_caption", "promt": "a "}}}
    assert processors_faults(OmegaConf.create(sound), "p") == [] and not caplog.messages
    assert processors_faults(OmegaConf.create(wrong), "p") == []
    (line,) = caplog.messages
    assert line.startswith("p.text_processor.train.promt: ") and "prompt" in line
