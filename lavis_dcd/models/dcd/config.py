"""The ``model:`` section of a distillation job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lavis_dcd.distillation.objective import LossConfig, loss_defaults
from lavis_dcd.matching.contract import MAIN_VIEW

IN_BATCH, BANK = "in_batch", "bank"


@dataclass
class PoolConfig:
    """The source of the candidates of one direction."""

    # in_batch: all other items of the batch | random: drawn from the data set | bank: mined before the training, with
    # the teacher's scores; null: as candidates.source says
    source: str | None = None
    count: int | None = None  # random: captions drawn per picture (the release: 63 Flickr30K, 15 COCO)


@dataclass
class BankConfig:
    """A score bank: where it lies and how ``python -m lavis_dcd mine`` fills it."""

    path: str | None = None  # the bank's folder; null: in the cache, by teacher and data
    by: str = "joint"  # whose cheap scores make the shortlist: joint (the teacher's joint space) | student | none
    shortlist: int = 48  # most promising candidates per query, by the cheap scores
    random: int = 15  # candidates drawn at random per query beside them
    keep: int = 63  # candidates kept per query
    keep_by: Literal["hardest", "stratified"] = "hardest"  # the highest teacher scores, or evenly over their range


@dataclass
class CandidatesConfig:
    """Candidate pools by direction; a direction set to null is not trained."""

    image_to_text: PoolConfig | None = field(default_factory=PoolConfig)  # pictures that look for their captions
    text_to_image: PoolConfig | None = field(default_factory=PoolConfig)  # captions that look for their picture
    # pairs that the teacher scores per batch and direction: each query's most promising by a dual student's current
    # scores, random ones for other students; null: all of the pool
    teacher_budget: int | None = None
    source: str | None = None  # of both directions, where they name none; null: in_batch
    bank: BankConfig = field(default_factory=BankConfig)
    # given: the caption or picture that a query comes with | teacher: of all pictures or texts of the batch, the one
    # that the teacher scores highest, for pictures and texts that do not belong together; then nothing may learn from
    # the ground truth (loss.alpha: 1)
    match: Literal["given", "teacher"] = "given"

    def sources(self) -> dict[str, str]:
        """The source of each direction that is trained: a direction's own, else the common one, else in_batch."""
        sections = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        return {
            direction: section.source or self.source or IN_BATCH
            for direction, section in sections.items()
            if section is not None
        }

    @property
    def random_captions(self) -> int:
        """Captions that are drawn from the data set per picture; 0 where none are."""
        section = self.image_to_text
        return section.count or 0 if section is not None and self.sources()["image_to_text"] == "random" else 0

    @property
    def from_bank(self) -> bool:
        """Return whether candidates and their teacher scores come from a score bank, so that no teacher runs."""
        return BANK in self.sources().values()

    @property
    def match_by_teacher(self) -> bool:
        """Return whether the teacher's top candidate stands where the match would."""
        return self.match == "teacher"


@dataclass
class PrescreenConfig:
    """A cheap look that leaves the teacher fewer candidates to score. Not exact: it may miss hard ones."""

    # whose cheap scores choose; joint: the teacher's joint space where it has one and reads the student's features,
    # else the student's own
    by: Literal["student", "joint", "random"] = "joint"
    # candidates per query that the teacher scores, the match beside them; chosen as the strategy would, by cheap scores
    keep: int = 16
    # steps between those in which the teacher scores all, for prescreen_found and prescreen_range; 0: never
    check_every: int = 50


@dataclass
class SelectionConfig:
    """The choice of the candidates that reach the student."""

    hard_negatives: int | None = 7  # K, per query; null: all of the pool
    # hardest: by teacher score, the paper's choice | random | mixed: a share of the hardest, the others random |
    # stratified: evenly over the range of the teacher's scores. A dual encoder from random weights needs
    # stratified with 8 candidates (it sees no easy ones among the hardest), and takes either with 32
    strategy: str = "hardest"
    hard_share: float = 0.5  # of strategy mixed: the share of K that is the hardest
    # count each candidate for all of the pool that are nearest to it in the teacher's score, so that a softmax over the
    # chosen ones estimates that over the pool; for loss.distill: kl and contrastive: listwise_ce
    reweight: bool = False
    margin: float | None = None  # drop candidates that the teacher scores above the match by more than this
    prescreen: PrescreenConfig | None = None  # null: the teacher scores every candidate


# keys of a teacher's or student's section that the distiller reads, not its model
DISTILLER_KEYS = {
    "teacher": ("preprocess",),
    "teachers": ("preprocess", "weight"),
    "student": ("preprocess", "init_from_teacher"),
}


_OURS = {key for keys in DISTILLER_KEYS.values() for key in keys}


@dataclass
class SuccessionConfig:
    """``student.init_from_teacher``: layers of the teacher's fusion, or its towers.

    Raises:
        ValueError: neither is given.
    """

    # fusion layers of the teacher that the student starts from and keeps, counted from 0
    layers: list[int] | None = None
    towers: bool = False  # a dual_encoder on the teacher's towers

    def __post_init__(self) -> None:
        if not self.layers and not self.towers:
            raise ValueError("give layers: [...] (of the teacher's fusion) or towers: true")
        if self.layers and min(self.layers) < 0:
            raise ValueError(f"layers: {self.layers} must not be negative; the teacher's first layer is 0")


@dataclass
class DcdConfig:
    """Everything ``dcd`` is built from. ``teacher`` and ``student`` are ``model:`` sections of any matcher."""

    arch: str = "dcd"
    model_type: str = "default"  # the file of defaults below this section
    # any registered matcher: arch, model_type, its weights (finetuned) and its own keys
    teacher: dict[str, Any] | None = None
    # several teachers instead of one, each a section with an optional ``weight``: their scores are standardised per
    # query and averaged
    teachers: list[dict[str, Any]] = field(default_factory=list)
    # any registered matcher, or only init_from_teacher: {layers: [...]}
    student: dict[str, Any] = field(default_factory=dict)
    # true: the student uses the teacher's own frozen towers; false: never; null: true for a student that starts from
    # its teacher, else only where both have equal frozen towers
    share_encoders: bool | None = None
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    # autocast for what does not learn, the teachers and frozen encoders: off | bf16; student and loss stay in float32
    frozen_amp: Literal["off", "bf16"] = "off"
    # MiB that the vectors of frozen dual teachers may take: with run.cache_features they are computed once for all kept
    # features of a job that comes back to them; 0: anew at each step
    teacher_vectors_mb: float = 2048.0
    student_chunk_pairs: int | None = None  # recompute the student in chunks of so many pairs: less memory, same loss

    def loss_terms(self, teacher_family: str, student_family: str) -> LossConfig:
        """Return the loss with what is left to "auto" named; without given matches the batch's pairs have no weight."""
        terms = loss_defaults(self.loss, teacher_family, student_family)
        return replace(terms, in_batch_weight=0.0) if self.candidates.match_by_teacher else terms

    @property
    def teacher_sections(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each teacher's section with the path where it stands."""
        if self.teachers:
            return [(f"model.teachers.{i}", section) for i, section in enumerate(self.teachers)]
        return [("model.teacher", self.teacher or {})]

    def sections_by_view(self, teachers: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The matchers' sections by the view that each reads.

        Args:
            teachers: their views, in the order of their sections; none where a bank has their scores.
        """
        named = zip(teachers, self.teacher_sections, strict=False)
        return {**{name: section for name, (_, section) in named}, MAIN_VIEW: self.student}


def model_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's or student's section without the keys that are the distiller's."""
    return {key: value for key, value in section.items() if key not in _OURS}
