"""From the ``model:`` section of a distillation to its teachers and its student, and what cannot work as a pair."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.distillation.candidates import PoolStrategy, build_pool
from lavis_dcd.distillation.objective import DUAL, FUSION, loss_defaults
from lavis_dcd.distillation.objective import config_faults as loss_faults
from lavis_dcd.distillation.selection import SELECTION_STRATEGIES
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.models.building import build_matcher, full_section
from lavis_dcd.models.dcd.banked_teachers import BankedTeachers, bank_faults, family_of
from lavis_dcd.models.dcd.config import DISTILLER_KEYS, CandidatesConfig, DcdConfig, SuccessionConfig
from lavis_dcd.models.dcd.prescreen import Prescreen
from lavis_dcd.models.dcd.teachers import Teachers

log = logging.getLogger(__name__)

_OURS = {key for keys in DISTILLER_KEYS.values() for key in keys}


def build_teachers(config: DcdConfig) -> Teachers:
    """All teachers of a job.

    Raises:
        UserError: neither or both of ``teacher`` and ``teachers``; a section that does not fit its model.
    """
    if bool(config.teacher) == bool(config.teachers):
        raise UserError("model: give either teacher: (one section) or teachers: (a list of sections)")
    sections = config.teacher_sections
    matchers = [build_matcher(model_section(section), path) for path, section in sections]
    return Teachers(matchers, [float(section.get("weight", 1.0)) for _, section in sections], config.frozen_amp)


def build_from_bank(config: DcdConfig) -> tuple[BankedTeachers, Matcher]:
    """The stand-in for teachers whose scores a bank has, and the student.

    The first teacher is built only where the student starts from it, and is gone afterwards; of its parts those stay
    that the student shares.

    Raises:
        UserError: as :func:`build_teachers` and :func:`build_student`.
    """
    teachers, first = BankedTeachers.of(config), None
    if config.student.get("init_from_teacher") is not None:
        path, section = config.teacher_sections[0]
        # freezes it, as every teacher
        first = Teachers([build_matcher(model_section(section), path)]).one()
    return teachers, build_student(config, first)


def build_student(config: DcdConfig, teacher: Matcher | None) -> Matcher:
    """The student, started from the (first) teacher where ``init_from_teacher`` says so.

    Args:
        teacher: None where no teacher is built, and the student does not start from one.

    Raises:
        UserError: a student that cannot start from this teacher, or share its encoders as the job demands.
    """
    start = config.student.get("init_from_teacher")
    section = model_section(config.student)
    if start is None:
        student = build_matcher(section, "model.student")
        if config.share_encoders and (teacher is None or not student.shares_encoders_with(teacher)):
            raise UserError(
                "model.share_encoders: true, but the student has encoders of its own; let it start from the teacher "
                "(student.init_from_teacher) or leave share_encoders out"
            )
        return student
    share = config.share_encoders is not False
    succession = parse(SuccessionConfig, start, "model.student.init_from_teacher")
    if succession.towers:
        return _on_towers(teacher, section, share)
    layers = succession.layers
    student = build_matcher(_thinned_section(teacher, section, layers), "model.student")
    if not hasattr(student, "init_from_teacher"):
        raise UserError(f"model.student.init_from_teacher: {type(student).__name__} cannot start from a teacher's "
                        "layers; leave it out, or use towers: true for a dual_encoder")  # fmt: skip
    student.init_from_teacher(teacher, layers, share_encoders=share)
    return student


def model_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's or student's section without the keys that are the distiller's."""
    return {key: value for key, value in section.items() if key not in _OURS}


def _thinned_section(teacher: Matcher, section: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The student's section; what it leaves out is the teacher's, its fusion as deep as ``layers``."""
    if not hasattr(teacher, "init_from_teacher"):
        raise UserError(f"model.student.init_from_teacher: {type(teacher).__name__} cannot be thinned")
    saved = teacher.checkpoint()
    arch = section.get("arch", saved["arch"])
    if arch != saved["arch"] and _schema(arch) is not _schema(saved["arch"]):
        raise UserError(f"model.student.init_from_teacher.layers: {arch} cannot start from the layers of "
                        f"{saved['arch']}; leave it out, or use towers: true for a dual_encoder")  # fmt: skip
    base = {**saved["config"], "arch": saved["arch"], "model_type": None, "load_finetuned": False}
    own = OmegaConf.merge(base, section, {"fusion": {"layers": len(layers)}, "finetuned": None, "pretrained": None})
    log.info("student: fusion layers %s of the teacher's", layers)
    return OmegaConf.to_container(own)


def _schema(arch: str) -> type | None:
    return getattr(registry.get_model_class(arch), "config_schema", lambda: None)()


def _on_towers(teacher: Matcher, section: dict[str, Any], share: bool) -> Matcher:
    """A student on the teacher's uni-modal towers, whose sizes its section takes over."""
    if not (hasattr(teacher, "vision_tower") and hasattr(teacher, "text_tower")):
        raise UserError(
            f"model.student.init_from_teacher.towers: {type(teacher).__name__} has no towers that a student could "
            "take over; name the student's own vision and text, with weights"
        )
    saved = teacher.checkpoint()["config"]
    sizes = {part: {**saved[part], "load_weights": False} if part == "text" else {**saved[part], "weights": None}
             for part in ("vision", "text")}  # fmt: skip
    whole = full_section(section, "model.student")
    # the model type's towers make room for the teacher's as a whole: merged, keys of both would mix
    whole = OmegaConf.merge(whole, {"model_type": None})
    for part in ("vision", "text"):
        whole[part] = OmegaConf.merge(sizes[part], section.get(part, {}))
    student = build_matcher(OmegaConf.to_container(whole), "model.student")
    if not hasattr(student, "adopt_towers"):
        raise UserError(f"model.student.init_from_teacher.towers: {type(student).__name__} has no towers to start; "
                        "use it with a dual_encoder")  # fmt: skip
    student.adopt_towers(teacher, share=share)
    return student


def check_student(student: nn.Module) -> None:
    """Raises a ``UserError`` where nothing would learn."""
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError("model.student: no parameter would learn; unfreeze a tower or keep a fusion of its own")


def section_faults(section: Mapping[str, Any], path: str) -> list[str]:
    """Return what is wrong with a whole ``model:`` section that fits its schema, without building any model.

    Beside :func:`method_faults`, the loss terms that "auto" stands for must go with the rest; the families by which
    they are chosen are known by the models' names.
    """
    config = parse(DcdConfig, section, path)
    if faults := method_faults(config, path):
        return faults
    try:
        families = _families(config)
    except UserError:  # a teacher or student that does not exist is reported by whoever checks its section
        return []
    return [f"{path}.{line}" for line in loss_faults(loss_defaults(config.loss, *families))]


def _families(config: DcdConfig) -> tuple[str, str]:
    teachers = {family_of(model_section(section), path) for path, section in config.teacher_sections}
    student = model_section(config.student)
    if "arch" not in student and config.student.get("init_from_teacher"):
        student = {"arch": config.teacher_sections[0][1].get("arch"), **student}
    return DUAL if teachers == {DUAL} else FUSION, family_of(student, "model.student")


def method_faults(config: DcdConfig, path: str = "model") -> list[str]:
    """Return what is wrong with the method's settings, one line per fault.

    Args:
        path: where the section stands.
    """
    faults = [f"{path}.{line}" for line in loss_faults(config.loss)]
    how = config.selection
    if how.hard_negatives is not None and how.hard_negatives < 1:
        faults.append(f"{path}.selection.hard_negatives: {how.hard_negatives}, at least 1 is needed (null keeps all)")
    if how.strategy not in SELECTION_STRATEGIES:
        known = ", ".join(sorted(SELECTION_STRATEGIES))
        faults.append(f"{path}.selection.strategy: {how.strategy!r} is none of {known}")
    budget = config.candidates.teacher_budget
    if budget is not None and budget < 2:
        faults.append(f"{path}.candidates.teacher_budget: {budget}, at least 2 pairs per query are needed (null: all)")
    chunk = config.student_chunk_pairs
    if chunk is not None and chunk < 1:
        faults.append(f"{path}.student_chunk_pairs: {chunk}, at least 1 is needed (null: all at once)")
    if config.loss.reference == "release" and (how.hard_negatives is None or budget is not None):
        faults.append(f"{path}.loss.reference: release knows no selection.hard_negatives: null and no teacher_budget")
    faults += bank_faults(config) + prescreen_faults(config)
    try:
        build_pools(config.candidates)
    except UserError as error:
        faults += error.faults
    return faults


def build_pools(config: CandidatesConfig) -> list[PoolStrategy]:
    """The pool of each direction that is trained.

    Raises:
        UserError: no direction, an unknown source, a ``count`` that does not belong to it.
    """
    sources = config.sources()
    if not sources:
        raise UserError("model.candidates: both directions are null, nothing would be distilled")
    pools, faults = [], []
    for direction, source in sources.items():
        try:
            pools.append(build_pool(source, direction))
        except ValueError as error:
            faults.append(f"model.candidates.{direction}.source: {error}")
        count = getattr(config, direction).count
        if (source == "random") != bool(count):
            faults.append(f"model.candidates.{direction}.count: {count}; the source random needs the number of "
                          "captions to draw per picture, and no other source takes one")  # fmt: skip
    if faults:
        raise UserError(faults)
    return pools


def prescreen_faults(config: DcdConfig) -> list[str]:
    """What is wrong with ``selection.prescreen``, one line per fault."""
    wanted, where = config.selection.prescreen, "model.selection.prescreen"
    if wanted is None:
        return []
    faults = []
    hardest = config.selection.hard_negatives
    if hardest is None or wanted.keep < hardest:
        faults.append(f"{where}.keep: {wanted.keep}, but selection.hard_negatives is {hardest}: the teacher would have "
                      "nothing to choose; keep more of them, or leave prescreen out")  # fmt: skip
    if wanted.check_every < 0:
        faults.append(f"{where}.check_every: {wanted.check_every} must not be negative (0: never)")
    for given, name in ((config.candidates.from_bank, "candidates.source: bank, which was mined before"),
                        (config.candidates.teacher_budget is not None, "candidates.teacher_budget, which also cuts"),
                        (config.loss.reference == "release", "loss.reference: release")):  # fmt: skip
        if given:
            faults.append(f"{where}: does not go with {name}; take one of them out")
    return faults


def build_prescreen(config: DcdConfig, teachers: Any, student: Matcher) -> Prescreen | None:
    """The prescreen of a job, if it asks for one.

    Raises:
        UserError: ``by: joint`` where neither the student nor a teacher that shares its encoders has a joint space.
    """
    wanted = config.selection.prescreen
    if wanted is None:
        return None
    sharing = [m for m in teachers.named().values() if m.shares_encoders_with(student)]
    joint = next((matcher for matcher in [*sharing, student] if matcher.has_joint_space), None)
    if wanted.by == "joint" and joint is None:
        raise UserError("model.selection.prescreen.by: joint, but neither the student nor a teacher that shares its "
                        "encoders has a joint space; take by: student, or random")  # fmt: skip
    log.info("selection.prescreen: the teacher scores the %d most promising candidates of a query, by %s; not exact: "
             "prescreen_found tells which share of its hardest %d are among them", wanted.keep, wanted.by,
             config.selection.hard_negatives)  # fmt: skip
    return Prescreen(wanted, {"student": student, **({} if joint is None else {"joint": joint})})
