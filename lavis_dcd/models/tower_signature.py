"""Whether two pairs of towers make the same features: a hash of all that shapes them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.hashing import update_with_tensors

# buffers that no frozen tower's output depends on
_INERT = ("position_ids", "num_batches_tracked")


def towers_signature(vision_tower: nn.Module, text_tower: nn.Module) -> str | None:
    """A hash over both towers' classes, settings and weights, and the tokenizer; equal hashes mean equal features.

    Weights and tokenizer are read once; the weights again after a change.

    Returns:
        64 hexadecimal digits; ``None`` where the tokenizer cannot be read.
    """
    tokenizer = _tokenizer_digest(text_tower)
    if tokenizer is None:
        return None
    towers = [[type(tower).__name__, tower.settings(), _weights_digest(tower)] for tower in (vision_tower, text_tower)]
    return _hash_of([towers, tokenizer])


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _weights_digest(tower: nn.Module) -> str:
    tensors = {k: t for k, t in tower.state_dict(keep_vars=True).items() if not k.endswith(_INERT)}
    # the version counts a tensor's changes in place; the rest tells another tensor, or other storage, of the name
    state = [(id(t), t.data_ptr(), t._version) for t in tensors.values()]
    known = tower.__dict__.get("_known_weights")
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256()
    update_with_tensors(digest, tensors.items())
    tower.__dict__["_known_weights"] = (state, digest.hexdigest())
    return digest.hexdigest()


def _tokenizer_digest(text_tower: nn.Module) -> str | None:
    """A hash of the vocabulary and the rules; a tokenizer that cannot be read is not asked for again."""
    if "_known_tokenizer" not in text_tower.__dict__:
        try:
            text_tower.__dict__["_known_tokenizer"] = _hash_of(_tokenizer_content(text_tower.tokenizer))
        except UserError:
            text_tower.__dict__["_known_tokenizer"] = None
    return text_tower.__dict__["_known_tokenizer"]


def _tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # truncation and padding are the latest call's
        content["rules"] = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
    return content
