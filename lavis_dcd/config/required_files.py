"""The files a job needs that are not there: which, and where they come from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig

from lavis_dcd.common.download import cached_path, fetch, is_url, unreachable
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import ASSET_PREFIX, asset_path, cache_root
from lavis_dcd.config.checks import inner_models
from lavis_dcd.config.contracts import ChecksItself, HasSchema, tells
from lavis_dcd.matching.adapters.registry import adapter_for
from lavis_dcd.matching.adapters.vocabulary import HUB_NAME

# LAVIS's code has these addresses inside the functions that build the towers
_BLIP2 = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
_BLIP2_TOWERS = {"eva_clip_g": f"{_BLIP2}/eva_vit_g.pth", "clip_L": f"{_BLIP2}/clip_vit_L.pth"}


@dataclass(frozen=True)
class Need:
    """One file or folder that a configuration names."""

    field: str
    target: Path
    url: str | None = None
    md5: str | None = None
    sha256: str | None = None
    note: str = ""  # what to do where there is no address
    hub: str | None = None  # its name on the hub; transformers fetches it, into a layout of its own

    def missing(self) -> bool:
        return not self.target.exists()


def needs(config: DictConfig) -> list[Need]:
    """Every file and folder that a merged job reads, there or not."""
    found = list(_model_needs(config.model, "model"))
    for name, section in config.datasets.items():
        found += _dataset_needs(registry.get_builder_class(name), section, f"datasets.{name}")
    resume = config.run.get("resume")
    if resume not in (None, "auto"):
        found.append(Need("run.resume", Path(str(resume)), note="give a checkpoint, a run folder, or auto"))
    return found


def missing_faults(config: DictConfig) -> list[str]:
    """One line per needed file that is absent and cannot be fetched now. Nothing is downloaded."""
    absent = [need for need in needs(config) if need.missing()]
    mute = unreachable({need.url for need in absent if need.url})
    found = []
    for need in absent:
        if need.url is None:
            found.append(f"{need.field}: {need.target} does not exist; {need.note}")
        elif need.url in mute:
            found.append(f"{need.field}: {_absence(need, mute[need.url])}")
    return found


def _absence(need: Need, reason: str) -> str:
    if need.hub:
        return (
            f"{need.hub} is not in the hub's cache ({need.target}), and {need.url} cannot be reached "
            f"({reason}): set {need.field} to a local folder, or run again with a network"
        )
    return (
        f"{need.target} does not exist; it comes from {need.url}, which cannot be reached ({reason}): "
        "bring it to that path by hand, or run again with a network"
    )


def fetch_missing(config: DictConfig) -> None:
    """Download what is absent and has an address; call it in one process only.

    Raises:
        UserError: a download that fails.
    """
    for need in needs(config):
        if need.url is not None and not need.hub and need.missing():
            fetch(need.url, need.target, md5=need.md5, sha256=need.sha256)


def _model_needs(section: DictConfig, path: str) -> Iterator[Need]:
    inner = inner_models(section)
    for name, part in inner.items():
        # a student that is thinned from its teacher reads nothing besides
        if name != "student" or section.student.get("arch") or "init_from_teacher" not in section.student:
            yield from _model_needs(part, f"{path}.{name}")
    model = registry.get_model_class(section.get("arch"))
    if model is None or inner:
        return
    finetuned = section.get("load_finetuned", True) and section.get("finetuned")
    key = "finetuned" if finetuned else "pretrained"
    if source := section.get(key):
        tagged = _tagged_weights(model, section, f"{path}.{key}") if key == "pretrained" else None
        yield tagged or _weights(model, f"{path}.{key}", str(source), section.get("checkpoint_sha256"))
    if adapter_for(section.arch) is not None:
        yield from _adapted_needs(model, section, path)
    for where, value in _named(section, ("weights",), path):
        yield _weights(model, where, value, None)
    for where, value in _named(section, ("text", "name"), path):
        yield _hub_or_local(where, value)


def _tagged_weights(model: type, section: Mapping[str, Any], field: str) -> Need | None:
    """LAVIS's CLIP names published weights by a tag and keeps them in a folder of its own; None for other models."""
    if not model.__module__.startswith("lavis.models.clip_models"):
        return None
    from lavis.models.clip_models.pretrained import download_pretrained, get_pretrained_url

    name = str(section.get("model_type")).replace("/", "-")
    url = get_pretrained_url(name, str(section["pretrained"]))
    if not url:
        return None
    folder = Path(inspect.signature(download_pretrained).parameters["root"].default)
    parts = url.split("/")
    # its first publisher puts the file's checksum into the address
    return Need(field, folder / parts[-1], url, sha256=parts[-2] if "openaipublic" in url else None)


def _adapted_needs(model: type, section: Mapping[str, Any], path: str) -> Iterator[Need]:
    """What LAVIS's own models read beside their weights: BERT's vocabulary and configuration, BLIP-2's vision tower."""
    if tokenizer := section.get("tokenizer"):
        yield _local(f"{path}.tokenizer", str(tokenizer), "name a local folder with a vocab.txt")
    elif hasattr(model, "init_tokenizer"):
        yield _hub_or_local(f"{path}.tokenizer", HUB_NAME)
    config = section.get("med_config_path")
    # a relative path starts at LAVIS's own folder
    if config and Path(str(config)).is_absolute():
        yield _local(f"{path}.med_config_path", str(config), "name a file that does, or leave it out")
    if hasattr(model, "init_Qformer") and not section.get("sizes"):
        tower = _BLIP2_TOWERS.get(str(section.get("vit_model", "eva_clip_g")))
        if tower:
            yield Need(f"{path}.vit_model", _lavis_cached(tower), tower)


def _weights(model: type, field: str, source: str, sha256: str | None) -> Need:
    if not is_url(source):
        return _local(field, source, "name a checkpoint file that does")
    ours = tells(model, HasSchema)
    return Need(field, cached_path(source) if ours else _lavis_cached(source), source, sha256=sha256)


def _local(field: str, source: str, note: str) -> Need:
    try:
        return Need(field, Path(asset_path(source)).expanduser(), note=note)
    except UserError as error:
        return Need(field, Path(source), note=error.faults[0].partition(": ")[2])


def _hub_or_local(field: str, source: str) -> Need:
    """A tokenizer or tower of `transformers`: a local folder or file, an asset, or a name on the hub."""
    local = source.startswith((ASSET_PREFIX, "/", ".", "~")) or source.count("/") > 1
    if local or Path(source).exists():
        return _local(field, source, "name a local folder that does, or a model on the hub")
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import TRANSFORMERS_CACHE

    for file in ("tokenizer.json", "vocab.json", "vocab.txt"):
        found = try_to_load_from_cache(source, file, cache_dir=TRANSFORMERS_CACHE)
        if isinstance(found, str):
            return Need(field, Path(found))
    folder = Path(TRANSFORMERS_CACHE) / f"models--{source.replace('/', '--')}"
    return Need(field, folder, f"https://huggingface.co/{source}/resolve/main/config.json", hub=source)


def _lavis_cached(url: str) -> Path:
    # LAVIS's own models look for a downloaded checkpoint in timm's hub folder, by the address's last part.
    from timm.models import hub

    return Path(hub.get_cache_dir()) / Path(urlparse(url).path).name


def _named(section: Mapping[str, Any], keys: tuple[str, ...], path: str) -> Iterator[tuple[str, str]]:
    """The strings in a section whose keys end in `keys`, with where they stand."""
    for key, value in section.items():
        where = f"{path}.{key}"
        if isinstance(value, Mapping):
            yield from _named(value, keys, where)
        elif isinstance(value, str) and tuple(where.split(".")[-len(keys) :]) == keys:
            yield where, value


def _dataset_needs(builder: type | None, section: Any, path: str) -> Iterator[Need]:
    """LAVIS's layout: annotation files per split with an address, and one folder of pictures without."""
    build = _mapping(_mapping(section).get("build_info"))
    if builder is None or tells(builder, ChecksItself):
        return
    for split, info in _mapping(build.get("annotations")).items():
        stores, urls, sums = (_listed(_mapping(info).get(key)) for key in ("storage", "url", "md5"))
        for i, store in enumerate(stores):
            url = urls[i] if i < len(urls) and is_url(urls[i]) else None
            md5 = sums[i] if i < len(sums) else None
            field = f"{path}.build_info.annotations.{split}.storage"
            yield Need(field, _in_cache(store), url, md5, note="give the annotation file's absolute path")
    kind = _mapping(section).get("data_type", "images")
    store = _mapping(build.get(kind)).get("storage")
    for folder in _listed(store):
        yield Need(
            f"{path}.build_info.{kind}.storage",
            _in_cache(folder),
            note=f"nothing downloads the {kind}: put them there by hand, or name their folder with --options",
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    # Wrongly shaped sections are reported by the validation; here they name no files.
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, ListConfig | list | tuple) else [str(value)]


def _in_cache(storage: str) -> Path:
    # LAVIS's rule: a relative path starts at the cache root.
    return cache_root() / Path(storage).expanduser()
