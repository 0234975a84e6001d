"""Folders of `transformers`, local or of the hub: tokenizers, sizes and weights, of which nothing runs or is unpickled.

`transformers` itself takes a folder's word for much: the class that reads a tokenizer (one of them unpickles its
vocabulary, any other name of the package serves, too), files elsewhere, weights in any form that torch reads. So the
folder's own settings are read first, and weights come from the reader of this package alone.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, get_tokenizer_config
from transformers.utils import cached_file

from lavis_dcd.common.download import is_url
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.tensor_files import INDEXES, load_tensors, tensor_faults, tensors_of, tensors_only
from lavis_dcd.common.texts import one_line, shown
from lavis_dcd.models.sizes import no_larger_than

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# they read a pickle, or tokenizers of folders below theirs
_REFUSED = ("TransfoXLTokenizer", "RagTokenizer")
_LABELS = 1 << 16
_PATH = re.compile(r"[/\\~\s]")


def plain_text_family(kind: Any) -> bool:
    """Return whether a model type of `transformers` is a language model: such are built of their sizes alone."""
    known = kind in CONFIG_MAPPING_NAMES
    return known and (kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def load_tokenizer(name: str) -> Any:
    """Read a tokenizer of `transformers` by hub name or folder, or BERT's from a `vocab.txt`.

    Raises:
        UserError: there is none, it cannot be reached, or reading it would run or unpickle something.
    """
    from transformers import AutoTokenizer, BertTokenizerFast  # noqa: PLC0415  slow to import

    if name.endswith(".txt") and not Path(name).is_file():
        raise UserError(f"model.text.name: no vocabulary file {name}")
    with _one_line_each("the tokenizer", name):
        if name.endswith(".txt"):
            tokenizer = BertTokenizerFast(vocab_file=name, do_lower_case=True)
        else:
            _check_folder(name)
            _check_tokenizer(name)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # a vocabulary without tokens for unknown words or for padding shows it only now
        padding = "longest" if tokenizer.pad_token is not None else False
        tokenizer(["a \N{SNOWMAN}", "a"], padding=padding, truncation=True, max_length=8)
    return tokenizer


def _sizes(name: str) -> PretrainedConfig:
    """Return what a `config.json` says; `transformers` makes a name for each label that it counts."""
    values, _ = PretrainedConfig.get_config_dict(name)
    labels = values.get("num_labels")
    if isinstance(labels, (int, float)) and not 0 <= labels <= _LABELS:
        raise UserError(f"model.text.name: config.json of {name} says num_labels: {shown(labels)}; correct it")
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def sizes_in(name: str) -> PretrainedConfig:
    """Return the sizes in a hub model's or a folder's `config.json`.

    Raises:
        UserError: there is none, it cannot be reached, or it names code of its own.
    """
    with _one_line_each("the sizes", name):
        _check_folder(name)
        return _sizes(name)


def encoder_with_weights(model_class: type[PreTrainedModel], name: str, **options: Any) -> PreTrainedModel:
    """Return `model_class` with the sizes and weights of a hub model or a folder.

    Raises:
        UserError: weights that are absent, in several files, of other sizes, not finite or not floating-point.
    """
    with _one_line_each(model_class.__name__, name):
        _check_folder(name)
        path = _weights_file(name)
        # counters are the same in every model
        tensors = {k: t for k, t in tensors_of(load_tensors(path)).items() if not k.endswith(INDEXES)}
        with no_larger_than(tensors, path):
            model, told = model_class.from_pretrained(
                name, state_dict=dict(tensors), output_loading_info=True, **options
            )
        prefix = f"{model.base_model_prefix}."
        own = {_own_name(key).removeprefix(prefix): tensor for key, tensor in tensors.items()}
        # the model's own numbers are the file's by now: only their kinds and shapes are compared
        if faults := tensor_faults(own, {k: t.to("meta") for k, t in model.state_dict().items()}, path):
            raise UserError(faults[:10])
    # nothing here runs a pooler
    missing = [key for key in told["missing_keys"] if not key.endswith(INDEXES) and "pooler" not in key]
    if missing:
        raise UserError(
            f"model.text.name: {path} lacks {len(missing)} weights of the text tower, first {sorted(missing)[0]}; name "
            "a folder of the whole encoder"
        )
    return model


def _own_name(key: str) -> str:
    """Return the name that `transformers` gives a tensor of BERT's first files."""
    return key.replace("beta", "bias") if "beta" in key else key.replace("gamma", "weight")


def _weights_file(name: str) -> Path:
    for file in _WEIGHTS:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found)
        if cached_file(name, f"{file}.index.json", _raise_exceptions_for_missing_entries=False) is not None:
            raise UserError(
                f"model.text.name: the weights of {name} lie in several files ({file}.index.json); save them as one, "
                "with save_pretrained(max_shard_size='100GB')"
            )
    raise UserError(f"model.text.name: {name} has none of {', '.join(_WEIGHTS)}; name a folder or model with weights")


def _check_folder(name: str) -> None:
    """Refuse an address, which `transformers` would fetch, and a folder with pipes or devices, which may never end."""
    if is_url(name):
        raise UserError(f"model.text.name: {name} is an address; give a hub name or a local folder")
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"model.text.name: {name} is no folder; give one with the files of a tokenizer, or a vocab.txt")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a broken link is as good as no file
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"model.text.name: {path} is no regular file; take it out of the folder")


def _check_tokenizer(name: str) -> None:
    """Refuse a folder whose settings name code, another kind of class, or files elsewhere."""
    settings = get_tokenizer_config(name)
    kind = settings.get("tokenizer_class")
    if kind is None:
        sizes = _sizes(name)
        kinds: Iterable[Any] = sizes.tokenizer_class or TOKENIZER_MAPPING_NAMES.get(sizes.model_type) or ("",)
        kinds = (kinds,) if isinstance(kinds, str) else kinds
    else:
        kinds = (kind,)
    known = {"PreTrainedTokenizerFast"} | {n for names in TOKENIZER_MAPPING_NAMES.values() for n in names if n}
    for kind in kinds:
        if kind is not None and ((kind not in known and f"{kind}Fast" not in known) or kind in _REFUSED):
            raise UserError(
                f"model.text.name: the tokenizer of {name} is a {shown(kind)}, which this package does not open; name "
                "a text encoder's, as BERT's"
            )
    if "auto_map" in settings:
        raise UserError(f"model.text.name: the tokenizer of {name} brings code of its own (auto_map), which is not run")
    for key, value in settings.items():
        _check_setting(name, str(key), value)


def _check_setting(name: str, key: str, value: Any) -> None:
    """Refuse a setting that could make the tokenizer's class open a file that the folder does not have."""
    opening = key.endswith(("_file", "_files", "_kwargs", "_spm", "vocab", "merges")) or key == "init_inputs"
    if not opening or key == "special_tokens_map_file":  # that one stands in many folders, and nothing reads it
        return
    texts = list(_texts(value))
    own_file = key.endswith("_file") and texts
    if own_file or any(_PATH.search(text) or text.startswith(("-", ".")) for text in texts):
        raise UserError(
            f"model.text.name: tokenizer_config.json of {name} says {key}: {shown(value)}; take it out, a tokenizer's "
            "files lie in its folder"
        )


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)) and depth < 8:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item, depth + 1)


@contextmanager
def _one_line_each(what: str, name: str) -> Iterator[None]:
    """Let only this package's reader of weights read within the ``with`` block; any error becomes one line."""
    try:
        with tensors_only():
            yield
    except UserError as error:
        named = (line if line.startswith("model.") else f"model.text.name: {line}" for line in error.faults)
        raise UserError(named) from error
    except Exception as error:  # transformers and tokenizers have no class of their own for what they stumble over
        kind = "folder" if Path(name).is_absolute() or Path(name).exists() else "hub name"
        reason = one_line(" ".join(str(error).split()), 200) or type(error).__name__
        raise UserError(
            f"model.text.name: {what} cannot be read from {kind} {name!r} ({reason}); give a local folder with its "
            "files, or run once with a network"
        ) from error
