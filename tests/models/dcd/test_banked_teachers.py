"""Training from a score bank: the same step as with a living teacher, and no teacher anywhere."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import assert_finished
from stubs import ColourMatcher as Stub

pytest.importorskip("lavis")
from lavis_dcd.banks.score_bank import BankTable, ScoreBank, bank_folder
from lavis_dcd.banks.score_candidates import BankCandidates, Choice
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.manifest import Identity
from lavis_dcd.common.schema import parse
from lavis_dcd.config.run_section import RunConfig
from lavis_dcd.datasets.rows import RetrievalRows
from lavis_dcd.distillation.objective import LossConfig
from lavis_dcd.job import load_config
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.mining.identity import identity_of
from lavis_dcd.models.building import build_matcher
from lavis_dcd.models.dcd import DynamicContrastiveDistillation
from lavis_dcd.models.dcd import build as dcd_building
from lavis_dcd.models.dcd.banked_teachers import BankedTeachers
from lavis_dcd.models.dcd.checks import family_of
from lavis_dcd.models.dcd.config import CandidatesConfig, DcdConfig, PoolConfig, SelectionConfig
from lavis_dcd.runners.runner_dcd import by_split
from lavis_dcd.tasks.dcd_retrieval import DcdRetrievalTask

BOTH = ("image_to_text", "text_to_image")
METER = {"arch": "meter_retrieval", "model_type": "quickstart"}
DUAL = {"arch": "dual_encoder", "model_type": "tiny"}


class Pictures(RetrievalRows):
    """Eight pictures of random colours, two captions each; no files."""

    def __init__(self) -> None:
        rows = [
            {"image": str(i), "caption": f"caption {'x' * i} {i * j + j}", "image_id": str(i)}
            for i in range(8) for j in (3, 7)
        ]  # fmt: skip
        super().__init__(lambda picture: picture, str, "", rows)
        self.pixels = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        number = self.img_ids[row["image_id"]]
        return {"image": self.pixels[number], "text_input": row["caption"], "image_id": number}


@torch.no_grad()
def scored_by(teacher: Matcher, data: Pictures, kept: int) -> ScoreBank:
    """A bank of `kept` candidates of every row, the teacher's scores asked pair by pair."""
    ids = [data[i]["image_id"] for i in range(len(data))]
    images = teacher.encode_images(torch.stack([data[i]["image"] for i in range(len(data))]))
    texts = teacher.encode_texts([data[i]["text_input"] for i in range(len(data))])
    table = torch.stack([
        teacher.match(images, texts, torch.tensor([[i, t] for t in range(len(data))])) for i in range(len(data))
    ])  # fmt: skip
    tables = {}
    for direction in BOTH:
        candidates, scores = [], []
        for row in range(len(data)):
            others = [c for c in range(len(data)) if ids[c] != ids[row]]
            if direction == BOTH[1]:
                others = [c for c in others if c == ids.index(ids[c])]
            of_pair = [(table[row, c] if direction == BOTH[0] else table[c, row]).item() for c in others]
            order = sorted(range(len(others)), key=lambda i: -of_pair[i])[:kept]
            candidates.append([others[i] for i in order])
            scores.append([table[row, row].item(), *(of_pair[i] for i in order)])
        tables[direction] = BankTable(torch.tensor(candidates, dtype=torch.int32), torch.tensor(scores))
    return ScoreBank(Identity({"the teacher": "t"}), {}, tables)


def batch_of(bank: ScoreBank, data: Pictures, rows: list[int], directions=BOTH, **choice: Any) -> dict[str, Any]:
    found = BankCandidates(data, bank, directions, Choice(**choice), seed=1)
    return found.collater([found[row] for row in rows])


def step(model: DynamicContrastiveDistillation, batch: dict[str, Any]) -> tuple[dict, list[torch.Tensor]]:
    model.train()
    result = model(batch)
    result["loss"].backward()
    return result, [p.grad for p in model.student.parameters()]


def assert_same(one: tuple[dict, list], other: tuple[dict, list]) -> None:
    # a teacher is judged by its whole pool, which a bank does not show
    told = [{key: value for key, value in of[0].items() if key != "teacher_match_rank"} for of in (one, other)]
    assert told[0].keys() == told[1].keys()
    torch.testing.assert_close(*told, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def banked(config: dict[str, Any]) -> DynamicContrastiveDistillation:
    config = {"candidates": CandidatesConfig(source="bank"), **config}
    return DynamicContrastiveDistillation(BankedTeachers("fusion"), Stub(2), DcdConfig(**config))


# -- the same step -----------------------------------------------------------------------------------------------

ROWS = [0, 3, 4, 9, 1]  # the last shows the first one's picture


@pytest.mark.parametrize(
    ("selection", "loss"),
    [
        (SelectionConfig(hard_negatives=3), LossConfig()),
        (SelectionConfig(hard_negatives=3, margin=0.5), LossConfig(distill="kl", contrastive="listwise_ce")),
        # all pairs of the batch have a say, so the same pictures and captions must be in it
        (SelectionConfig(hard_negatives=None), LossConfig(weighting="entropy_normalised", in_batch_weight=0.5)),
        (SelectionConfig(hard_negatives=6), LossConfig(weighting="confidence_gap", alpha=0.7)),
    ],
)
def test_a_step_is_that_of_a_living_teacher_on_the_same_candidates(selection, loss):
    teacher, data = Stub(1), Pictures()
    bank = scored_by(teacher, data, kept=6)
    choice = {"hard_negatives": selection.hard_negatives, "margin": selection.margin}
    config = {"selection": selection, "loss": loss}
    chosen = step(banked(config), batch_of(bank, data, ROWS, **choice))
    # the living teacher scores all that is kept, and chooses
    everything = batch_of(bank, data, ROWS, hard_negatives=None)
    for direction in BOTH:
        everything.pop(f"{direction}_scores")
    alive = DynamicContrastiveDistillation(
        teacher, Stub(2), DcdConfig(candidates=CandidatesConfig(source="bank"), **config)
    )
    assert_same(chosen, step(alive, everything))


def test_a_step_is_that_of_random_captions_with_a_living_teacher():
    teacher, data = Stub(1), Pictures()
    batch = batch_of(scored_by(teacher, data, kept=6), data, ROWS, BOTH[:1], hard_negatives=None)
    bank = CandidatesConfig(image_to_text=PoolConfig("bank"), text_to_image=None)
    random = CandidatesConfig(image_to_text=PoolConfig("random", 6), text_to_image=None)
    # the bank's own choice is made where samples are; None lets all through
    mine = step(banked({"candidates": bank, "selection": SelectionConfig(None)}), batch)
    teachers = DynamicContrastiveDistillation(
        teacher, Stub(2), DcdConfig(candidates=random, selection=SelectionConfig(hard_negatives=6))
    )
    assert_same(mine, step(teachers, batch))


def test_every_picture_and_caption_is_encoded_once():
    data = Pictures()
    batch = batch_of(scored_by(Stub(1), data, kept=6), data, ROWS, hard_negatives=3)
    model = banked({"selection": SelectionConfig(3)})
    model(batch)
    pictures = {*batch["image_id"].tolist(), *batch["candidate_picture_id"].flatten().tolist()}
    assert model.student.images_seen == len(pictures)
    assert len(model.student.texts_seen) == len({*batch["text_input"], *batch["candidate_text"]})


def test_features_of_candidates_may_follow_those_of_samples():
    data = Pictures()
    batch = batch_of(scored_by(Stub(1), data, kept=6), data, ROWS, hard_negatives=3)
    model = banked({"selection": SelectionConfig(3)})
    with torch.no_grad():
        plain = model(batch)
        images = torch.cat([batch["image"], batch.pop("candidate_image")])
        batch["image"] = model.student.encode_images(images)
        batch["text_features"] = model.student.encode_texts([*batch["text_input"], *batch["candidate_text"]])
        torch.testing.assert_close(model(batch), plain)


def test_a_view_of_ones_own_reaches_the_student():
    data = Pictures()
    batch = batch_of(scored_by(Stub(1), data, kept=6), data, ROWS, hard_negatives=3)
    model = banked({"selection": SelectionConfig(3)})
    with torch.no_grad():
        plain = model(batch)
        for key in ("image", "candidate_image"):
            batch[key] = {"student": batch[key], "teacher": batch[key].new_zeros(1)}
        torch.testing.assert_close(model(batch), plain)


def test_samples_without_scores_are_refused():
    data = Pictures()
    batch = batch_of(scored_by(Stub(1), data, kept=6), data, ROWS, hard_negatives=3)
    batch["text_to_image_scores"] = batch["text_to_image_scores"][:, :2]
    with pytest.raises(UserError, match="no scores of text_to_image out of a score bank"):
        banked({"selection": SelectionConfig(3)})(batch)


# -- settings ----------------------------------------------------------------------------------------------------


def test_one_source_for_both_directions_unless_they_name_their_own():
    def sources(section: dict | None) -> dict[str, str]:
        return parse(CandidatesConfig, section).sources()

    assert sources({}) == sources({"source": None}) == dict.fromkeys(BOTH, "in_batch")
    assert sources({"source": "bank"}) == dict.fromkeys(BOTH, "bank")
    assert sources({"source": "bank", "text_to_image": None}) == {"image_to_text": "bank"}
    assert sources({"source": "bank", "image_to_text": {}}) == dict.fromkeys(BOTH, "bank")
    own = {"source": "bank", "text_to_image": {"source": "in_batch"}}
    assert sources(own) == {"image_to_text": "bank", "text_to_image": "in_batch"}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"candidates": {"source": "bank", "text_to_image": {"source": "in_batch"}}},
         r"candidates\.text_to_image\.source: in_batch, but the other direction's is bank.*text_to_image=null"),
        ({"candidates": {"source": "bank", "teacher_budget": 4}}, "teacher_budget: no teacher runs"),
        ({"candidates": {"source": "bank"}, "loss": {"reference": "release"}}, "loss.reference: release"),
        ({"candidates": {"source": "bank", "bank": {"keep": 3}}}, "hard_negatives: 7, but candidates.bank.keep is 3"),
        ({"candidates": {"bank": {"by": "chance"}}}, r"bank\.by: 'chance' is none of joint, student, none"),
        ({"candidates": {"bank": {"keep": 0}}}, r"bank\.keep: 0, at least 1"),
        ({"candidates": {"source": "bank", "image_to_text": {"source": "in_batch"}, "text_to_image": None}},
         r"candidates\.source: bank has no effect beside image_to_text\.source=in_batch"),
        ({"candidates": {"source": "bank", "image_to_text": {"count": 3}}}, r"image_to_text\.count: 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_bank_is_refused(config, line):
    with pytest.raises(UserError, match=line):
        DynamicContrastiveDistillation(BankedTeachers("fusion"), Stub(2), parse(DcdConfig, config))


# -- no teacher --------------------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch) -> list[tuple[str, weakref.ref]]:
    """What `build_matcher` builds for a distillation, in order."""
    made: list[tuple[str, weakref.ref]] = []

    def build(section, path):
        matcher = build_matcher(section, path)
        made.append((path, weakref.ref(matcher)))
        return matcher

    monkeypatch.setattr(dcd_building, "build_matcher", build)
    return made


def test_the_teacher_is_not_built(built):
    model = DynamicContrastiveDistillation.from_config(
        {"arch": "dcd", "teacher": METER, "student": DUAL, "candidates": {"source": "bank"}}
    )
    assert [path for path, _ in built] == ["model.student"]
    assert list(model.matchers()) == ["student"] and list(model.views()) == []
    assert model.teacher_fingerprint() == "" and model.needs_score_bank
    assert (model.loss_config.distill, model.loss_config.contrastive) == ("kl", "listwise_ce")
    with pytest.raises(UserError, match="no teacher is built"):
        model.teacher  # noqa: B018
    one, other = (ScoreBank(Identity({"the teacher": t}), {}, scored_by(Stub(1), Pictures(), 2).tables) for t in "ab")
    model.use_score_bank(one)
    first = model.teacher_fingerprint()
    model.use_score_bank(other)
    assert len(first) == 64 and model.teacher_fingerprint() != first


def test_a_teacher_to_start_from_is_gone_afterwards(built):
    model = DynamicContrastiveDistillation.from_config(
        {"arch": "dcd", "teacher": METER, "student": {"init_from_teacher": {"layers": [0, 3]}},
         "candidates": {"source": "bank"}}
    )  # fmt: skip
    gc.collect()
    assert [(path, ref() is None) for path, ref in built] == [("model.teacher", True), ("model.student", False)]
    model.train()
    assert model.student.encoders_frozen()
    assert not any(m.training for tower in model.student.encoder_modules() for m in tower.modules())
    teacher, student = build_matcher(METER, "model.teacher").state_dict(), model.student.state_dict()
    same = [name for name in student if name in teacher and name.startswith(("vision_tower", "text_tower"))]
    assert same and all(torch.equal(student[name], teacher[name]) for name in same)
    assert (model.loss_config.distill, model.loss_config.contrastive) == ("mse", "bce")


@pytest.mark.parametrize(
    ("section", "family"),
    [(METER, "fusion"), (DUAL, "dual"), ({"arch": "clip"}, "dual"), ({"arch": "blip_retrieval"}, "fusion")],
)
def test_the_family_is_known_without_building(section, family):
    assert family_of(section, "model.teacher") == family


def test_several_teachers_are_dual_only_when_all_are():
    def family(*sections: dict) -> str:
        return BankedTeachers.of(DcdConfig(teachers=list(sections))).family

    assert (family(DUAL, {"arch": "clip"}), family(DUAL, METER)) == ("dual", "fusion")
    with pytest.raises(UserError, match="either teacher:"):
        BankedTeachers.of(DcdConfig())


# -- whole jobs --------------------------------------------------------------------------------------------------

READS = {
    "vis_processor": {stage: {"name": "dcd_image_eval", "image_size": 64} for stage in ("train", "eval")},
    "text_processor": {stage: {"name": "dcd_caption"} for stage in ("train", "eval")},
}


@pytest.fixture
def sections(retrieval_files) -> Callable[..., dict]:
    def make(student: dict | None = None, candidates: dict | None = None, **run: Any) -> dict:
        return {
            "model": {"arch": "dcd", "teacher": METER, "student": student or {"init_from_teacher": {"layers": [0]}},
                      "selection": {"hard_negatives": 2}, "candidates": candidates or {"source": "bank"}},
            "datasets": {"coco_retrieval": {**READS, "build_info": retrieval_files}},
            "run": {"test_splits": ["test"], **run},
        }  # fmt: skip

    return make


@pytest.fixture
def bank_by_hand(tmp_path: Path, monkeypatch, cache) -> Callable[[dict], Path]:
    """Leaves a bank with random candidates and scores where the job looks for one."""

    def leave(content: dict) -> Path:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "hand.yaml").write_text(json.dumps(content))
        cfg = load_config("hand.yaml")
        task = DcdRetrievalTask.setup_task(cfg=cfg)
        datasets = by_split(task.build_datasets(cfg), parse(RunConfig, cfg.run_cfg, "run"))
        rows = len(datasets["train"])
        generator = torch.Generator().manual_seed(0)

        def table() -> BankTable:
            candidates = torch.stack([torch.randperm(rows, generator=generator)[:5] for _ in range(rows)]).int()
            return BankTable(candidates, torch.randn(rows, 6, generator=generator).sort(descending=True).values)

        folder = bank_folder(cfg.model_cfg, cfg.datasets_cfg)
        identity = identity_of(parse(DcdConfig, cfg.model_cfg, "model"), datasets)
        ScoreBank(identity, {}, {direction: table() for direction in BOTH}).save(folder)
        return folder

    return leave


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["off", "memory"])
@pytest.mark.parametrize("candidates", [{"source": "bank"}, {"source": "bank", "text_to_image": None}])
def test_a_job_trains_from_its_bank(sections, bank_by_hand, job_file, cached, candidates):
    content = sections(candidates=candidates, cache_features=cached, num_workers=1)
    bank_by_hand(content)
    folder = job_file(content)
    assert list(assert_finished(folder)) == ["student before training", "student"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert all(torch.isfinite(torch.tensor([line["loss"], line["teacher_match_score"]])).all() for line in train)


def test_a_student_with_a_reading_of_its_own_trains_from_a_bank(sections, bank_by_hand, job_file):
    own = {"vis_processor": {stage: {"name": "blip_image_eval", "image_size": 64} for stage in ("train", "eval")}}
    content = sections(student={**DUAL, "preprocess": own})
    bank_by_hand(content)
    assert list(assert_finished(job_file(content))) == ["student before training", "student"]


def test_settings_come_before_the_bank(sections, job_file):
    mixed = {"source": "bank", "text_to_image": {"source": "in_batch"}}
    with pytest.raises(UserError) as caught:
        job_file(sections(candidates=mixed))
    assert len(caught.value.faults) == 1 and "the other direction's is bank" in caught.value.faults[0]


def test_an_absent_bank_stops_the_job(sections, job_file, tmp_path):
    with pytest.raises(UserError, match=r"no score bank in .*dcd_scores.*python -m lavis_dcd mine --cfg-path F"):
        job_file(sections())
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_stale_bank_stops_the_job(sections, bank_by_hand, job_file, tmp_path):
    bank_by_hand(sections())
    captions = tmp_path / "train.json"
    captions.write_text(captions.read_text().replace("there is one red", "there was one red"))
    with pytest.raises(UserError, match=r"stale.*the rows of train \("):
        job_file(sections())
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_evaluation_needs_no_bank(sections, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(json.dumps(sections(evaluate=True)))
    cfg = load_config("job.yaml")
    assert list(DcdRetrievalTask.setup_task(cfg=cfg).build_model(cfg).matchers()) == ["student"]
