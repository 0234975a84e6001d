"""Teachers, student and prescreen of a distillation, built from its ``model:`` section."""

from __future__ import annotations

import logging
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.distillation.strategies import SelectionStrategy
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.learner import Learner
from lavis_dcd.models.building import build_matcher, full_section, module_of
from lavis_dcd.models.dcd.banked_teachers import BankedTeachers
from lavis_dcd.models.dcd.config import DcdConfig, SuccessionConfig, model_section
from lavis_dcd.models.dcd.prescreen import Prescreen
from lavis_dcd.models.dcd.scores import GivesScores
from lavis_dcd.models.dcd.teachers import Teachers
from lavis_dcd.models.retriever import AdoptsTowers, ThinsFromTeacher, TwoTowers

log = logging.getLogger(__name__)


def build_teachers(config: DcdConfig) -> Teachers:
    """Build all teachers of a job.

    Raises:
        UserError: neither or both of ``teacher`` and ``teachers``; a section that does not fit its model.
    """
    if bool(config.teacher) == bool(config.teachers):
        raise UserError("model: give either teacher: (one section) or teachers: (a list of sections)")
    sections = config.teacher_sections
    matchers = [build_matcher(model_section(section), path) for path, section in sections]
    return Teachers(matchers, [float(section.get("weight", 1.0)) for _, section in sections], config.frozen_amp)


def build_from_bank(config: DcdConfig) -> tuple[BankedTeachers, Matcher]:
    """Return the stand-in for teachers whose scores a bank has, and the student.

    The first teacher is built only where the student starts from it, and is dropped afterwards, but for the modules
    that the student shares.

    Raises:
        UserError: as :func:``build_teachers`` and :func:``build_student``.
    """
    teachers, first = BankedTeachers.of(config), None
    if config.student.get("init_from_teacher") is not None:
        path, section = config.teacher_sections[0]
        # freezes it, as every teacher
        first = Teachers([build_matcher(model_section(section), path)]).matchers[0]
    return teachers, build_student(config, first)


def build_student(config: DcdConfig, teacher: Matcher | None) -> Matcher:
    """Build the student, started from the (first) teacher where ``init_from_teacher`` says so.

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
    if teacher is None:
        raise ValueError("a student with init_from_teacher needs its teacher")
    share = config.share_encoders is not False
    succession = parse(SuccessionConfig, start, "model.student.init_from_teacher")
    if succession.towers:
        return _on_towers(teacher, section, share)
    layers = succession.layers or []
    student = build_matcher(_thinned_section(teacher, section, layers), "model.student")
    if not isinstance(student, ThinsFromTeacher):
        raise UserError(f"model.student.init_from_teacher: {type(student).__name__} cannot start from a teacher's "
                        "layers; leave it out, or use towers: true for a dual_encoder")  # fmt: skip
    student.init_from_teacher(module_of(teacher), layers, share_encoders=share)
    return student


def _thinned_section(teacher: Matcher, section: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The student's section; what it leaves out is the teacher's, its fusion as deep as ``layers``."""
    if not (isinstance(teacher, ThinsFromTeacher) and isinstance(teacher, Learner)):
        raise UserError(f"model.student.init_from_teacher: {type(teacher).__name__} cannot be thinned")
    saved = teacher.checkpoint()
    arch = section.get("arch", saved["arch"])
    if arch != saved["arch"] and _schema(arch) is not _schema(saved["arch"]):
        raise UserError(f"model.student.init_from_teacher.layers: {arch} cannot start from the layers of "
                        f"{saved['arch']}; leave it out, or use towers: true for a dual_encoder")  # fmt: skip
    base = {**saved["config"], "arch": saved["arch"], "model_type": None, "load_finetuned": False}
    thinned = OmegaConf.merge(base, section, {"fusion": {"layers": len(layers)}, "finetuned": None, "pretrained": None})
    log.info("student: fusion layers %s of the teacher's", layers)
    return OmegaConf.to_container(thinned)


def _schema(arch: str) -> type | None:
    return getattr(registry.get_model_class(arch), "config_schema", lambda: None)()


def _on_towers(teacher: Matcher, section: dict[str, Any], share: bool) -> Matcher:
    """A student on the teacher's uni-modal towers, whose sizes its section takes over."""
    if not isinstance(teacher, TwoTowers):
        raise UserError(
            f"model.student.init_from_teacher.towers: {type(teacher).__name__} has no towers that a student could "
            "take over; name the student's own vision and text, with weights"
        )
    saved = teacher.checkpoint()["config"]
    sizes = {"vision": {**saved["vision"], "weights": None}, "text": {**saved["text"], "load_weights": False}}
    whole = full_section(section, "model.student")
    # the model type's towers are dropped before the teacher's come in: merging would mix keys of both
    whole = OmegaConf.merge(whole, {"model_type": None})
    for tower, teacher_sizes in sizes.items():
        whole[tower] = OmegaConf.merge(teacher_sizes, section.get(tower, {}))
    student = build_matcher(OmegaConf.to_container(whole), "model.student")
    if not isinstance(student, AdoptsTowers):
        raise UserError(f"model.student.init_from_teacher.towers: {type(student).__name__} has no towers to start; "
                        "use it with a dual_encoder")  # fmt: skip
    student.adopt_towers(teacher, share=share)
    return student


def check_student(student: nn.Module) -> None:
    """Raise a ``UserError`` where nothing would learn."""
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError("model.student: no parameter would learn; unfreeze a tower or keep a fusion of its own")


def build_prescreen(
    config: DcdConfig, teachers: GivesScores, student: Matcher, strategy: SelectionStrategy
) -> Prescreen | None:
    """Return the prescreen of a job, whose selection has this ``strategy``; or None.

    Raises:
        UserError: ``by: joint`` where neither the student nor a teacher that shares its encoders has a joint space.
    """
    wanted = config.selection.prescreen
    if wanted is None:
        return None
    sharing = [m for m in teachers.by_view().values() if m.shares_encoders_with(student)]
    joint = next((matcher for matcher in [*sharing, student] if matcher.has_joint_space), None)
    if wanted.by == "joint" and joint is None:
        raise UserError("model.selection.prescreen.by: joint, but neither the student nor a teacher that shares its "
                        "encoders has a joint space; take by: student, or random")  # fmt: skip
    log.info("selection.prescreen: the teacher scores %d candidates of a query, chosen by %s; not exact: "
             "prescreen_found tells which share of its hardest %d are among them, prescreen_range which share of the "
             "range of its scores", wanted.keep, wanted.by, config.selection.hard_negatives)  # fmt: skip
    return Prescreen(wanted, {"student": student, **({} if joint is None else {"joint": joint})}, strategy)
