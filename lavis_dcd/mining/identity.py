"""The identity of a score bank: hashes of its teachers, its training rows and pictures, and how teachers read them.

No teacher is built: its section and the files that it names identify it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_dcd.banks.score_bank import TEACHER, TRANSFORMS
from lavis_dcd.common.download import is_url
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import ASSET_PREFIX, asset_path, sha256_of
from lavis_dcd.common.manifest import Identity, digest_of
from lavis_dcd.common.schema import plain
from lavis_dcd.config.required_files import fetched_places
from lavis_dcd.datasets.identity import Content, pictures_digests, rows_digests
from lavis_dcd.datasets.pictures import load_picture
from lavis_dcd.datasets.tree import is_evaluation_set, plain_sets
from lavis_dcd.datasets.views import View, build_view
from lavis_dcd.models.building import full_section
from lavis_dcd.models.dcd.config import DISTILLER_KEYS, DcdConfig

READ_SAMPLES = 4  # pictures and captions that show how a teacher reads

# keys of a section, at any depth, that change no score
_SCORELESS = {
    "match_memory_mb", "load_finetuned", "load_pretrained", "shortcuts", "loss", "freeze", "fast_parameters",
    "checkpoint_sha256", "grad_checkpoint", "compile", "dropout", "hidden_dropout", "token_dropout",
}  # fmt: skip
# keys whose value may be a bare name that is a file or folder here
_PATH_KEYS = {"finetuned", "pretrained", "weights", "name", "tokenizer", "med_config_path"}


def bank_identity(
    teacher_sections: Sequence[tuple[str, Mapping[str, Any]]],
    train_set: Any,
    read_by: View | Sequence[View | None] | None = None,
    content: Content = "sample",
) -> Identity:
    """Return the identity of the bank of these teachers on this training set.

    Args:
        teacher_sections: where each section stands, and the section as written; its ``weight`` counts where there
            are several.
        train_set: a LAVIS retrieval training set or a concatenation of some, as the task builds it.
        read_by: how the teachers read pictures and captions, of each or of all (:func:`teacher_views`); without a
            processor of their own they read through ``train_set``'s.
        content: pictures whose contents count, see :mod:`lavis_dcd.datasets.identity`.

    Raises:
        UserError: a section that does not fit its model; a teacher that names no weights, so that nothing says which
            one it is; a processor that makes something else of a picture each time.
    """
    views = list(read_by) if isinstance(read_by, Sequence) else [read_by]
    for leaf in plain_sets(train_set, "").values():
        _annotation(leaf)  # is there
    sets = {"train": train_set}
    return Identity(
        {TEACHER: _teachers_digest(teacher_sections), TRANSFORMS: _transforms_digest(train_set, views)},
        rows_digests(sets),
        pictures_digests(sets, content),
    )


def identity_of(config: DcdConfig, datasets: Mapping[str, Any], content: Content = "sample") -> Identity:
    """Return the identity of a job's bank.

    Args:
        datasets: by split, "train" among them, as the runner has them before any feature bank or view.
        content: as for :func:`bank_identity`.

    Raises:
        UserError: as :func:`bank_identity`.
    """
    return bank_identity(config.teacher_sections, datasets["train"], teacher_views(config, datasets), content)


def teacher_views(config: DcdConfig, datasets: Mapping[str, Any]) -> list[View]:
    """Return how each teacher reads pictures and captions: through its evaluation processors, without random changes.

    A teacher reads through its section's ``preprocess``; else, where the student starts from it and shares its
    encoders, as the student does; else as its model type's YAML says; else through the data set's evaluation
    processors.

    Args:
        datasets: by split, see :func:`evaluation_view`.

    Raises:
        UserError: processors that cannot be built.
    """
    sharing = config.student.get("init_from_teacher") is not None and config.share_encoders is not False
    views = []
    for number, (path, section) in enumerate(config.teacher_sections):
        if section.get("preprocess") or not (sharing and number == 0):
            view = build_view(section, path)
        elif config.student.get("preprocess"):
            view = build_view({"preprocess": config.student["preprocess"]}, "model.student")
        else:
            view = View()
        views.append(evaluation_view(view, datasets))
    return views


def evaluation_view(view: View, datasets: Mapping[str, Any]) -> View:
    """Return a view with all evaluation processors given: those that it lacks are the data set's.

    Args:
        datasets: by split; the first evaluation set's processors are the data set's, the training set's without one.
    """
    evaluation = [dataset for dataset in datasets.values() if is_evaluation_set(dataset)]
    source = evaluation[0] if evaluation else next(iter(plain_sets(datasets["train"], "").values()))
    return dataclasses.replace(
        view, vis_eval=view.vis_eval or source.vis_processor, text_eval=view.text_eval or source.text_processor
    )


def _teachers_digest(sections: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    content = []
    for path, section in sections:
        of_model = {key: value for key, value in plain(section).items() if key not in DISTILLER_KEYS["teachers"]}
        resolved = plain(full_section(of_model, path))
        if not (resolved.get("load_finetuned", True) and resolved.get("finetuned")):
            resolved.pop("finetuned", None)
        else:
            resolved.pop("pretrained", None)
        if not any(_names_weights(key, value) for key, value in _strings(resolved)):
            raise UserError(
                f"{path}.finetuned: names no file of weights; a teacher of random weights is another one in every "
                f"process, so its scores cannot be kept: name a checkpoint ({path}.finetuned=FILE, with "
                "load_finetuned: true)"
            )
        content.append(_with_contents(resolved))
    weights = [float(section.get("weight", 1.0)) for _, section in sections] if len(sections) > 1 else None
    return digest_of([content, weights])


def _names_weights(key: str, value: str) -> bool:
    """Return whether a string of a section stands for weights: by its key, or because it is a file here."""
    if key in ("finetuned", "pretrained", "weights"):
        return bool(value)
    path = _local(key, value)
    return path is not None and path.is_file() and path.suffix in (".pth", ".pt", ".ckpt", ".safetensors", ".bin")


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _strings(value, str(name))
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _strings(value, key)
    elif isinstance(content, str):
        yield key, content


def _with_contents(content: Any, key: str = "") -> Any:
    """Return a section without keys that change no score, each file and folder that it names replaced by its hash."""
    if isinstance(content, Mapping):
        return {str(k): _with_contents(v, str(k)) for k, v in content.items() if k not in _SCORELESS}
    if isinstance(content, (list, tuple)):
        return [_with_contents(value, key) for value in content]
    if isinstance(content, str) and (path := _local(key, content)) is not None:
        return ["sha256", _digest_of_path(path)]
    return content


def _local(key: str, value: str) -> Path | None:
    """Return the file or folder that a string of a section names, as the models find it; None where it is none."""
    if is_url(value):
        return next((place for place in fetched_places(value) if place.is_file()), None)
    looks_so = value.startswith((ASSET_PREFIX, "~", ".")) or os.sep in value or Path(value).suffix
    if not value or not (looks_so or key in _PATH_KEYS):
        return None
    named = asset_path(value)
    try:
        path = Path(named).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, NUL: no file has such a name
        return None


def _digest_of_path(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest_of([[file.relative_to(path).as_posix(), sha256_of(file)] for file in files])


def _transforms_digest(train_set: Any, views: Sequence[View | None]) -> str:
    digest = hashlib.sha256()
    for leaf in plain_sets(train_set, "").values():
        rows = _annotation(leaf)
        for row in sorted({round(i * (len(rows) - 1) / (READ_SAMPLES - 1)) for i in range(READ_SAMPLES)}):
            picture = load_picture(leaf, row)
            for view in views:
                read_picture = (view and view.vis_eval) or leaf.vis_processor
                read_text = (view and view.text_eval) or leaf.text_processor
                made = [_bytes_of(read_picture(picture.copy())) for _ in range(2)]
                if made[0] != made[1]:
                    raise UserError(
                        f"model.candidates: the teacher's picture processor ({type(read_picture).__name__}) makes "
                        "something else of a picture each time, so its scores cannot be kept; give it one without "
                        "chance (preprocess.vis_processor.eval, or an evaluation split in the data set)"
                    )
                digest.update(made[0] + repr(read_text(rows[row]["caption"])).encode())
    return digest.hexdigest()


def _bytes_of(made: Any) -> bytes:
    if isinstance(made, torch.Tensor):
        return repr((tuple(made.shape), str(made.dtype))).encode() + made.contiguous().numpy().tobytes()
    return repr(np.shape(made)).encode() + np.asarray(made).tobytes()


def _annotation(leaf: Any) -> list[Mapping[str, Any]]:
    rows = getattr(leaf, "annotation", None)
    if not rows or is_evaluation_set(leaf) or not hasattr(leaf, "img_ids"):
        raise UserError(
            f"model.candidates: a score bank needs training sets of LAVIS's retrieval shape (annotation with image, "
            f"caption and image_id; img_ids), and {type(leaf).__name__} is none; use candidates.source: in_batch"
        )
    return rows
