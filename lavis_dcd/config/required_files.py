"""The files that a job reads: which, where they lie, and where they come from."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError
from lavis.common.registry import registry
from lavis.models.clip_models.pretrained import download_pretrained, get_pretrained_url
from omegaconf import DictConfig, ListConfig
from transformers.utils import hub as transformers_hub

from lavis_dcd.common.address import looks_like_address, sum_fault
from lavis_dcd.common.address_secrets import without_secrets
from lavis_dcd.common.download import address_fault, cached_path, fetch, unreachable
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import ASSET_PREFIX, asset_path, cache_root, sha256_of
from lavis_dcd.common.texts import one_line
from lavis_dcd.config.checks import inner_models
from lavis_dcd.config.contracts import ChecksItself, HasSchema, tells
from lavis_dcd.matching.adapters.lavis_files import BLIP2_TOWERS, cached_by_lavis
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.matching.adapters.vocabulary import HUB_NAME


@dataclass(frozen=True)
class RequiredFile:
    """One file or folder that a configuration names.

    Args:
        field: the key that names it, as in "model.teacher.finetuned".
        target: where it lies, or is put by a download.
        url: where it comes from; None where nothing downloads it.
        md5, sha256: its checksums.
        note: what to do where there is no address.
        hub: its name on the hub; transformers fetches it, into a layout of its own.
        fault: why it can be no file at all, as with an address that is none.
    """

    field: str
    target: Path
    url: str | None = None
    md5: str | None = None
    sha256: str | None = None
    note: str = ""
    hub: str | None = None
    fault: str | None = None

    def missing(self) -> bool:
        """Return whether it is not there."""
        return not os.path.exists(self.target)  # a path that cannot be one is no error here


def required_files(config: DictConfig) -> list[RequiredFile]:
    """Return every file and folder that a merged job reads, there or not."""
    files = list(_model_files(config.model, "model"))
    for name, section in config.datasets.items():
        files += _dataset_files(registry.get_builder_class(name), section, f"datasets.{name}")
    resume = config.run.get("resume")
    if resume not in (None, "auto"):
        files.append(RequiredFile("run.resume", Path(str(resume)), note="give a checkpoint, a run folder, or auto"))
    return files


def missing_faults(files: Sequence[RequiredFile]) -> list[str]:
    """Return one line per file that is absent and cannot be fetched now. Nothing is downloaded."""
    absent = [file for file in files if not file.fault and file.missing()]
    unreachable_urls = unreachable({file.url for file in absent if file.url})
    found = [f"{file.field}: {file.fault}" for file in files if file.fault]
    for file in absent:
        if file.url is None:
            found.append(f"{file.field}: {one_line(str(file.target))} does not exist; {file.note}")
        elif file.url in unreachable_urls:
            found.append(f"{file.field}: {_absence(file, file.url, unreachable_urls[file.url])}")
    return found


def _absence(file: RequiredFile, url: str, reason: str) -> str:
    shown = without_secrets(url)
    if file.hub:
        return (
            f"{file.hub} is not in the hub's cache ({file.target}), and {shown} cannot be reached "
            f"({reason}): set {file.field} to a local folder, or run again with a network"
        )
    return (
        f"{file.target} does not exist; it comes from {shown}, which cannot be reached ({reason}): "
        "bring it to that path by hand, or run again with a network"
    )


def fetch_and_check(files: Sequence[RequiredFile]) -> None:
    """Download the files that are absent and have an address, and check those that are there; in one process only.

    Raises:
        UserError: a download that fails, a file that is another one than the job means.
    """
    for file in files:
        try:
            if file.url is not None and not file.hub:
                fetch(file.url, file.target, md5=file.md5, sha256=file.sha256)
            elif file.url is None and file.sha256:
                _check_sum(file.target, file.sha256)
        except UserError as error:
            raise UserError([f"{file.field}: {line}" for line in error.faults]) from error


def _check_sum(path: Path, expected: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is no file, and a checksum is expected of it; name the file itself")
    if (sha256 := sha256_of(path)) != expected.lower():
        raise UserError(
            f"{path} is another file than expected: sha256 {sha256}, not {expected.lower()}; name the right file, or "
            "correct checkpoint_sha256"
        )


def _model_files(section: DictConfig, path: str) -> Iterator[RequiredFile]:
    """Yield the weights, tokenizers and towers of a model, or of the models inside it."""
    inner = inner_models(section)
    for name, of_inner in inner.items():
        # a student that is thinned from its teacher reads nothing besides
        if name != "student" or section.student.get("arch") or "init_from_teacher" not in section.student:
            yield from _model_files(of_inner, f"{path}.{name}")
    model = registry.get_model_class(section.get("arch"))
    if model is None or inner:
        return
    finetuned = section.get("load_finetuned", True) and section.get("finetuned")
    key = "finetuned" if finetuned else "pretrained"
    if source := section.get(key):
        tagged = _tagged_weights(model, section, f"{path}.{key}") if key == "pretrained" else None
        yield tagged or _weights(model, f"{path}.{key}", str(source), section.get("checkpoint_sha256"))
    if adapter_for(section.arch) is not None:
        yield from _adapted_files(model, section, path)
    for where, value in _named(section, ("weights",), path):
        yield _weights(model, where, value, None)
    for where, value in _named(section, ("text", "name"), path):
        yield _hub_or_local(where, value)


def _tagged_weights(model: type, section: Mapping[str, Any], field: str) -> RequiredFile | None:
    """Return the weights that LAVIS's CLIP names by a tag and keeps in a folder of its own; None for other models."""
    if not model.__module__.startswith("lavis.models.clip_models"):
        return None
    name = str(section.get("model_type")).replace("/", "-")
    url = get_pretrained_url(name, str(section["pretrained"]))
    if not url:
        return None
    folder = Path(inspect.signature(download_pretrained).parameters["root"].default)
    parts = url.split("/")
    # its first publisher puts the file's checksum into the address
    return RequiredFile(field, folder / parts[-1], url, sha256=parts[-2] if "openaipublic" in url else None)


def _adapted_files(model: type, section: Mapping[str, Any], path: str) -> Iterator[RequiredFile]:
    """Yield the files beside the weights of LAVIS's own models: BERT's vocabulary and configuration, BLIP-2's tower."""
    if tokenizer := section.get("tokenizer"):
        yield _local(f"{path}.tokenizer", str(tokenizer), "name a local folder with a vocab.txt")
    elif hasattr(model, "init_tokenizer"):
        yield _hub_or_local(f"{path}.tokenizer", HUB_NAME)
    config = section.get("med_config_path")
    # a relative path starts at LAVIS's own folder
    if config and (Path(str(config)).is_absolute() or looks_like_address(str(config))):
        yield _local(f"{path}.med_config_path", str(config), "name a file that does, or leave it out")
    if hasattr(model, "init_Qformer") and not section.get("sizes"):
        tower = BLIP2_TOWERS.get(str(section.get("vit_model", "eva_clip_g")))
        if tower:
            yield RequiredFile(f"{path}.vit_model", cached_by_lavis(tower), tower)


def _weights(model: type, field: str, source: str, sha256: str | None) -> RequiredFile:
    # what is no text at all, YAML's 12345, is left to the checks of the section
    fault = sum_fault("sha256", sha256) if isinstance(sha256, str) else None
    if fault:
        return RequiredFile(f"{field.rpartition('.')[0]}.checkpoint_sha256", Path(), fault=f"{fault}; correct it")
    if not looks_like_address(source):
        return replace(_local(field, source, "name a checkpoint file that does"), sha256=sha256)
    if fault := address_fault(source):
        return RequiredFile(field, Path(), fault=fault)
    ours = tells(model, HasSchema)
    return RequiredFile(field, cached_path(source) if ours else cached_by_lavis(source), source, sha256=sha256)


def _local(field: str, source: str, note: str) -> RequiredFile:
    if looks_like_address(source):
        return RequiredFile(field, Path(), fault=f"{without_secrets(source)} is an address, which is not read; {note}")
    try:
        return RequiredFile(field, Path(asset_path(source)).expanduser(), note=note)
    except UserError as error:
        return RequiredFile(field, Path(source), note=error.faults[0].partition(": ")[2])
    except RuntimeError as error:  # ~name of nobody
        return RequiredFile(field, Path(), fault=f"{one_line(source)}: {error}; name a whole path")


def _hub_or_local(field: str, source: str) -> RequiredFile:
    """Return a tokenizer or tower of `transformers`: a local folder or file, an asset, or a name on the hub."""
    local = source.startswith((ASSET_PREFIX, "/", ".", "~")) or source.count("/") > 1
    if local or os.path.exists(source):
        return _local(field, source, "name a local folder that does, or a model on the hub")
    try:
        for file in ("tokenizer.json", "vocab.json", "vocab.txt"):
            cached = try_to_load_from_cache(source, file, cache_dir=transformers_hub.TRANSFORMERS_CACHE)
            if isinstance(cached, str):
                return RequiredFile(field, Path(cached))
    except (HFValidationError, ValueError):
        fault = f"{one_line(repr(source), 100)} is neither a local folder nor a name on the hub (owner/name)"
        return RequiredFile(field, Path(), fault=fault)
    folder = Path(transformers_hub.TRANSFORMERS_CACHE) / f"models--{source.replace('/', '--')}"
    return RequiredFile(field, folder, f"https://huggingface.co/{source}/resolve/main/config.json", hub=source)


def fetched_places(url: str) -> list[Path]:
    """Return where the file at an address lies once it was fetched, for this package's models and for LAVIS's own."""
    return [] if address_fault(url) else [cached_path(url), cached_by_lavis(url)]


def _named(section: Mapping[str, Any], keys: tuple[str, ...], path: str) -> Iterator[tuple[str, str]]:
    """Yield the strings in a section whose keys end in `keys`, with where they stand."""
    for key, value in section.items():
        where = f"{path}.{key}"
        if isinstance(value, Mapping):
            yield from _named(value, keys, where)
        elif isinstance(value, str) and tuple(where.split(".")[-len(keys) :]) == keys:
            yield where, value


def _dataset_files(builder: type | None, section: Any, path: str) -> Iterator[RequiredFile]:
    """Yield the files of LAVIS's layout: annotations per split with an address, one folder of pictures without."""
    build = _mapping(_mapping(section).get("build_info"))
    if builder is None or tells(builder, ChecksItself):
        return
    for split, info in _mapping(build.get("annotations")).items():
        files, urls, sums = (_listed(_mapping(info).get(key)) for key in ("storage", "url", "md5"))
        for i, file in enumerate(files):
            url, md5 = (listed[i] if i < len(listed) else None for listed in (urls, sums))
            yield _annotation_file(f"{path}.build_info.annotations.{split}", file, url, md5)
    kind = _mapping(section).get("data_type", "images")
    for folder in _listed(_mapping(build.get(kind)).get("storage")):
        yield RequiredFile(
            f"{path}.build_info.{kind}.storage",
            _in_cache(folder),
            note=f"nothing downloads the {kind}: put them there by hand, or name their folder with --options",
        )


def _annotation_file(field: str, storage: str, url: str | None, md5: str | None) -> RequiredFile:
    place, note = _in_cache(storage), "give the annotation file's absolute path"
    if url and _is_another(url, place):
        # LAVIS copies it there once, and reads the copy from then on
        line = f"{url} is a file here, and {place} another one, which would be read; name yours as storage"
        return RequiredFile(f"{field}.url", place, fault=line)
    own = os.path.isabs(os.path.expanduser(storage)) and os.path.exists(place)
    # a file of the user's own is what it is, whatever the defaults say of the published one
    if own or not url or not looks_like_address(url):
        return RequiredFile(f"{field}.storage", place, note=note)
    if fault := address_fault(url):
        return RequiredFile(f"{field}.url", place, fault=fault)
    if md5 and (fault := sum_fault("md5", md5)):
        return RequiredFile(f"{field}.md5", place, fault=f"{fault}; correct it, or set it to null")
    return RequiredFile(f"{field}.storage", place, url, md5, note=note)


def _is_another(source: str, place: Path) -> bool:
    if "\0" in source or not (os.path.isfile(source) and place.is_file()) or os.path.samefile(source, place):
        return False
    return sha256_of(source) != sha256_of(place)


def _mapping(value: Any) -> Mapping[str, Any]:
    # Wrongly shaped sections are reported by the validation; here they name no files.
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, ListConfig | list | tuple) else [str(value)]


def _in_cache(storage: str) -> Path:
    # LAVIS's rule: a relative path starts at the cache root.
    return cache_root() / os.path.expanduser(storage)
