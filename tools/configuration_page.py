"""Write ``docs/configuration.md`` from the dataclasses that hold the settings.

Only the sources are read (``ast`` and ``tokenize``); nothing of the package is imported. A setting's meaning is its
entry under ``Args:`` in the class's docstring, the comment behind it, or the comment lines right above it. A comment
that follows an empty line is the heading of a group.

Usage: ``python tools/configuration_page.py`` rewrites the page; with ``--check`` it exits with status 1 where the
page is not up to date.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
PACKAGE = ROOT / "lavis_dcd"
OBJECTIVE, LOSSES = "distillation/objective.py", "distillation/losses.py"
DCD, METER = "models/dcd/config.py", "models/meter/config.py"
VILT, DUAL = "models/vilt/config.py", "models/dual_encoder/config.py"
IMAGES, VILT_IMAGES = "processors/images.py", "processors/vilt_images.py"
ALBEF_BLIP = "matching/adapters/albef_blip.py"

INTRO = """\
# Configuration

<!-- Written by tools/configuration_page.py from the dataclasses. Edit their comments, then run the tool again. -->

A job is one YAML file with three sections: `model:`, `datasets:` and `run:`. `--options key=value ...` on the command
line goes over the file, as in `--options run.max_steps=100 model.loss.alpha=0.5`. A key that nothing reads is an error
that names the nearest keys (in sections of LAVIS's own classes, which state no keys, a warning), and the whole
configuration is checked before anything is built.

This page lists every key with its type and default. Where a model's or a data set's default file (under `configs/`)
gives another value for a key, that file wins over the default here; the job file wins over both.

A section that may be null can be switched on with all of its defaults by `true`, and off by `null`.
"""


@dataclass
class Setting:
    """One field of a dataclass."""

    name: str
    kind: str
    default: str
    meaning: str
    group: str = ""


@dataclass
class Section:
    """One dataclass: the first paragraph of its docstring, and its fields."""

    name: str
    summary: str
    settings: list[Setting] = field(default_factory=list)


# What the page shows: a heading, a line below it, and (where the section stands in YAML, module, class).
Part = tuple[str, str, list[tuple[str, str, str]]]
PARTS: list[Part] = [
    ("`run:`", "The length of the training, the optimizer, evaluation, checkpoints and the machine.", [
        ("run", "config/run_section.py", "RunConfig"),
        ("run.batches", "config/batches_section.py", "BatchesConfig"),
    ]),
    ("`model:` with `arch: dcd`", "A distillation.", [
        ("model", DCD, "DcdConfig"),
        ("model.student.init_from_teacher", DCD, "SuccessionConfig"),
        ("model.candidates", DCD, "CandidatesConfig"),
        ("model.candidates.image_to_text, model.candidates.text_to_image", DCD, "PoolConfig"),
        ("model.candidates.bank", DCD, "BankConfig"),
        ("model.selection", DCD, "SelectionConfig"),
        ("model.selection.prescreen", DCD, "PrescreenConfig"),
        ("model.loss", OBJECTIVE, "LossConfig"),
    ]),
    ("`model:` with `arch: meter_retrieval`",
     "A METER, trained by itself. As a teacher or student of a distillation its keys stand under `model.teacher` or "
     "`model.student`.", [
        ("model", METER, "MeterConfig"),
        ("model.vision", "models/towers.py", "VisionConfig"),
        ("model.text", "models/towers.py", "TextConfig"),
        ("model.fusion", METER, "FusionConfig"),
        ("model.joint_head", METER, "JointHeadConfig"),
        ("model.loss", "models/retrieval_loss.py", "RetrievalLossConfig"),
    ]),
    ("`model:` with `arch: vilt_retrieval`", "A ViLT. Its `model.loss` has the keys of METER's.", [
        ("model", VILT, "ViltConfig"),
        ("model.image", VILT, "ViltImageConfig"),
        ("model.text", VILT, "ViltTextConfig"),
        ("model.fusion", VILT, "ViltFusionConfig"),
    ]),
    ("`model:` with `arch: dual_encoder`",
     "Two towers and a joint space. Its `model.vision` and `model.text` have the keys of METER's.", [
        ("model", DUAL, "DualEncoderConfig"),
        ("model.head", DUAL, "HeadConfig"),
        ("model.loss", DUAL, "ContrastiveLossConfig"),
    ]),
    ("`model:` with one of LAVIS's own models",
     "The keys that an adapted model takes beside LAVIS's own, where it is a teacher or student.", [
        ("albef_retrieval, blip_retrieval, blip_image_text_matching", ALBEF_BLIP, "CrossAttentionOptions"),
        ("blip2, blip2_image_text_matching", "matching/adapters/base.py", "AdapterOptions"),
        ("clip", "matching/adapters/clip.py", "ClipOptions"),
    ]),
    ("`datasets:`",
     "The keys of `datasets.<builder>.build_info`. LAVIS's own builders (`coco_retrieval`, `flickr30k`) have LAVIS's "
     "keys.", [
        ("datasets.image_text_retrieval.build_info", "datasets/image_text_retrieval.py", "OwnDataInfo"),
        ("datasets.coco_captions.build_info", "datasets/coco_captions.py", "CocoCaptionsInfo"),
        ("datasets.unpaired.build_info", "datasets/unpaired.py", "UnpairedInfo"),
        ("datasets.shape_scenes.build_info", "datasets/shape_scenes/builder.py", "ShapeScenesInfo"),
        ("datasets.shape_scenes.build_info.scenes", "datasets/shape_scenes/builder.py", "SceneCounts"),
    ]),
    ("Processors", "The keys of a `vis_processor` or `text_processor`, beside its `name`.", [
        ("dcd_image_eval", IMAGES, "ImageConfig"),
        ("dcd_image_train", IMAGES, "TrainImageConfig"),
        ("vilt_image_eval", VILT_IMAGES, "ViltImageKeys"),
        ("vilt_image_train", VILT_IMAGES, "ViltTrainImageKeys"),
        ("dcd_caption", "processors/captions.py", "CaptionConfig"),
    ]),
]  # fmt: skip

# Names that a text setting chooses from: keys of a dictionary, or names given to a registering decorator.
CHOICES = {
    ("LossConfig", "distill"): (LOSSES, "DISTILL_LOSSES"),
    ("LossConfig", "contrastive"): (LOSSES, "CONTRASTIVE_LOSSES"),
    ("LossConfig", "weighting"): ("distillation/weighting.py", "WEIGHTINGS"),
    ("SelectionConfig", "strategy"): ("distillation/strategies.py", "SELECTION_STRATEGIES"),
    ("PoolConfig", "source"): ("distillation/candidates.py", "register_pool"),
    ("CandidatesConfig", "source"): ("distillation/candidates.py", "register_pool"),
}

# Settings that only name what the section is of: said by the headings.
LEFT_OUT = {"arch"}
A_SECTION = "all defaults"


def page() -> str:
    """The text of the whole page."""
    lines = [INTRO]
    for heading, below, sections in PARTS:
        lines += [f"## {heading}\n", f"{below}\n"]
        for where, module, name in sections:
            title = where if len(sections) > 1 else ""
            lines += _section_lines(title, read_section(PACKAGE / module, name))
    lines += _type_lines()
    return "\n".join(lines).rstrip() + "\n"


def undocumented() -> list[str]:
    """``class.setting`` for every setting of the page without a meaning."""
    listed = [read_section(PACKAGE / module, name) for _, _, sections in PARTS for _, module, name in sections]
    return [f"{section.name}.{s.name}" for section in listed for s in section.settings if not s.meaning]


def read_section(module: Path, name: str) -> Section:
    """Read one dataclass of a module, with the fields of its bases in the same module or in one it imports.

    Raises:
        LookupError: the module has no such class.
    """
    source = module.read_text(encoding="utf-8")
    tree = ast.parse(source)
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        raise LookupError(f"{module.relative_to(ROOT)} has no class {name}; adapt PARTS in {Path(__file__).name}")
    text = ast.get_docstring(found) or ""
    settings: dict[str, Setting] = {}
    for base in reversed(found.bases):
        if isinstance(base, ast.Name) and (home := _home_of(base.id, tree, module)) is not None:
            settings |= {s.name: s for s in read_section(home, base.id).settings}
    constants = _imported_constants(tree) | _constants(tree)
    settings |= {s.name: s for s in _settings(found, source, _arguments(text), constants)}
    for argument, meaning in _arguments(text).items():  # of inherited fields, said anew
        if argument in settings:
            settings[argument].meaning = meaning
    for setting in settings.values():
        setting.meaning = _with_choices(name, setting)
    return Section(name, _summary(text), [s for s in settings.values() if s.name not in LEFT_OUT])


def _home_of(name: str, tree: ast.Module, module: Path) -> Path | None:
    if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
        return module
    for node in tree.body:
        imported = isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names)
        if imported and (node.module or "").startswith("lavis_dcd."):
            return ROOT / (node.module.replace(".", "/") + ".py")
    return None


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Values that the module gives names to: defaults and aliases of types."""
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _imported_constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Of the names that a module takes from others of the package, those that are constants there."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("lavis_dcd."):
            continue
        home = ROOT / ((node.module or "").replace(".", "/") + ".py")
        if home.is_file():
            of_home = _constants(ast.parse(home.read_text(encoding="utf-8")))
            found |= {alias.name: of_home[alias.name] for alias in node.names if alias.name in of_home}
    return found


def _settings(
    section: ast.ClassDef, source: str, arguments: dict[str, str], constants: dict[str, ast.expr]
) -> Iterator[Setting]:
    comments, lines = _comments(source), source.splitlines()
    group = ""
    for node in section.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _class_variable(node):
            above = _comment_above(node.lineno, lines)
            first = node.lineno - len(above) - 1
            after_gap = lines[first - 1].strip() == "" and not _is_docstring_end(first, section)
            if above and after_gap:
                group, above = " ".join(above), []
            behind = [comments[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
            meaning = arguments.get(node.target.id) or " ".join([*above, *behind])
            kind, value = node.annotation, node.value
            if isinstance(kind, ast.Name):
                kind = constants.get(kind.id, kind)
            if isinstance(value, ast.Name):
                value = constants.get(value.id, value)
            default = _default(value)
            meaning = meaning or ("a section of its own" if default == A_SECTION else "")
            yield Setting(node.target.id, _words(kind), default, meaning, group)


def _class_variable(node: ast.AnnAssign) -> bool:
    return ast.unparse(node.annotation).startswith("ClassVar")


def _is_docstring_end(line: int, section: ast.ClassDef) -> bool:
    first = section.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return is_text and line == (first.end_lineno or 0) + 1


def _comment_above(line: int, lines: list[str]) -> list[str]:
    above: list[str] = []
    at = line - 2
    while at >= 0 and lines[at].strip().startswith("#"):
        above.insert(0, lines[at].strip().lstrip("# ").rstrip())
        at -= 1
    return above


def _comments(source: str) -> dict[int, str]:
    """The comments that stand behind code, by line."""
    return {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip() and "type:" not in token.string
    }


def _words(kind: ast.expr) -> str:
    """A type as a reader of YAML has it."""
    if isinstance(kind, ast.BinOp):  # left | right
        return f"{_words(kind.left)} or {_words(kind.right)}"
    if isinstance(kind, ast.Subscript):
        inner = kind.slice
        arms = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
        name = ast.unparse(kind.value)
        if name == "Literal":
            return ", ".join(f"`{ast.literal_eval(arm)}`" for arm in arms)
        if name == "tuple":
            return f"list of {len(arms)} {_words(arms[0])}s"
        return {"list": f"list of {_PLURALS.get(ast.unparse(arms[0]), _words(arms[0]))}"}.get(name, "section")
    return _KINDS.get(ast.unparse(kind), "section")


_KINDS = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "None": "null"}
_PLURALS = {"str": "texts", "int": "whole numbers", "float": "numbers", "dict[str, Any]": "sections"}


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        factory = next((k.value for k in value.keywords if k.arg == "default_factory"), None)
        if isinstance(factory, ast.Lambda):
            return _yaml(factory.body)
        made = {"list": "[]", "dict": "{}"}.get(ast.unparse(factory) if factory else "", "")
        return f"`{made}`" if made else A_SECTION
    return _yaml(value)


def _yaml(value: ast.expr) -> str:
    try:
        plain = ast.literal_eval(value)
    except ValueError:
        return f"`{ast.unparse(value)}`"
    if isinstance(plain, str):
        return f"`{plain}`" if plain else "empty"
    if isinstance(plain, list | tuple):
        return f"`[{', '.join(str(item) for item in plain)}]`"
    if plain is None or isinstance(plain, bool):
        return f"`{str(plain).lower().replace('none', 'null')}`"
    return f"`{plain}`"


def _summary(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _arguments(text: str) -> dict[str, str]:
    """The entries under ``Args:``, by name; ``a, b: meaning`` counts for both."""
    block = re.search(r"^Args:\n((?:    .*\n?|\n(?=    ))*)", text, flags=re.MULTILINE)
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", block.group(1)) if block else []:
        names, _, meaning = entry.strip().partition(":")
        for name in names.split(","):
            entries[name.strip()] = " ".join(meaning.split())
    return entries


def _with_choices(section: str, setting: Setting) -> str:
    if (section, setting.name) not in CHOICES:
        return setting.meaning
    names = ", ".join(f"`{name}`" for name in _registered(*CHOICES[section, setting.name]))
    return f"{setting.meaning.rstrip('.')}. Names: {names}."


def _registered(module: str, name: str) -> list[str]:
    for node in ast.parse((PACKAGE / module).read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        is_named = isinstance(target, ast.Name) and target.id == name
        if is_named and isinstance(node.value, ast.Dict):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    source = (PACKAGE / module).read_text(encoding="utf-8")
    names = re.findall(rf'^@{name}\("(\w+)"\)', source, flags=re.MULTILINE)
    if not names:
        raise LookupError(f"{module} has no dictionary and no decorator {name}; adapt CHOICES")
    return names


def _section_lines(where: str, section: Section) -> Iterator[str]:
    if where:
        yield f"### {', '.join(f'`{name}`' for name in where.split(', '))}\n"
    yield f"{_markdown(section.summary)}\n"
    group = None
    for setting in section.settings:
        if setting.group != group:
            if group is not None:
                yield ""
            if setting.group:
                yield f"**{_markdown(setting.group)}**\n"
            yield "| key | type | default | meaning |"
            yield "| --- | --- | --- | --- |"
            group = setting.group
        meaning = _markdown(setting.meaning).replace("|", "\\|")
        default = setting.default.replace("|", "\\|")
        yield f"| `{setting.name}` | {setting.kind} | {default} | {meaning} |"
    yield ""


def _markdown(text: str) -> str:
    """Docstrings' code and roles as Markdown's code."""
    text = re.sub(r":(?:class|meth|func|mod):`~?([\w.]+)`", r"`\1`", text)
    pieces = text.replace("``", "`").split("`")
    pieces[::2] = [piece.replace("<", "&lt;") for piece in pieces[::2]]
    return "`".join(pieces)


def _type_lines() -> Iterator[str]:
    """The model types that ship: files ``<arch>_<type>.yaml``."""
    yield "## Model types\n"
    yield "`model_type` names a file of defaults for an `arch`. These ship:\n"
    yield "| `arch` | `model_type` |"
    yield "| --- | --- |"
    files = sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.yaml"))
    for arch in ("dcd", "meter_retrieval", "vilt_retrieval", "dual_encoder"):
        types = [name.removeprefix(f"{arch}_") for name in files if name.startswith(f"{arch}_")]
        yield f"| `{arch}` | {', '.join(f'`{name}`' for name in types)} |"


def main(words: list[str] | None = None) -> int:
    """Rewrite the page, or with ``--check`` tell whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is not up to date")
    options = parser.parse_args(words)
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not up to date; run python tools/configuration_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
