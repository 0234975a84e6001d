"""A local folder in place of the hub's BERT vocabulary, which LAVIS names in its code, while a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import BertTokenizer

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import asset_path

HUB_NAME = "bert-base-uncased"
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@contextmanager
def local_vocabulary(folder: str | None, field: str) -> Iterator[None]:
    """Let LAVIS's ``BertTokenizer.from_pretrained("bert-base-uncased")`` read ``folder`` within the ``with`` block.

    Args:
        folder: with a ``vocab.txt``, or such a file itself; ``None`` leaves the hub in place.
        field: the configuration's field, for messages.

    Raises:
        UserError: there is no vocabulary, or not BERT's kind; or, without a folder, the hub cannot be reached.
    """
    if folder is None:
        with _hub_errors(field):
            yield
        return
    vocabulary = vocabulary_file(folder, field)
    inherited = "from_pretrained" not in vars(BertTokenizer)
    original = BertTokenizer.from_pretrained

    def from_pretrained(name: str, *args: Any, **kwargs: Any) -> BertTokenizer:
        if name == HUB_NAME:
            return BertTokenizer(str(vocabulary), **{"do_lower_case": True, **kwargs})
        return original(name, *args, **kwargs)

    # the only way in: LAVIS's classes name the hub in their code. It lasts as long as one model's building.
    BertTokenizer.from_pretrained = from_pretrained
    try:
        yield
    finally:
        if inherited:
            del BertTokenizer.from_pretrained
        else:
            BertTokenizer.from_pretrained = original


def vocabulary_file(folder: str, field: str) -> Path:
    """Return the ``vocab.txt`` in ``folder``, or ``folder`` itself where it is a file.

    Raises:
        UserError: there is none, or it lacks BERT's special tokens.
    """
    path = Path(asset_path(folder)).expanduser()
    vocabulary = path if path.is_file() else path / "vocab.txt"
    if not vocabulary.is_file():
        raise UserError(f"{field}: no vocab.txt in {folder}; name a folder with BERT's vocabulary")
    try:
        words = set(vocabulary.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {vocabulary} is no text file; name BERT's vocab.txt") from error
    absent = [token for token in _SPECIAL_TOKENS if token not in words]
    if absent:
        raise UserError(f"{field}: {vocabulary} is no BERT vocabulary: it lacks {', '.join(absent)}")
    return vocabulary


@contextmanager
def _hub_errors(field: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if HUB_NAME not in str(error):
            raise
        raise UserError(
            f"{field}: the vocabulary {HUB_NAME} is not in the hub's cache and the hub cannot be reached; "
            "name a local folder with its vocab.txt, or run once with a network"
        ) from error
