"""The faults of a distiller's section that can be told without building a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import faults as schema_faults
from lavis_dcd.common.schema import parse
from lavis_dcd.common.texts import shown
from lavis_dcd.config.checks import keys_of_types, model_faults, processors_faults, section_schema
from lavis_dcd.config.job_file import model_defaults, registered
from lavis_dcd.distillation.candidates import PoolStrategy, build_pool
from lavis_dcd.distillation.losses import CONTRASTIVE_LOSSES, DISTILL_LOSSES
from lavis_dcd.distillation.objective import DUAL, FUSION, LossConfig, reweighs
from lavis_dcd.distillation.objective import config_faults as loss_faults
from lavis_dcd.distillation.strategies import SELECTION_STRATEGIES, build_strategy
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.models.building import full_section
from lavis_dcd.models.dcd.config import (
    BANK,
    DISTILLER_KEYS,
    CandidatesConfig,
    DcdConfig,
    SelectionConfig,
    SuccessionConfig,
    model_section,
)
from lavis_dcd.models.dcd.match_checks import match_faults
from lavis_dcd.models.retriever import AdoptsTowers, ThinsFromTeacher


@dataclass
class _Weight:
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight: {self.weight} is negative")


def inner_models(section: DictConfig) -> dict[str, DictConfig]:
    """Return the models inside a distiller's section, each over its defaults, by name.

    The names are "teacher", or "teachers.0" and so on, and "student".

    What the distiller itself reads of their sections (``preprocess``, ``weight``, ``init_from_teacher``) is left out.
    A student that is thinned from its teacher takes the (first) teacher's ``arch``.
    """
    several = section.get("teachers")
    several = several if isinstance(several, ListConfig) else []
    teachers = {"teacher": section.get("teacher"), **{f"teachers.{i}": inner for i, inner in enumerate(several)}}
    given = {name: inner for name, inner in teachers.items() if isinstance(inner, DictConfig) and inner}
    first: Mapping[str, Any] = next(iter(given.values()), {})
    student = section.get("student")
    if isinstance(student, DictConfig):
        given["student"] = student
    inner_sections: dict[str, DictConfig] = {}
    for name, inner in given.items():
        ours = DISTILLER_KEYS[name.partition(".")[0]]
        plain = OmegaConf.masked_copy(inner, [key for key in inner if key not in ours])
        if name == "student" and "init_from_teacher" in inner and "arch" not in plain:
            plain = OmegaConf.merge({"arch": first.get("arch")}, plain)
        inner_sections[name] = OmegaConf.merge(model_defaults(plain).get("model", {}), plain)
    return inner_sections


def matcher_names(section: Mapping[str, Any]) -> list[str]:
    """Return the names of the matchers that a distillation evaluates."""
    return ["student"] if parse(DcdConfig, section, "model").candidates.from_bank else ["teacher", "student"]


def inner_faults(section: DictConfig, path: str) -> list[str]:
    """Return the faults of a distiller's teachers and student, and of how they go together."""
    found: list[str] = []
    if bool(section.get("teacher")) == bool(section.get("teachers")):
        found.append(f"{path}.teachers: give either teacher: or teachers:")
    for name, inner in inner_models(section).items():
        where, role = f"{path}.{name}", name.partition(".")[0]
        if found and role == "student" and inner.get("arch") is None:
            continue  # it would be the teacher's
        of_model = model_faults(inner, where)
        found += of_model
        if role != "student" and not of_model and _names_no_weights(inner):
            found.append(
                f"{where}: names no weights (finetuned or pretrained): a teacher with random weights teaches noise; "
                f"name a checkpoint ({where}.finetuned=FILE, with load_finetuned: true)"
            )
        given = OmegaConf.select(section, name)
        found += _preprocess_faults(given.get("preprocess"), f"{where}.preprocess")
        if role == "teachers" and "weight" in given:
            found += schema_faults(_Weight, {"weight": given.weight}, where)
        if "init_from_teacher" in given and role == "student":
            found += _succession_faults(given, section, f"{where}.init_from_teacher")
    weights = [inner.get("weight", 1.0) for inner in section.get("teachers") or [] if isinstance(inner, DictConfig)]
    if not found and weights and not any(weights):
        found.append(f"{path}.teachers: all weights are 0; give at least one teacher a weight above 0")
    return found


def _succession_faults(student: DictConfig, section: DictConfig, path: str) -> list[str]:
    start = student.init_from_teacher
    if found := schema_faults(SuccessionConfig, start, path):
        return found
    if found := _own_weights_faults(student, path):
        return found
    learner = registered(registry.get_model_class, student.get("arch"))
    if start.get("towers") and learner is not None and not issubclass(learner, AdoptsTowers):
        return [f"{path}.towers: {student.arch} has no towers to start; use it with a dual_encoder"]
    first: Mapping[str, Any] = next((part for name, part in inner_models(section).items() if name != "student"), {})
    arch = first.get("arch")
    teacher = registered(adapter_for, arch) or registered(registry.get_model_class, arch)
    if start.get("layers") and teacher is not None and not issubclass(teacher, ThinsFromTeacher):
        return [f"{path}.layers: {arch} cannot be thinned; leave init_from_teacher out, and name the student's arch"]
    return []


def _own_weights_faults(student: DictConfig, path: str) -> list[str]:
    """Return a line for each file of weights that a student names which starts from its teacher's."""
    where = path.rpartition(".")[0]
    given = {"finetuned": student.get("load_finetuned", True) and student.get("finetuned")}
    given["pretrained"] = student.get("pretrained")
    return [
        f"{where}.{key}: {shown(value)} has no effect beside init_from_teacher, which starts the student from the "
        "teacher's weights; take one of the two out"
        for key, value in given.items()
        if value
    ]


def _preprocess_faults(section: Any, path: str) -> list[str]:
    found = processors_faults(section, path)
    if found or section is None:
        return found
    # without it, evaluation would read through the data set's own, perhaps of another size
    return [f"{path}.{kind}: has no eval, through which evaluation reads"
            for kind, stages in section.items() if stages and stages.get("eval") is None]  # fmt: skip


def _names_no_weights(section: DictConfig) -> bool:
    """Return whether the arch takes weights by ``finetuned`` or ``pretrained``, and the section names none."""
    model = registry.get_model_class(section.arch)
    schema = section_schema(section)
    known = {*section, *keys_of_types(model)} if schema is None else {field.name for field in fields(schema)}
    if not known & {"finetuned", "pretrained"}:
        return False
    return not ((section.get("load_finetuned", True) and section.get("finetuned")) or section.get("pretrained"))


def section_faults(section: Mapping[str, Any], path: str) -> list[str]:
    """Return what is wrong with a whole ``model:`` section that fits its schema, without building any model.

    Beside :func:``method_faults``, the loss terms that "auto" stands for must go with the rest; the families by which
    they are chosen are known by the models' names.
    """
    config = parse(DcdConfig, section, path)
    if faults := method_faults(config, path):
        return faults
    try:
        families = _families(config)
    except UserError:  # a teacher or student that does not exist is reported by whoever checks its section
        return []
    terms = config.loss_terms(*families)
    return [f"{path}.{line}" for line in loss_faults(terms)] or reweight_faults(config, terms, path)


def reweight_faults(config: DcdConfig, terms: LossConfig, path: str) -> list[str]:
    """Return where ``selection.reweight`` would have no effect, one line per fault.

    Args:
        terms: the loss, with its terms named.
        path: where the section stands.
    """
    if not config.selection.reweight:
        return []
    used: dict[str, Any] = {terms.distill: DISTILL_LOSSES[terms.distill]} if terms.alpha > 0 else {}
    used |= {terms.contrastive: CONTRASTIVE_LOSSES[terms.contrastive]} if terms.alpha < 1 else {}
    where = f"{path}.selection.reweight: has no effect"
    if not any(map(reweighs, used.values())):
        return [f"{where} with {' and '.join(used)}; take distill: kl or contrastive: listwise_ce"]
    for given, words in (
        (config.selection.hard_negatives is None, "hard_negatives: null, which keeps all candidates"),
        (config.candidates.from_bank, "candidates.source: bank, whose candidates are no sample of a pool"),
        (terms.reference == "release", "loss.reference: release"),
    ):
        if given:
            return [f"{where} with {words}; leave one of them out"]
    return []


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
    else:
        faults += strategy_faults(how, f"{path}.selection")
    budget = config.candidates.teacher_budget
    if budget is not None and budget < 2:
        faults.append(f"{path}.candidates.teacher_budget: {budget}, at least 2 pairs per query are needed (null: all)")
    chunk = config.student_chunk_pairs
    if chunk is not None and chunk < 1:
        faults.append(f"{path}.student_chunk_pairs: {chunk}, at least 1 is needed (null: all at once)")
    if config.loss.reference == "release" and (how.hard_negatives is None or budget is not None):
        faults.append(f"{path}.loss.reference: release knows no selection.hard_negatives: null and no teacher_budget")
    faults += bank_faults(config) + prescreen_faults(config) + match_faults(config, path)
    try:
        build_pools(config.candidates)
    except UserError as error:
        faults += error.faults
    return faults


def strategy_faults(how: SelectionConfig, path: str) -> list[str]:
    """Return what is wrong with the settings of the selection's strategy, one line per fault."""
    try:
        build_strategy(how.strategy, hard_share=how.hard_share)
    except ValueError as error:
        return [f"{path}.{error}"]
    if how.hard_share != SelectionConfig.hard_share and how.strategy != "mixed":
        return [f"{path}.hard_share: does nothing with strategy {how.strategy!r}; leave it out, or take mixed"]
    return []


def prescreen_faults(config: DcdConfig) -> list[str]:
    """Return what is wrong with ``selection.prescreen``, one line per fault."""
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


def bank_faults(config: DcdConfig) -> list[str]:
    """Return what does not fit a score bank in a distillation's settings, one line per fault."""
    sources, bank = config.candidates.sources(), config.candidates.bank
    faults = []
    if config.candidates.source is not None and config.candidates.source not in sources.values() and sources:
        named = ", ".join(f"{direction}.source={source}" for direction, source in sources.items())
        faults.append(
            f"model.candidates.source: {config.candidates.source} has no effect beside {named}; leave it out, or take "
            "those out (or set them)"
        )
    if bank.by not in ("joint", "student", "none"):
        faults.append(f"model.candidates.bank.by: {bank.by!r} is none of joint, student, none")
    faults += [
        f"model.candidates.bank.{name}: {getattr(bank, name)}, at least {least} is needed"
        for name, least in (("shortlist", 0), ("random", 0), ("keep", 1))
        if getattr(bank, name) < least
    ]
    if not config.candidates.from_bank:
        return faults
    for direction, source in sources.items():
        if source != BANK:
            faults.append(
                f"model.candidates.{direction}.source: {source}, but the other direction's is bank, with which no "
                f"teacher runs; set it to bank, or the direction to null (model.candidates.{direction}=null)"
            )
    if config.candidates.teacher_budget is not None:
        faults.append("model.candidates.teacher_budget: no teacher runs with source: bank; leave it out (null)")
    if config.loss.reference == "release":
        faults.append("model.loss.reference: release scores all candidates in the step, which source: bank does not")
    hardest = config.selection.hard_negatives
    if hardest is not None and hardest > bank.keep:
        faults.append(
            f"model.selection.hard_negatives: {hardest}, but candidates.bank.keep is {bank.keep}; lower the one or "
            "raise the other and mine again"
        )
    return faults


def build_pools(config: CandidatesConfig) -> list[PoolStrategy]:
    """Return the pool of each direction that is trained.

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


def family_of(section: Mapping[str, Any], path: str) -> str:
    """Return the family of a ``model:`` section's matcher, "fusion" or "dual", without building it.

    Raises:
        UserError: an arch that is not registered with LAVIS.
    """
    arch = full_section(section, path).arch
    family = getattr(adapter_for(arch) or registry.get_model_class(arch), "family", None)
    return family if isinstance(family, str) else FUSION
